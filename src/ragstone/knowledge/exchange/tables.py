"""Passages with vectors in Arrow: a saved ``datasets.Dataset``, its cache files, or Parquet, one file or many.

The columns are ``title``, ``text`` and ``embeddings``, as in wiki_dpr, with an ``id`` or without; then passages are named
by the number of their row. Without ``embeddings`` they are encoded. Files are read in batches and never whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragstone.errors import InputError
from ragstone.knowledge.checks import unusable
from ragstone.knowledge.exchange.chunks import Chunk, Source, build_chunk
from ragstone.knowledge.exchange.faiss_files import FaissFile, faiss_if_installed
from ragstone.knowledge.records import IN_PIECES, is_bulk, plain

__all__ = ["VECTORS", "table_source", "vector_matrix"]

VECTORS = "embeddings"
_ORIGIN = {"document_id": pa.types.is_string, "source": pa.types.is_string, "page": pa.types.is_integer}
_REMEDY = "write it again"


def table_source(path: Path, kind: str, index: Path | None = None) -> Source:
    """Open ``path``, a folder or file of Arrow (``kind="dataset"``) or Parquet (``kind="parquet"``).

    Args:
        path: where it lies.
        kind: what it is.
        index: the faiss file that belongs to it. Where there are no ``embeddings`` the vectors come from here.
    """
    files = _dataset_files(path) if kind == "dataset" else _parquet_files(path)
    batches = _arrow_batches if kind == "dataset" else _parquet_batches
    schema, count = _describe(files, kind)
    names = [field.name for field in schema if field.name == VECTORS or not is_bulk(pa.types, field.type)]
    bulk = sorted(set(schema.names) - set(names))
    if VECTORS not in names and index is None and bulk:
        raise InputError(
            f"{path} has no column {VECTORS!r}, but {bulk[0]!r}; if it holds the vectors, name it {VECTORS!r}"
        )
    if "text" not in names:
        raise InputError(
            f"{path} has no column 'text', only {', '.join(schema.names)}; name the one that holds the text so"
        )
    flat = None if index is None else _matching(index, path, count, VECTORS not in names)
    width = _width(path, batches, files) if VECTORS in names else None if flat is None else flat.width

    def chunks(rows: int) -> Iterator[Chunk]:
        first = 0
        given = None if VECTORS in names or flat is None else flat.blocks(rows)
        pieces = chain.from_iterable(batches(file, names, rows) for file in files)
        for table in _tables(pieces, rows, path):
            vectors = None if given is None else next(given)
            if VECTORS in names:
                vectors = vector_matrix(table[VECTORS], width, path, first)
            elif vectors is not None and unusable(vectors).any():
                bad = first + int(np.argmax(unusable(vectors)))
                raise InputError(f"{index}: vector {bad} is NaN, infinite or too large; write it again")
            yield _chunk(path, table, first, vectors)
            first += table.num_rows

    return Source(kind, path, count, width, chunks, _notes(index, flat))


def vector_matrix(column: pa.ChunkedArray, width: int | None, path: Path, first: int) -> np.ndarray:
    """Return a column of n lists of floats, whichever kind of list and float, as (n, width) float32.

    Raises:
        InputError: one is missing, has another width, or holds NaN; its row is counted from ``first``.
    """
    parts = []
    for chunk in column.chunks:
        parts.append(_matrix(chunk, width, path, first))
        first += len(chunk)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _matrix(column: Any, width: int | None, path: Path, first: int) -> np.ndarray:
    if column.null_count:
        row = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{path} row {row} has no vector in {VECTORS!r}; fill it or leave the row out")
    if not pa.types.is_fixed_size_list(column.type):
        widths = np.diff(column.offsets.to_numpy())
    else:
        widths = np.full(len(column), column.type.list_size)
    if (widths != width).any():
        place = int(np.argmax(widths != width))
        raise InputError(
            f"{path} row {first + place} has a vector of width {widths[place]}, the first row's has {width}; all vectors "
            "must be of one encoder"
        )
    values = column.flatten()
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused below; a null is NaN
        matrix = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(column), -1)
    bad = unusable(matrix)
    if bad.any():
        raise InputError(
            f"{path} row {first + int(np.argmax(bad))} has a vector that is NaN, infinite or too large; encode it again"
        )
    return matrix


def _chunk(path: Path, table: pa.Table, first: int, vectors: np.ndarray | None) -> Chunk:
    """Turn the rows of ``table`` into passages; columns beyond those of a passage are its metadata."""
    origin = [name for name, fits in _ORIGIN.items() if name in table.column_names and fits(table[name].type)]
    own = [name for name in table.column_names if name not in (VECTORS, *origin)]
    rows = table.select(own).to_pylist()
    if set(own) - {"id", "title", "text"}:
        rows = [_record(row) for row in rows]
    for row in rows:
        row["text"] = row["text"] or ""  # none is an empty one, not a missing column
    return build_chunk(path, rows, first, vectors, table.select(origin).to_pylist() if origin else None)


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` as JSON can hold it; metadata that was written as JSON is read again."""
    if isinstance(row.get("metadata"), str):
        with contextlib.suppress(ValueError):
            row["metadata"] = json.loads(row["metadata"])
    return plain(row)


