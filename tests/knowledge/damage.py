"""Faults put into files for real."""

from __future__ import annotations

import os
from pathlib import Path

HOWS = ("missing", "empty", "cut", "flipped", "flipped in secret")
"""Ways to damage a file; in secret: its time of last change is as it was."""


def damage(path: Path, how: str, place: float = 0.5) -> None:
    """Damage a file; ``place`` is where it is cut or a bit of it is flipped, as a share of its length."""
    content, times = path.read_bytes(), path.stat()
    at = min(int(place * len(content)), len(content) - 1)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:at])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        if how == "flipped in secret":
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
