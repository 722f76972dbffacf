"""CLUE: the Contrastive Learning User Encoder (Shin et al. 2023, "CLUE", eq. 1-3, Fig. 1).

One encoder is shared by all services. Symbols of the paper: E ``token_emb`` (g(x)), h and H
``item_emb``, z ``user_emb``, f ``project``, tau ``exp(logit_scale)``.

z and f(z) have the width w (``feature_width``): d, or a model's ``feature_dim``, to which a linear
layer without bias takes the pooled output (Table 6: "a single MLP layer for reducing the dimension
of the encoder outputs").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.config import MAX_ITEMS, MAX_TOKENS, ModelConfig
from scaling.models.transformer import Layout, Stack, in_chunks, initialise
from scaling.packing import Ints, PackedBatch

INITIAL_SCALE = 14.27
"""tau at the start (Appendix B)."""
MAX_SCALE = 100.0
"""Largest factor on the cosine (Appendix B)."""


class ContrastiveEncoder(nn.Module):
    """What every encoder has: tokens' table, reduction, projection head and logit scale."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        d, width = config.d_model, config.feature_width
        self.token_emb = nn.Embedding(vocab_size, d)
        self.reduce = nn.Identity() if width == d else nn.Linear(d, width, bias=False)
        self.w1 = nn.Linear(width, width, bias=False)
        self.w2 = nn.Linear(width, width, bias=False)
        # Shape (1,) and stored as its log: DeepSpeed refuses 0-dim parameters, and a clamp after
        # the step would be undone by its fp32 masters, so `scale` clamps in the forward pass.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(INITIAL_SCALE)]))

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.token_emb.weight.device

    @property
    def draws(self) -> bool:
        """Whether a forward pass draws random numbers: dropout is on."""
        return self.training and self.config.dropout > 0

    def forward(self, batch: PackedBatch, micro_batch_tokens: int | None = None) -> Tensor:
        """User embeddings z, one per row of the batch. [rows, w]

        Args:
            micro_batch_tokens: most elements whose activations are held at once; what exceeds them
                is computed again in the backward pass (``transformer.in_chunks``). None: no limit.
        """
        raise NotImplementedError

    def encode_items(self, tokens: Ints, token_offsets: Ints) -> Tensor:
        """Embeddings of items from their tokens alone. [items, d]

        Args:
            tokens: tokens of all items, one after another. [tokens]
            token_offsets: item ``i`` has ``tokens[token_offsets[i]:token_offsets[i + 1]]``.
        """
        raise NotImplementedError

    def project(self, user_emb: Tensor) -> Tensor:
        """f(z) = W2 gelu(W1 z), used by the loss only (after eq. 4). [rows, w] -> [rows, w]"""
        projected: Tensor = self.w2(F.gelu(self.w1(user_emb)))
        return projected

    def embed_tokens(self, tokens: Ints, layout: Layout) -> Tensor:
        """Token embeddings in their slots; empty slots hold the pad token. [T * t, d]"""
        n_slots = layout.shape[0] * layout.shape[1]
        slots = torch.zeros(n_slots, dtype=torch.long, device=self.device)
        slots[layout.slots] = torch.from_numpy(tokens).to(self.device).long()
        embedded: Tensor = self.token_emb(slots)
        return embedded


class CLUE(ContrastiveEncoder):
    """Item Transformer over tokens, Service Transformer over items, mean pooling after each.

    Positions count from the first token of an item and from the oldest item kept of a user.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.item = Stack(config, MAX_TOKENS)
        self.service = Stack(config, MAX_ITEMS)
        initialise(self, config.layers)

    def encode_items(self, tokens: Ints, token_offsets: Ints) -> Tensor:
        """Item embeddings h = MEAN(T_item(E)) (eq. 1). [items, d]"""
        lengths = token_offsets[1:] - token_offsets[:-1]
        layout = Layout.of(lengths, self.config.d_model, self.device)
        item_emb: Tensor = self.item(self.embed_tokens(tokens, layout), layout)
        return item_emb

    def forward(self, batch: PackedBatch, micro_batch_tokens: int | None = None) -> Tensor:
        """User embeddings z = MEAN(T_service(H)) (eq. 2-3), one per row of the batch, reduced where
        the model has a ``feature_dim``. [rows, w]"""
        offsets, rows = batch.token_offsets, batch.item_offsets
        items = torch.from_numpy(batch.items).to(self.device)

        def encode_items(a: int, b: int) -> Tensor:
            tokens = batch.tokens[offsets[a] : offsets[b]]
            return self.encode_items(tokens, offsets[a : b + 1] - offsets[a])

        def encode_users(a: int, b: int) -> Tensor:
            layout = Layout.of(batch.row_lengths[a:b], self.config.d_model, self.device)
            history = item_emb.index_select(0, items[rows[a] : rows[b]])
            user_emb: Tensor = self.service(layout.scatter(history), layout)
            return user_emb

        most, random = micro_batch_tokens, self.draws
        item_emb = in_chunks(encode_items, batch.item_lengths, most, random, self.device)
        pooled = in_chunks(encode_users, batch.row_lengths, most, random, self.device)
        user_emb: Tensor = self.reduce(pooled)
        return user_emb