def _tables(batches: Iterator[pa.RecordBatch], rows: int, path: Path) -> Iterator[pa.Table]:
    """Join and cut ``batches`` into tables of exactly ``rows`` rows; the last may be shorter."""
    held: list[pa.RecordBatch] = []
    size, schema = 0, None
    for batch in batches:
        schema = schema or batch.schema
        if not batch.schema.equals(schema):
            kinds = f"{', '.join(map(str, batch.schema))} after {', '.join(map(str, schema))}"
            raise InputError(f"{path} changes its columns from one file to the next ({kinds}); {_REMEDY} as one table")
        while batch.num_rows:
            piece = batch.slice(0, rows - size)
            batch = batch.slice(piece.num_rows)
            held.append(piece)
            size += piece.num_rows
            if size == rows:
                yield pa.Table.from_batches(held)
                held, size = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _matching(index: Path, path: Path, count: int, needed: bool) -> FaissFile | None:
    """Open the faiss file that belongs to ``path``. Where its vectors are not ``needed`` faiss may be missing."""
    flat = FaissFile.open(index) if needed else faiss_if_installed(index)
    if flat is None:
        return None
    if flat.count != count:
        raise InputError(
            f"{index} holds {flat.count:,} vectors, but {path} has {count:,} rows; give the index that was made of it"
        )
    if needed:
        flat.check_vectors()
        if flat.ids is not None and not np.array_equal(flat.ids, np.arange(count)):
            raise InputError(f"{index} numbers its vectors otherwise than the rows of {path}; save it without ids")
    return flat


def _notes(index: Path | None, flat: FaissFile | None) -> tuple[str, ...]:
    if flat is None or not flat.euclidean:
        return ()
    return (
        f"{index} ranks by Euclidean distance; Ragstone ranks by inner product, as RAG scores passages. The order is the "
        "same where all vectors are equally long.",
    )


# Files


def _dataset_files(path: Path) -> list[Path]:
    """Return the Arrow files of a saved Dataset in their order, or those that lie in a cache folder of `datasets`."""
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.parent.name for each in path.glob("*/state.json")))
        raise InputError(f"{path} holds several Datasets; name the folder of one of them: {splits}")
    state = path / "state.json"
    if not state.is_file():
        files = [file for file in sorted(path.glob("*.arrow")) if not file.name.startswith("cache-")]
        if not files:
            raise InputError(f"{path} is no saved Dataset: it has neither state.json nor .arrow files; give its folder")
        return files
    try:
        names = [Path(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{state} is damaged ({type(error).__name__}: {error}); save the Dataset again") from None
    files = [path / name.name for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise InputError(
            f"{path} lacks {missing or 'all of its data files'}, which its state.json names; fetch it again"
        )
    return files


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .parquet file; give the folder or the file that does")
    return files


def _describe(files: list[Path], kind: str) -> tuple[pa.Schema, int]:
    """Return the columns of the first of ``files`` and how many rows they have together."""
    schema, count = None, 0
    for file in files:
        try:
            if kind == "parquet":
                with pq.ParquetFile(file) as parquet:
                    found, rows = parquet.schema_arrow, parquet.metadata.num_rows
            else:
                with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                    found, rows = stream.schema, sum(batch.num_rows for batch in stream)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(file, kind, error) from None
        if schema is not None and not set(schema.names) <= set(found.names):
            raise InputError(
                f"{file} has the columns {', '.join(found.names)}, unlike {files[0].name}; give files of one table"
            )
        schema, count = schema or found, count + rows
    assert schema is not None
    return schema, count


def _width(path: Path, batches: Callable[..., Iterator[pa.RecordBatch]], files: list[Path]) -> int:
    """Return the width of the first vector."""
    for batch in chain.from_iterable(batches(file, [VECTORS], 1) for file in files):
        if batch.num_rows:
            column = batch.column(0)
            kind = column.type
            lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
            if not any(is_list(kind) for is_list in lists) or not _is_number(kind.value_type):
                raise InputError(f"{path}: the column {VECTORS!r} holds {kind}, not lists of numbers; {_REMEDY}")
            first = column[0].as_py()
            if not first:
                raise InputError(f"{path} row 0 has no vector in {VECTORS!r}; fill it or leave the row out")
            return len(first)
    raise InputError(f"{path} has no rows; there is nothing to import")


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _arrow_batches(file: Path, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            for batch in stream:
                yield batch.select(names)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, "dataset", error) from None


def _parquet_batches(file: Path, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file, **IN_PIECES) as parquet:
            yield from parquet.iter_batches(batch_size=rows, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, "parquet", error) from None


def _damaged(file: Path, kind: str, error: Exception) -> InputError:
    what = "Parquet file" if kind == "parquet" else "Arrow file"
    return InputError(
        f"{file} is damaged, cut off or no {what} ({str(error).splitlines()[0]}); fetch or write it again"
    )
