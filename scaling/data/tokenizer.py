"""Byte-level BPE (Hugging Face tokenizers), and the tokens of an item.

Ids: 0 pads, 1 .. n are the n service tokens, then the BPE entries: the 256 bytes, then merges. An
item is its service token and then the BPE tokens of its text, cut at 32 in all (Shin et al. 2023,
Section 3 and Table 7). Any text at all has tokens, since every byte has.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scaling.config import MAX_TOKENS

PAD = 0
CHUNK = 65_536
"""Texts encoded at a time."""


def train(texts: Iterable[str], vocab_size: int, services: Sequence[str]) -> Tokenizer:
    """Learn a tokenizer.

    Args:
        texts: distinct texts; their order does not matter.
        vocab_size: entries at most, pad, service tokens and the 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", *(f"<service:{s}>" for s in services)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _ready(tokenizer)


def load(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``."""
    return _ready(Tokenizer.from_file(str(path)))


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    # A text that spells "<pad>" is text; the setting is not part of the file.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """BPE tokens of texts, each cut to leave room for the service token, in chunks.

    Yields:
        ``(lengths, tokens)`` of up to ``CHUNK`` texts. [texts], [tokens]
    """
    iterator = iter(texts)
    while chunk := list(islice(iterator, CHUNK)):
        ids = [e.ids[: MAX_TOKENS - 1] for e in tokenizer.encode_batch_fast(chunk)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        yield lengths, np.fromiter((t for i in ids for t in i), np.int64, int(lengths.sum()))
