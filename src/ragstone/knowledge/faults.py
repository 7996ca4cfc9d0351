"""What Lance raises becomes one of Ragstone's errors, with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ragstone.errors import InputError, KnowledgeBaseError, RagstoneError
from ragstone.knowledge.ledger import ledger_of
from ragstone.knowledge.manifest import check_there

__all__ = ["first_sentence", "full_disk", "reading", "writing"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAID_OF_FULL = tuple(os.strerror(number) for number in _FULL)


def first_sentence(error: BaseException) -> str:
    """Return what Lance says went wrong, without the places in its source that follow."""
    return str(error).split(", /")[0].removeprefix("Invalid user input: ").strip().rstrip(".")


@contextlib.contextmanager
def reading(path: Path, where: str | None = None) -> Iterator[None]:
    """Turn what Lance raises while reading into a KnowledgeBaseError, or an InputError where ``where`` is at fault."""
    try:
        yield
    except BaseException as error:
        if not _is_lance_failure(error):
            raise
        said = first_sentence(error)
        if where is not None and "Error applying filter" in said:
            raise InputError(f"where={where!r} cannot be evaluated: {said}") from error
        check_there(path.parent)
        if damaged := ledger_of(path).damaged():
            raise KnowledgeBaseError(f"{path} cannot be read: {damaged}") from error
        raise KnowledgeBaseError(
            f"{path} cannot be read ({said}); if files are damaged or missing, open an older version, restore the "
            "folder from a backup or index the documents again"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Commit to the dataset ``path``: what Lance raises becomes a KnowledgeBaseError, what it wrote gets checksums."""
    try:
        yield
    except BaseException as error:
        if not _is_lance_failure(error):
            raise
        said = first_sentence(error)
        if any(full in str(error) for full in _SAID_OF_FULL):
            raise _full(path, said) from error
        raise KnowledgeBaseError(
            f"{path} cannot be written to ({said}); the last version is whole and can still be read"
        ) from error
    with contextlib.suppress(OSError):  # it is committed; the next writer takes up what has no checksum yet
        ledger_of(path).record()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turn what the operating system raises when there is no space left into a KnowledgeBaseError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(folder, error.strerror or str(error)) from error


def _full(path: Path, said: str) -> KnowledgeBaseError:
    return KnowledgeBaseError(
        f"{path} cannot be written to: disk full, there or in {tempfile.gettempdir()} ({said}); make room and run the "
        "same again: the last version is whole and can still be read"
    )


def _is_lance_failure(error: BaseException) -> bool:
    # Lance reports faults as several built-in errors, and a bug in it as a PanicException, which is no Exception.
    if isinstance(error, RagstoneError):
        return False
    return isinstance(error, (OSError, ValueError, RuntimeError, pa.ArrowException)) or (
        type(error).__name__ == "PanicException"
    )
