import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.permutation import key_of, permute


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def plain(x, n, key):
    """The same cipher in whole numbers of Python."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(x, b)
        for i in range(12):
            salt = mix((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64)
            if i % 2:
                right = (right + mix(salt ^ left) % b) % b
            else:
                left = (left + mix(salt ^ right) % a) % a
        x = left * b + right
        if x < n:
            return x


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_is_a_permutation_and_equals_the_plain_one(n, key):
    images = permute(np.arange(n), n, key)
    assert sorted(images) == list(range(n))
    assert images.tolist() == [plain(x, n, key) for x in range(n)]


@given(st.integers(2**20, 2**40), st.integers(0, 2**64 - 1))
def test_large_sets(n, key):
    x = np.array([0, 1, n // 2, n - 1])
    assert permute(x, n, key).tolist() == [plain(int(i), n, key) for i in x]


def test_sizes_and_keys_broadcast():
    n, key = np.array([[3], [7]]), np.array([[1], [2]], np.uint64)
    both = permute(np.arange(3), n, key)
    assert both.tolist() == [
        permute(np.arange(3), 3, 1).tolist(),
        permute(np.arange(3), 7, 2).tolist(),
    ]


@pytest.mark.parametrize(("n", "orders"), [(3, 6), (4, 24), (5, 120)])
def test_all_orders_are_equally_likely(n, orders):
    keys = np.arange(24_000, dtype=np.uint64)[:, None]
    images = permute(np.arange(n)[None], n, keys)
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == orders
    expected = len(keys) / orders
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < orders - 1 + 5 * np.sqrt(2 * (orders - 1))


def test_golden_values():
    """Stored negatives and every run's order rest on these."""
    assert key_of("order", 0, 0) == 5279783570985387186
    assert permute(np.arange(8), 1000, 1).tolist() == [634, 949, 620, 237, 268, 700, 884, 749]
