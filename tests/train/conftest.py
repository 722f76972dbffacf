"""One small prepared corpus for all tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.data.corpus import Corpus


@pytest.fixture(scope="session")
def corpus(_prepared: Callable[..., Path]) -> Corpus:
    """128 users, 24 of them in the pool."""
    root = _prepared(128, 8, 24, 0.3, 5, 0)
    return Corpus.open(next(root.glob("corpora/tiny-*")))
