"""How much memory search structures may use: "2GB" and the like, and what a machine has."""

from __future__ import annotations

import os
import re

from ragstone.errors import InputError

__all__ = ["default_memory", "parse_memory"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_AMOUNT = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?I?)B?\s*", re.IGNORECASE)
_UNKNOWN_MACHINE = 4 << 30


def parse_memory(value: int | str | None) -> int:
    """Return a number of bytes: ``value`` itself, what text such as "2GB", "500 MB" or "1.5GiB" says, or the default.

    >>> parse_memory("2GB"), parse_memory("1.5 GiB"), parse_memory(1000)
    (2000000000, 1610612736, 1000)
    """
    if value is None:
        return default_memory()
    amount = -1
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value)
        if match is not None and match["unit"].upper() in _UNITS:
            amount = int(float(match["number"]) * _UNITS[match["unit"].upper()])
    elif isinstance(value, int) and not isinstance(value, bool):
        amount = value
    if amount < 1:
        raise InputError(f"memory={value!r} is no amount of memory; write a number of bytes, or text such as '2GB'")
    return amount


def default_memory() -> int:
    """Return half of the machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_MACHINE
