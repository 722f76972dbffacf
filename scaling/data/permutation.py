"""A keyed permutation of 0..n-1 in O(1) memory, the same on every machine and numpy version.

A Feistel network over the two digits of a number in a mixed radix: with a * b >= n, a number below
a * b is (left, right), and each round adds a hash of one digit to the other, modulo its radix: a
bijection whatever the hash. The few numbers from n to a * b - 1 (fewer than a, so about the square
root of n) are walked through until they fall below n (cycle walking: Black and Rogaway, CT-RSA
2002, "Ciphers with arbitrary finite domains").
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15


def key_of(*parts: object) -> int:
    """A 64-bit key out of any values: the first 8 bytes of the SHA-256 of their text."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def permute(index: Any, n: Any, key: Any) -> NDArray[np.int64]:
    """Images of ``index`` under the permutation of 0..``n``-1 that ``key`` names.

    Args:
        index: numbers in 0..n-1.
        n: sizes of the permuted sets, at least 1; broadcasts against ``index``.
        key: 64-bit keys; broadcasts against ``index``. Each (n, key) is a permutation of its own.
    """
    index, n, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(n, np.uint64), np.asarray(key, np.uint64)
    )
    out = index.copy().reshape(-1)
    n, key = n.reshape(-1), key.reshape(-1)
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    walking = np.arange(len(out))
    while len(walking):
        out[walking] = _rounds(out[walking], a[walking], b[walking], key[walking])
        walking = walking[out[walking] >= n[walking]]
    images: NDArray[np.int64] = out.reshape(index.shape).astype(np.int64)
    return images


def _rounds(x: Any, a: Any, b: Any, key: Any) -> Any:
    left, right = x // b, x % b
    with np.errstate(over="ignore"):
        for i in range(ROUNDS):
            salt = key + np.uint64((i + 1) * _GOLDEN % 2**64)
            if i % 2:
                right = (right + _mix(_mix(salt) ^ left) % b) % b
            else:
                left = (left + _mix(_mix(salt) ^ right) % a) % a
    return left * b + right


def _mix(x: Any) -> Any:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
