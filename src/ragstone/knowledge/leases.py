"""Leases: which versions of a knowledge base are being read, so that compaction spares them.

    leases/gate          shared by a reader while it chooses its version, exclusive while versions are removed
    leases/12-3f0c…      a lease on version 12: locked for as long as somebody reads it

The locks are the operating system's: one ends with its process, however that ends, and what is left of it is a file that
nobody has locked. In a folder that cannot be written to there are no leases, and so nothing holds a version.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragstone.errors import KnowledgeBaseError

__all__ = ["LEASES_FOLDER", "Lease", "choosing", "leased", "removing"]

LEASES_FOLDER = "leases"
_GATE = "gate"


class Lease:
    """Holds ``version`` of the base in ``folder`` until nobody has this object any more."""

    def __init__(self, folder: Path, version: int) -> None:
        self.version = version
        with contextlib.suppress(OSError):  # such a folder is read without a lease
            path = _leases(folder) / f"{version}-{uuid.uuid4().hex}"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            weakref.finalize(self, _release, path, descriptor, os.getpid())
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self  # a copy of its own would hold nothing


@contextlib.contextmanager
def choosing(folder: Path) -> Iterator[None]:
    """Keep every version that is there from being removed meanwhile: time to open one and take a lease on it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_gate(folder, fcntl.LOCK_SH))
        yield


@contextlib.contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Keep everybody from choosing a version meanwhile: time to see which are leased and remove others."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_gate(folder, fcntl.LOCK_EX))
        except OSError as error:
            raise KnowledgeBaseError(
                f"{folder} cannot be locked ({error}), so no version can be removed; compact it with keep=None"
            ) from error
        yield


def leased(folder: Path) -> set[int]:
    """Return the versions that somebody reads, and delete the leases of the dead. Call it while `removing`."""
    versions = set()
    for path in _leases(folder).glob("[0-9]*-*"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # given back at this moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                versions.add(int(path.name.split("-")[0]))
    return versions


def _leases(folder: Path) -> Path:
    leases = folder / LEASES_FOLDER
    leases.mkdir(exist_ok=True)
    return leases


@contextlib.contextmanager
def _gate(folder: Path, how: int) -> Iterator[None]:
    path = folder / LEASES_FOLDER / _GATE
    try:
        descriptor = os.open(path, os.O_RDONLY)  # this much is allowed in a folder that cannot be written to
    except FileNotFoundError:
        _leases(folder)
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _release(path: Path, descriptor: int, process: int) -> None:
    if process == os.getpid():  # a forked child has a copy of the descriptor, but the lease is its parent's
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)
