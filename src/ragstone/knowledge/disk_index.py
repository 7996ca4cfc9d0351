"""Lance's own approximate index, for bases whose codes would not fit the memory given. What it finds is rescored exactly.

Vectors are sorted into parts by nearness, and each part holds their RaBitQ codes (Gao and Long 2024); a search reads
the parts nearest to the question. The index belongs to a version like everything in the dataset: rows that came since
are compared one by one, and those that went are not found. It is brought up to date with the keyword index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ragstone.knowledge.faults import reading, writing
from ragstone.knowledge.storage import PassageStore

__all__ = ["DiskIndex", "build_disk_index"]

_KIND, _NAME = "IVF_RQ", "dense"
_LEAST_ROWS = 1000  # fewer are compared one by one in no time, and are too few to sort into parts
_LEAST_CACHE = 64 << 20  # with less, every search opens the files anew


class DiskIndex:
    """The index as it stands in the version of ``store``, of which at most ``memory`` bytes, or 64 MB, are held."""

    def __init__(self, store: PassageStore, memory: int) -> None:
        self.version = store.version
        self._path = store.path
        self._column = store.vector_name
        self._dataset = _open(store, memory)
        with reading(self._path):
            found = [i for i in self._dataset.describe_indices() if i.field_names == [self._column]]
        self.exists = bool(found)
        self.parts = _parts(found[0].num_rows_indexed) if found else 1

    @property
    def breadths(self) -> list[int]:
        """How many parts a search may read: the tenth, the fifth, …, all."""
        return sorted({max(1, self.parts * tenths // 10) for tenths in (1, 2, 4, 7, 10)})

    def search(self, questions: np.ndarray, count: int, parts: int, where: str | None = None) -> Sequence[np.ndarray]:
        """Return B arrays of the row ids of about the ``count`` nearest to ``questions`` (B, D), best first."""
        return [self._nearest(question, count, parts, where) for question in questions]

    def _nearest(self, question: np.ndarray, count: int, parts: int, where: str | None) -> np.ndarray:
        nearest = {"column": self._column, "q": question, "k": count, "metric": "dot", "nprobes": parts}
        with reading(self._path, where):
            table = self._dataset.to_table(
                columns=["_rowid"],
                filter=where,
                prefilter=where is not None,
                nearest=nearest,
                disable_scoring_autoprojection=True,
            )
        row_ids: np.ndarray = table["_rowid"].to_numpy()
        return row_ids


def build_disk_index(store: PassageStore, memory: int) -> bool:
    """Commit an index of all vectors in place of the one there is. The caller is the only writer.

    Return whether one was made: not of a few rows, nor of vectors whose width is no multiple of 8.
    """
    count = len(store)
    if count < _LEAST_ROWS or store.width % 8:
        return False
    with writing(store.path):
        options = {"name": _NAME, "metric": "dot", "replace": True, "num_partitions": _parts(count)}
        _open(store, memory).create_index(store.vector_name, _KIND, **options)
    return True


def _parts(rows: int) -> int:
    """Return into how many parts ``rows`` are sorted."""
    return max(1, int(rows**0.5))


def _open(store: PassageStore, memory: int) -> Any:
    import lance

    with reading(store.path):
        return lance.dataset(
            store.path,
            version=store.version,
            index_cache_size_bytes=max(memory, _LEAST_CACHE),
            metadata_cache_size_bytes=_LEAST_CACHE,
        )
