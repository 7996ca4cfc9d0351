"""Many passages on their way into the store: checked and turned into rows piece by piece, for one commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa

from ragstone.errors import InputError
from ragstone.knowledge.checks import check_vectors
from ragstone.knowledge.encoding import TextEncoder, encode_passages
from ragstone.knowledge.passages import Passage
from ragstone.knowledge.storage import passage_schema, passage_table

__all__ = ["PIECE", "Additions"]

PIECE = 8192
"""How many passages are held, encoded and written at once."""


class Additions:
    """Passages with their vectors, given or made, as a stream of rows.

    Args:
        passages: the passages.
        vectors: (n, D) of any real dtype, perhaps mapped from a file; None: ``encoder`` makes them.
        encoder: loads what makes the vectors; called if ``vectors`` is None.
        width: D.
        places: which of ``vectors`` belong to the passages (n,); by default all, in order.
        check_new: raises an error if one of the ids it gets must not be stored.
    """

    def __init__(
        self,
        passages: Iterable[Passage],
        vectors: np.ndarray | None,
        encoder: Callable[[], TextEncoder],
        width: int,
        *,
        places: np.ndarray | None = None,
        check_new: Callable[[list[str]], None] | None = None,
    ) -> None:
        self.count = 0
        self.error: Exception | None = None
        self._passages = passages
        self._vectors = vectors
        self._encoder = encoder
        self._width = width
        self._places = places
        self._check_new = check_new

    def reader(self) -> pa.RecordBatchReader:
        """Return the rows, which can be read once. What goes wrong ends them and is kept in ``error``."""
        return pa.RecordBatchReader.from_batches(passage_schema(self._width), self._kept())

    def _kept(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches()
        except Exception as error:
            self.error = error  # Lance would make a text of it
            raise

    def _batches(self) -> Iterator[pa.RecordBatch]:
        passages = iter(self._passages)
        while piece := list(islice(passages, PIECE)):
            if self._check_new is not None:
                self._check_new([passage.id for passage in piece])
            start, self.count = self.count, self.count + len(piece)
            yield from passage_table(piece, self._matrix(piece, start)).to_batches()
        if self._vectors is not None and self._places is None and len(self._vectors) > self.count:
            raise self._differ()

    def _matrix(self, piece: list[Passage], start: int) -> np.ndarray:
        """Return the vectors (n, D) of a piece of n passages, before which there were ``start``."""
        if self._vectors is None:
            return encode_passages(self._encoder(), piece)
        part: slice | np.ndarray = slice(start, start + len(piece))
        rows = self._vectors[part] if self._places is None else self._vectors[self._places[part]]
        if len(rows) < len(piece):
            raise self._differ()
        return check_vectors("vectors", rows, self._width, start=start)

    def _differ(self) -> InputError:
        vectors = 0 if self._vectors is None else len(self._vectors)
        how = "at least " if vectors < self.count else ""
        return InputError(f"vectors are {vectors}, but there are {how}{self.count} texts; give one vector for each")
