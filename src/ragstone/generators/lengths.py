"""Contexts of like lengths are read together: every padded token costs like a real one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["rows_at_a_time"]

_TOKENS_AT_A_TIME, _MANY_TOKENS = {"cpu": 1024}, 2**15
"""Tokens of context that a device needs at a time to work at its best rate."""


def rows_at_a_time(lengths: Sequence[int], device: str) -> list[int]:
    """How many of the rows, sorted by length, make each part: as many parts as hold enough tokens to keep a device busy.

    >>> rows_at_a_time([200] * 6 + [400] * 3 + [500], "cpu")
    [6, 3, 1]
    """
    sizes, rows = [], 0
    for length in lengths:
        rows += 1
        if rows * length >= _TOKENS_AT_A_TIME.get(device, _MANY_TOKENS):
            sizes.append(rows)
            rows = 0
    return [*sizes, rows] if rows else sizes
