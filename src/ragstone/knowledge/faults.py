"""What Lance raises becomes one of Ragstone's errors, with a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ragstone.errors import InputError, KnowledgeBaseError, RagstoneError

__all__ = ["first_sentence", "reading", "writing"]


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
        raise KnowledgeBaseError(
            f"{path} cannot be read ({said}); if files are damaged or missing, open an older version, restore the "
            "folder from a backup or index the documents again"
        ) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what Lance raises while writing into a KnowledgeBaseError."""
    try:
        yield
    except BaseException as error:
        if not _is_lance_failure(error):
            raise
        raise KnowledgeBaseError(
            f"{path} cannot be written to ({first_sentence(error)}); the last version is whole and can still be read"
        ) from error


def _is_lance_failure(error: BaseException) -> bool:
    # Lance reports faults as several built-in errors, and a bug in it as a PanicException, which is no Exception.
    if isinstance(error, RagstoneError):
        return False
    return isinstance(error, (OSError, ValueError, RuntimeError, pa.ArrowException)) or (
        type(error).__name__ == "PanicException"
    )
