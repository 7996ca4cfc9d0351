"""Many passages on their way into the store: checked and turned into rows piece by piece, for one commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge.checks import check_vectors, numbers_differ
from ragstone.knowledge.encoding import TextEncoder, encode_passages
from ragstone.knowledge.passages import Passage
from ragstone.knowledge.storage import PassageStore, passage_schema, passage_table

__all__ = ["PIECE", "store_many"]

PIECE = 2048
"""How many passages are held, encoded and written at once."""


def store_many(
    store: PassageStore,
    passages: Iterable[Passage],
    vectors: ArrayLike | None,
    load_encoder: Callable[[], TextEncoder],
    *,
    replacing: bool,
) -> int:
    """Commit ``passages`` with their ``vectors`` (n, D), or with those of the encoder; return how many there are.

    Without ``replacing`` only their ids are held, of which none may be in use or come twice. With it, the passages are
    held, and of equal ids the last counts. Vectors in an array, perhaps mapped from a file, are not copied as a whole.
    """
    width = store.width
    if vectors is not None and not (isinstance(vectors, np.ndarray) and vectors.shape[1:] == (width,)):
        vectors = check_vectors("vectors", vectors, width)
    if not replacing:
        rows = _Rows(store, passages, vectors, load_encoder)
        return _commit(rows, store.append)
    held = [*passages]
    if vectors is not None and len(vectors) != len(held):
        raise numbers_differ("vectors", len(vectors), len(held))
    last = {passage.id: place for place, passage in enumerate(held)}
    places = np.fromiter(last.values(), np.int64, len(last))
    rows = _Rows(store, (held[place] for place in places), vectors, load_encoder, places)
    return _commit(rows, store.merge if store.find(last) else store.append)


def _commit(rows: _Rows, write: Callable[[pa.RecordBatchReader], None]) -> int:
    try:
        write(pa.RecordBatchReader.from_batches(passage_schema(rows.store.width), rows.batches()))
    except KnowledgeBaseError:
        if rows.error is not None:
            raise rows.error from None
        raise
    return rows.count


@dataclass
class _Rows:
    """Passages as a stream of rows. ``places`` says which of the vectors are theirs; None: all, and all ids are new."""

    store: PassageStore
    passages: Iterable[Passage]
    vectors: np.ndarray | None
    load_encoder: Callable[[], TextEncoder]
    places: np.ndarray | None = None
    count: int = 0
    error: Exception | None = None  # what went wrong, of which Lance would make a text
    _seen: set[str] = field(default_factory=set)

    def batches(self) -> Iterator[pa.RecordBatch]:
        passages = iter(self.passages)
        try:
            while piece := list(islice(passages, PIECE)):
                if self.places is None:
                    self._check_new(piece)
                start, self.count = self.count, self.count + len(piece)
                yield from passage_table(piece, self._matrix(piece, start)).to_batches()
            if self.vectors is not None and self.places is None and len(self.vectors) > self.count:
                raise numbers_differ("vectors", len(self.vectors), self.count)
        except Exception as error:
            self.error = error
            raise

    def _check_new(self, piece: list[Passage]) -> None:
        folder = self.store.path.parent
        for passage in piece:
            if passage.id in self._seen:
                raise InputError(f"the id {passage.id!r} is given twice; give each passage its own, or use upsert")
            self._seen.add(passage.id)
        if stored := self.store.find(passage.id for passage in piece):
            raise InputError(f"{folder} has a passage with the id {min(stored)!r}; use upsert to replace it")

    def _matrix(self, piece: list[Passage], start: int) -> np.ndarray:
        """Return the vectors (n, D) of a piece of n passages, before which there were ``start``."""
        if self.vectors is None:
            return encode_passages(self.load_encoder(), piece)
        part = slice(start, start + len(piece))
        rows = self.vectors[part if self.places is None else self.places[part]]
        if len(rows) < len(piece):
            raise numbers_differ("vectors", len(self.vectors), f"at least {self.count}")
        return check_vectors("vectors", rows, self.store.width, start=start)
