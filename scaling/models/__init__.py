"""Encoders and losses; one small file per system."""

import torch

from scaling.config import ModelConfig
from scaling.models.clue import CLUE, ContrastiveEncoder
from scaling.models.single import Single

SYSTEMS: dict[str, type[ContrastiveEncoder]] = {"clue": CLUE, "single": Single}


def build(config: ModelConfig, vocab_size: int, seed: int = 0) -> ContrastiveEncoder:
    """A freshly initialised encoder; the same numbers for the same seed on any machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SYSTEMS[config.system](config, vocab_size)
