"""Every passage encoded anew: the vectors are put aside chunk by chunk, and put in place in one commit.

What is put aside is named by row id and by the version that last wrote the row. So a run that goes on after another
uses of it what still fits, whatever was added, changed or deleted in between.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.faults import reading, writing
from ragstone.knowledge.indexing import Progress
from ragstone.knowledge.ledger import VersionGuard, ledger_of
from ragstone.knowledge.manifest import SAME_VECTORS, STAGING_FOLDER
from ragstone.knowledge.passages import Passage
from ragstone.knowledge.storage import PassageStore, vector_column
from ragstone.knowledge.workers import Workers, encode_chunks

__all__ = ["reencode_passages"]

_BLOCK_ROWS = 8192
_KEY = "ragstone:vectors"


def reencode_passages(
    store: PassageStore,
    encoder: TextEncoder,
    *,
    chunk: int,
    workers: Workers,
    resume: bool,
    progress: Progress | None,
) -> None:
    """Replace the vectors of ``store`` by those of ``encoder``; see `KnowledgeBase.reencode`.

    What was put aside is left for the caller to delete.
    """
    progress = progress or (lambda done, total, unit: None)
    staging = _Staging(store.path.with_name(STAGING_FOLDER), encoder, resume)
    row_ids, stamps = store.row_stamps()
    missing = staging.lacks(row_ids, stamps)
    total, done = len(row_ids), len(row_ids) - len(missing)
    progress(done, total, "passages")

    def encoded(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "passages")

    def passages(places: np.ndarray) -> list[Passage]:
        rows = store.fetch(row_ids[places], ["id", "title", "text"]).to_pylist()
        return [Passage(**row) for row in rows]

    chunks = (missing[start : start + chunk] for start in range(0, len(missing), chunk))
    with encode_chunks(chunks, passages, lambda: encoder, workers=workers, encoded=encoded) as made:
        for places, vectors in made:
            staging.append(row_ids[places], stamps[places], vectors)
    order = store.scan([])["_rowid"].to_numpy()
    store.replace_vectors(staging.blocks(order), encoder.width, encoder.spec.to_dict())


class _Staging:
    """The vectors that were made so far: a Lance dataset of its own, one commit a chunk."""

    def __init__(self, path: Path, encoder: TextEncoder, resume: bool) -> None:
        import lance

        self._path = path
        spec = encoder.spec.to_dict()
        key = json.dumps({name: spec.get(name) for name in SAME_VECTORS})
        if resume and path.exists():
            try:
                ledger_of(path).verify_manifest(None)
                self._dataset = lance.dataset(path)
                VersionGuard(path).check(self._dataset)
                if (self._dataset.schema.metadata or {}).get(_KEY.encode()) == key.encode():
                    return
            except Exception:  # killed while it was made, or damaged: then it is made anew
                pass
        shutil.rmtree(path, ignore_errors=True)
        schema = pa.schema(
            [("row_id", pa.uint64()), ("stamp", pa.uint64()), ("vector", pa.list_(pa.float32(), encoder.width))],
            metadata={_KEY: key},
        )
        with writing(path):
            self._dataset = lance.write_dataset(schema.empty_table(), path, mode="create")

    def append(self, row_ids: np.ndarray, stamps: np.ndarray, vectors: np.ndarray) -> None:
        """Commit the vectors (n, D) of the rows ``row_ids`` (n,), as the versions ``stamps`` (n,) wrote them."""
        columns: list[Any] = [pa.array(row_ids), pa.array(stamps), vector_column(vectors)]
        with writing(self._path):
            self._dataset.insert(pa.table(columns, schema=self._dataset.schema))

    def lacks(self, row_ids: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Return the places (m,) of those of the rows ``row_ids`` (n,) whose vectors are not here."""
        held, held_stamps, _ = self._newest()
        _, here, there = np.intersect1d(row_ids, held, assume_unique=True, return_indices=True)
        return np.delete(np.arange(len(row_ids)), here[stamps[here] == held_stamps[there]])

    def blocks(self, row_ids: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the vectors of the rows ``row_ids`` (n,) in that order, in blocks (m, D)."""
        held, _, places = self._newest()
        for start in range(0, len(row_ids), _BLOCK_ROWS):
            wanted = row_ids[start : start + _BLOCK_ROWS]
            found = np.searchsorted(held, wanted)
            if not np.array_equal(held[np.minimum(found, len(held) - 1)], wanted):
                raise KnowledgeBaseError(f"{self._path} lacks vectors that were put there; re-encode with resume=False")
            column = self._dataset.take(places[found], columns=["vector"])["vector"].combine_chunks()
            yield column.flatten().to_numpy().reshape(len(wanted), -1)

    def _newest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sorted row ids (n,), each once, their newest stamps (n,) and the places (n,) of their vectors."""
        with reading(self._path):
            table = self._dataset.to_table(columns=["row_id", "stamp"])
        row_ids, stamps = table["row_id"].to_numpy(), table["stamp"].to_numpy()
        unique, last = np.unique(row_ids[::-1], return_index=True)
        places = len(row_ids) - 1 - last
        return unique, stamps[places], places
