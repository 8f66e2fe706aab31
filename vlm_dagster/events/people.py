"""How made-up people behave: pure functions of (config, day, chunk of users), on whole columns.

Everything is drawn from raw Philox words, whose stream numpy guarantees, through integer
arithmetic, exact floating-point operations and rounded quantile tables. So the same words give the
same events on every machine and with every numpy; `numpy.random.Generator`'s distributions and
vectorised logarithms promise neither.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_dagster.hashing import mix64

__all__ = [
    "F64",
    "I64",
    "U64",
    "exponential",
    "hashed",
    "log_uniform",
    "lognormal",
    "normal",
    "sixteen",
    "words",
    "zipf",
]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U16 = npt.NDArray[np.uint16]

_STEPS = 1 << 16
_DIGITS = 9  # tables are rounded, so that a library's last bit never shows


def words(seed: int, day: int, chunk: int, count: int, stream: int) -> U64:
    """`count` raw words of the Philox stream that belongs to this chunk of users on this day."""
    place = (day << 40) | (chunk << 8) | stream
    generator: Any = np.random.Philox(key=np.array([seed, place], np.uint64))
    drawn: U64 = generator.random_raw(count)
    return drawn


def sixteen(raw: U64, part: int) -> U16:
    """The `part`-th (0 to 3) 16 bits of each word: a uniform draw of its own. [N] in, [N] out."""
    return (raw >> np.uint64(16 * part)).astype(np.uint16)


def hashed(seed: int, salt: int, *keys: npt.NDArray[Any]) -> U64:
    """A fixed random word for each combination of keys. [N] each in, [N] out."""
    state: U64 = mix64(np.array([seed * 64 + salt], np.uint64))
    for key in keys:
        state = mix64(state ^ key.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    return mix64(state)


@lru_cache(1)
def _normal_table() -> F64:
    inverse = NormalDist().inv_cdf
    values = np.array([inverse((i + 0.5) / _STEPS) for i in range(_STEPS)], np.float64)
    return np.asarray(np.round(values, _DIGITS))


@lru_cache(1)
def _exponential_table() -> F64:
    values = [-math.log1p(-(i + 0.5) / _STEPS) for i in range(_STEPS)]
    return np.asarray(np.round(np.array(values, np.float64), _DIGITS))


@lru_cache(8)
def _lognormal_table(sigma: float) -> F64:
    steps = [math.exp(sigma * value) for value in _normal_table().tolist()]
    mean = math.fsum(steps) / _STEPS
    return np.asarray(np.round(np.array(steps, np.float64) / mean, _DIGITS))


@lru_cache(64)
def _log_uniform_table(largest: float) -> F64:
    steps = [math.exp(math.log(largest) * i / _STEPS) for i in range(_STEPS + 1)]
    return np.asarray(np.round(np.array(steps, np.float64), _DIGITS))


def normal(draws: U16) -> F64:
    """Standard normal values."""
    return _normal_table()[draws]


def exponential(draws: U16) -> F64:
    """Exponential values of mean 1."""
    return _exponential_table()[draws]


def lognormal(draws: U16, sigma: float) -> F64:
    """Lognormal values of mean 1."""
    return _lognormal_table(sigma)[draws]


def log_uniform(raw: U64, largest: float) -> F64:
    """Values between 1 and `largest` whose logarithm is uniform; uses the low 32 bits."""
    table = _log_uniform_table(largest)
    step = ((raw >> np.uint64(16)) & np.uint64(0xFFFF)).astype(np.int64)
    between = (raw & np.uint64(0xFFFF)).astype(np.float64) * (1.0 / _STEPS)
    low = table[step]
    return low + (table[step + 1] - low) * between


def zipf(raw: U64, num: int) -> I64:
    """Ranks from 0 to num - 1, rank r about as often as 1 / (r + 1): Zipf's law with exponent 1;
    uses the low 32 bits."""
    return np.minimum(log_uniform(raw, float(num + 1)).astype(np.int64) - 1, num - 1)
