"""A corpus as an encoder of another corpus reads it.

An encoder knows the tokens it was trained on, and no others: "kitchen" is one token in one corpus's
tokenizer and two in another's, and the same number means something else in each. So the texts of a
foreign corpus are encoded again in the encoder's tokenizer, from what the cut at 32 tokens left of
them, and cut again. Where both corpora have the same tokenizer the texts stay as they are.

An item's first token is its service's. A service that the encoder was pretrained on under the same
name keeps that token; for all others it is a choice that no paper tells, and ours is the token of
the encoder's first service of pretraining, unless another is named.
"""

from copy import copy

import numpy as np
from numpy.typing import NDArray

from scaling.config import MAX_TOKENS
from scaling.data.corpus import BLOCK, Corpus, CorpusError, blocks
from scaling.data.domains import encoded_again, same_tokenizer
from scaling.data.statistics import text_tokens
from scaling.rundir import RunDir

Ints = NDArray[np.int64]


def as_read_by(run: RunDir, corpus: Corpus, *, unknown: str | None = None) -> Corpus:
    """``as_seen_by`` for the encoder of a run, whose own corpus is found below its root.

    Raises:
        CorpusError: as ``as_seen_by``; or the run's corpus is not there.
    """
    data = run.spec().data
    own = corpus.card.digest == data.corpus_digest
    reference = corpus if own else Corpus.find(run.root, data.corpus_digest)
    return as_seen_by(corpus, reference, data.services, unknown=unknown)


def as_seen_by(
    corpus: Corpus,
    reference: Corpus,
    services: tuple[str, ...] | None = None,
    *,
    unknown: str | None = None,
) -> Corpus:
    """A corpus with its items in the tokens of an encoder.

    Args:
        corpus: to be read. Of the encoder's own nothing changes: services that are not pretrained
            on have tokens of their own there, which no training has touched.
        reference: the corpus the encoder was trained on, ``Corpus.find(root,
            config.data.corpus_digest)``.
        services: those of ``reference`` that the encoder was pretrained on; None: all.
        unknown: service of pretraining of ``reference`` whose token services get that it does not
            have; None: the first one.

    Returns:
        The same users, logs and item numbers; ``tokens`` and ``token_offsets`` are those of
        ``reference``. At most 64 bytes of memory an item.

    Raises:
        CorpusError: ``unknown`` is no service of pretraining of ``reference``.
    """
    pretrained = services or reference.card.services
    if unknown is not None and unknown not in pretrained:
        raise CorpusError(
            f"{reference.path}: {unknown!r} is no service of pretraining; valid: "
            f"{', '.join(pretrained)}"
        )
    if corpus.card.digest == reference.card.digest:
        return corpus
    names = [s if s in pretrained else unknown or pretrained[0] for s in corpus.services]
    token = np.array([1 + reference.services.index(s) for s in names])
    texts = text_tokens if same_tokenizer(corpus, reference) else encoded_again(corpus, reference)
    counts: list[Ints] = []
    tokens: list[NDArray[np.unsignedinteger]] = []
    for block in blocks(corpus.n_items, BLOCK // MAX_TOKENS):
        lengths, text = texts(corpus, block)
        starts = np.cumsum(lengths) - lengths
        whole = np.insert(text, starts, token[corpus.item_service[block]])
        counts.append(lengths + 1)
        tokens.append(whole.astype(reference.tokens.dtype))
    seen = copy(corpus)
    seen.__dict__.pop("_item_table", None)
    seen.tokens = np.concatenate(tokens)
    seen.token_offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return seen
