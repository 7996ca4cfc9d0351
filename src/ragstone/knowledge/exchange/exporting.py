"""Knowledge bases into files that other tools read: Parquet, faiss and JSON lines, in batches, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragstone.errors import InputError
from ragstone.knowledge.exchange.faiss_files import FlatWriter
from ragstone.knowledge.exchange.tables import VECTORS
from ragstone.knowledge.indexing import Progress
from ragstone.knowledge.storage import PASSAGE_COLUMNS, PassageStore

__all__ = ["EXPORT_FORMATS", "ExportFormat", "ExportReport", "export_passages", "ids_file"]

ExportFormat = Literal["parquet", "faiss", "jsonl"]
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)
_DICTIONARY = ["title", "document_id", "source"]  # columns whose values repeat


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        files: the files.
        format: one of `EXPORT_FORMATS`.
        passages: N, how many passages they hold.
        width: D, of the vectors; None where they hold none.
        bytes: their size together.
        seconds: how long it took.
    """

    files: tuple[str, ...]
    format: str
    passages: int
    width: int | None
    bytes: int
    seconds: float


def export_passages(
    store: PassageStore, path: str | Path, format: str | None = None, *, progress: Progress | None = None
) -> ExportReport:
    """Write the passages of ``store`` to the new file ``path``; see `KnowledgeBase.export`."""
    started = time.monotonic()
    place = Path(path).expanduser()
    kind = format or place.suffix.removeprefix(".")
    if kind not in EXPORT_FORMATS:
        raise InputError(
            f"{place} does not say its format; end it in .{', .'.join(EXPORT_FORMATS)}, or give format= (--format)"
        )
    files = (place, ids_file(place)) if kind == "faiss" else (place,)
    taken = next((file for file in files if file.exists()), None)
    if taken is not None:
        raise InputError(f"{taken} exists already; give another name, or remove it")
    count = len(store)
    tell = progress or (lambda done, total, unit: None)

    def step(done: int) -> None:
        tell(done, count, "passages")

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        {"parquet": _write_parquet, "faiss": _write_faiss, "jsonl": _write_jsonl}[kind](store, place, step)
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise InputError(
            f"{place} cannot be written: {error.strerror or error}; free some space, or name another"
        ) from error
    width = None if kind == "jsonl" else store.width
    return ExportReport(tuple(map(str, files)), kind, count, width, size, time.monotonic() - started)


def ids_file(path: Path) -> Path:
    """Return where the ids of the vectors in the faiss file ``path`` are: a JSON list in their order."""
    return path.with_name(f"{path.name}.ids.json")


def _write_parquet(store: PassageStore, path: Path, step: Callable[[int], None]) -> None:
    """One file in the form of wiki_dpr: ``id``, ``title``, ``text``, ``embeddings``, and what else a passage has."""
    text = pa.string()
    fields = {"id": text, "title": text, "text": text, VECTORS: pa.list_(pa.float32()), "document_id": text}
    schema = pa.schema({**fields, "source": text, "page": pa.int32(), "metadata": text})
    done = 0
    with _new_file(path) as file, pq.ParquetWriter(file, schema, use_dictionary=_DICTIONARY) as writer:
        for batch in store.batches(PASSAGE_COLUMNS, vectors=True):
            columns = {name: _plain(batch.column(name)) for name in PASSAGE_COLUMNS}
            columns[VECTORS] = _lists(batch.column("vector"))
            writer.write_batch(pa.record_batch([columns[name] for name in schema.names], schema=schema))
            done += batch.num_rows
            step(done)


def _write_faiss(store: PassageStore, path: Path, step: Callable[[int], None]) -> None:
    """An IndexFlatIP, and the ids of its vectors beside it, both from one pass."""
    done = 0
    with _new_file(ids_file(path)) as ids, _new_file(path) as file:
        writer = FlatWriter(file, len(store), store.width)
        ids.write(b"[")
        for batch in store.batches(["id"], vectors=True):
            writer.write(_matrix(batch.column("vector")))
            names = json.dumps(batch.column("id").to_pylist(), ensure_ascii=False)[1:-1]
            ids.write((",\n" if done else "").encode() + names.encode())
            done += batch.num_rows
            step(done)
        ids.write(b"]\n")


def _write_jsonl(store: PassageStore, path: Path, step: Callable[[int], None]) -> None:
    """One passage a line, without its vector, as `index` reads it."""
    done = 0
    with _new_file(path) as file:
        for batch in store.batches(PASSAGE_COLUMNS):
            for row in batch.to_pylist():
                row["metadata"] = json.loads(row["metadata"] or "{}")
                kept = {name: value for name, value in row.items() if value not in (None, {})}
                file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            done += batch.num_rows
            step(done)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there once it is whole, and not before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(column: Any) -> Any:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _matrix(column: Any) -> np.ndarray:
    matrix: np.ndarray = column.flatten().to_numpy().reshape(len(column), -1)
    return matrix


def _lists(column: Any) -> pa.ListArray:
    """Return a column of fixed-size lists as lists, the form that `datasets` makes of arrays."""
    width = column.type.list_size
    return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1, dtype=np.int32) * width), column.flatten())
