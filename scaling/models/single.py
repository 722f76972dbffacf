"""The single-Transformer ablation of CLUE (Shin et al. 2023, Table 5).

One Transformer reads all tokens of a user's log in one service, without item embeddings between.
"""

import numpy as np
from torch import Tensor

from scaling.config import MAX_TOKENS_SINGLE, ModelConfig
from scaling.models.clue import ContrastiveEncoder
from scaling.models.transformer import Layout, Stack, in_chunks, initialise
from scaling.packing import Ints, PackedBatch, spans


class Single(ContrastiveEncoder):
    """Transformer over the concatenated tokens of a log, its most recent 2,048 at most."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.item = Stack(config, MAX_TOKENS_SINGLE)
        initialise(self, config.layers)

    def encode_items(self, tokens: Ints, token_offsets: Ints) -> Tensor:
        """Sequences of tokens to their mean hidden vectors. [sequences, d]"""
        lengths = token_offsets[1:] - token_offsets[:-1]
        layout = Layout.of(lengths, self.config.d_model, self.device)
        embedded: Tensor = self.item(self.embed_tokens(tokens, layout), layout)
        return embedded

    def forward(self, batch: PackedBatch, micro_batch_tokens: int | None = None) -> Tensor:
        """User embeddings, one per row of the batch, reduced as in ``CLUE``. [rows, w]"""
        lengths = batch.item_lengths[batch.items]
        tokens = batch.tokens[spans(batch.token_offsets[:-1][batch.items], lengths)]
        ends = np.concatenate([[0], np.cumsum(lengths)])[batch.item_offsets]
        kept = np.minimum(np.diff(ends), MAX_TOKENS_SINGLE)
        tokens = tokens[spans(ends[1:] - kept, kept)]
        offsets = np.concatenate([[0], np.cumsum(kept)])

        def encode(a: int, b: int) -> Tensor:
            own = tokens[offsets[a] : offsets[b]]
            return self.encode_items(own, offsets[a : b + 1] - offsets[a])

        pooled = in_chunks(encode, kept, micro_batch_tokens, self.draws, self.device)
        user_emb: Tensor = self.reduce(pooled)
        return user_emb
