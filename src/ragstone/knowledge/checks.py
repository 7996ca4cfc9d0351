"""What callers give a knowledge base, checked: each returns its argument in the one form that the rest expects."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ragstone.errors import InputError
from ragstone.knowledge.passages import SplitOptions, check_text

__all__ = [
    "check_count",
    "check_ids",
    "check_number",
    "check_questions",
    "check_split",
    "check_vectors",
    "check_version",
    "numbers_differ",
    "unusable",
]

_LARGEST = 1e15  # inner products of larger numbers could overflow float32


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be a whole number of at least 1")
    return count


def check_number(name: str, value: Any) -> float:
    """Return a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool | str):
        raise InputError(f"{name}={value!r} must be a finite number")
    return number


def check_ids(ids: str | Iterable[str]) -> list[str]:
    """Return one id or several as a list."""
    wanted = [ids] if isinstance(ids, str) else _listed("ids", ids)
    for value in wanted:
        if not isinstance(value, str):
            raise InputError(f"a passage id is a string, not {value!r}")
        check_text(f"the passage id {value!r}", value)
    return wanted


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name} must be a string or a list of strings, not {values!r}") from None


def check_questions(questions: str | Iterable[str]) -> list[str]:
    """Return one question or several as a list."""
    texts = [questions] if isinstance(questions, str) else _listed("questions", questions)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"question {place} must be a string, not {text!r}; vectors go into vectors=")
        if not text.strip():
            raise InputError(f"question {place} is empty; ask something")
        check_text(f"question {place}", text)
    return texts


def check_split(split: Any) -> None:
    """Raise InputError unless ``split`` says how documents are split."""
    if not (split is None or isinstance(split, SplitOptions) or split == "same"):
        raise InputError(f"split={split!r} must be a SplitOptions, None (not at all) or 'same' (as the base has it)")


def check_vectors(name: str, vectors: ArrayLike, width: int, count: int | None = None, *, start: int = 0) -> np.ndarray:
    """Return ``vectors``, (D,) or (n, D) of any real dtype, as (n, D) float32; n is ``count`` if that is given.

    An error counts them from ``start``.
    """
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            matrix = np.ascontiguousarray(np.atleast_2d(np.asarray(vectors)), np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be an array of numbers: {error}") from None
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise InputError(
            f"{name} have the shape {np.shape(vectors)}; the base's vectors have width {width}: (n, {width})"
        )
    if count is not None and len(matrix) != count:
        raise numbers_differ(name, len(matrix), count)
    bad = unusable(matrix)
    if bad.any():
        raise InputError(
            f"{name}: number {start + int(np.argmax(bad))} is NaN, infinite or too large; every number must be finite"
        )
    return matrix


def numbers_differ(name: str, vectors: int, texts: int | str) -> InputError:
    """Return what to raise where there are not as many ``vectors`` as ``texts``."""
    return InputError(f"the numbers of {name} ({vectors}) and of texts ({texts}) differ; give one vector for each text")


def check_version(version: Any) -> None:
    """Raise InputError unless ``version`` is the kind of thing that names a version."""
    if not (version is None or isinstance(version, (int, str))) or isinstance(version, bool):
        raise InputError(f"version={version!r} must be a whole number or a tag")


def unusable(matrix: np.ndarray) -> np.ndarray:
    """Return which of the vectors (n, D) are NaN, infinite or too large: (n,) bool."""
    return ~((matrix.min(axis=1) > -_LARGEST) & (matrix.max(axis=1) < _LARGEST))  # of NaN neither is true
