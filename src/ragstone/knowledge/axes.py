"""The principal axes of a base's vectors: the few directions that carry nearly all of them, so that codes can be short."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Axes", "padded"]

_TAIL = 0.01  # of the vectors may keep less than is asked: what is rare among the passages is to be found too
_SHARE = 0.9  # of the squared length that the others keep
_SHARE_LATER = 0.85  # once passages have come that the axes were not made for
_MULTIPLE = 32  # of numbers, which turbovec is quick with


@dataclass(frozen=True, eq=False)
class Axes:
    """Orthonormal directions, the columns of ``matrix`` (D, A); A is a multiple of 32, filled up with columns of zeros.

    q·d is about the product of both along the axes; the difference is at most what both have beyond them.
    """

    matrix: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Axes:
        """Return as many principal axes as 99 % of vectors like these (n, D) need to keep 90 % of their squared length.

        Three quarters of ``vectors`` give the directions and the others, which those were not made for, the number, so
        few vectors give D of them, and vectors without any structure nearly as many.
        """
        units, width = _units(vectors), vectors.shape[1]
        held_out = np.arange(len(units)) % 4 == 3
        fitted = units[~held_out].astype(np.float64)
        directions = np.linalg.eigh(fitted.T @ fitted)[1][:, ::-1]
        kept = np.cumsum((units[held_out] @ directions) ** 2, axis=1)
        enough = np.quantile(kept, _TAIL, axis=0) >= _SHARE if len(kept) else np.zeros(width, bool)
        count = int(np.argmax(enough)) + 1 if enough.any() else width
        matrix = np.zeros((width, padded(count)), np.float32)
        matrix[:, : min(matrix.shape)] = directions[:, : matrix.shape[1]]
        return cls(matrix)

    @classmethod
    def load(cls, path: Path) -> Axes | None:
        """Read what `save` has written; None if it is not there or holds anything but orthonormal columns."""
        try:
            matrix = np.load(path, allow_pickle=False)
            products = matrix.T @ matrix
            ones = np.rint(np.diagonal(products))
            sound = matrix.dtype == np.float32 and np.allclose(products, np.diag(ones), atol=1e-3) and {*ones} <= {0, 1}
        except (OSError, ValueError, EOFError, TypeError):
            return None
        return cls(matrix) if sound else None

    def save(self, path: Path) -> None:
        """Write them to ``path``."""
        with path.open("wb") as file:
            np.save(file, self.matrix)

    def along(self, vectors: np.ndarray) -> np.ndarray:
        """Return (n, A), how far each of ``vectors`` (n, D) goes along each axis."""
        coordinates: np.ndarray = np.ascontiguousarray(vectors, np.float32) @ self.matrix
        return coordinates

    def suit(self, vectors: np.ndarray) -> bool:
        """Return whether 99 % of ``vectors`` (n, D) keep 85 % of their squared length."""
        kept = (self.along(_units(vectors)) ** 2).sum(axis=1)
        return not len(kept) or bool(np.quantile(kept, _TAIL) >= _SHARE_LATER)


def padded(count: int) -> int:
    """Return how many numbers of a vector are quantised where it takes ``count`` axes: the next multiple of 32."""
    return -(-count // _MULTIPLE) * _MULTIPLE


def _units(vectors: np.ndarray) -> np.ndarray:
    """Return those of ``vectors`` (n, D) that have a length, as (m, D) of length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: np.ndarray = (vectors / np.where(lengths > 0, lengths, 1))[lengths[:, 0] > 0]
    return units
