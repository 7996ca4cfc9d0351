"""The records of one file: ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet``, one after the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ragstone.errors import DocumentError, InputError
from ragstone.knowledge.formats import MAX_BYTES, check_is_text, encoding_of
from ragstone.knowledge.passages import record_fields

__all__ = ["IN_PIECES", "RECORD_READERS", "Record", "is_bulk", "plain"]

IN_PIECES: dict[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False}
"""How a Parquet file is opened that is not to be held as a whole: of a column a megabyte is read, and nothing kept."""

_SNIFFED_BYTES = 8000  # of the first line


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its line (in Parquet its row, from 1) and its fields, or the ``fault`` that makes it unreadable."""

    line: int
    fields: dict[str, Any]
    fault: str = ""


def _open(path: Path) -> TextIOWrapper:
    # Bytes that are not UTF-8 pass as lone surrogates, so that they spoil one record and not the file.
    with path.open("rb") as file:
        first = file.readline(_SNIFFED_BYTES)
    encoding = encoding_of(first)
    check_is_text(path, first, first.decode(encoding, errors="ignore"))
    return path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="surrogateescape", newline="")


def _lines(path: Path, file: TextIOWrapper) -> Iterator[str]:
    """Yield the lines of ``file``; one that is too long to be held in memory ends it."""
    while line := file.readline(MAX_BYTES):
        if len(line) == MAX_BYTES and not line.endswith("\n"):
            raise DocumentError(f"{path} has a line of more than {MAX_BYTES:,} characters; split its record")
        yield line


def _parse(text: str) -> Any:
    """Parse JSON, with null in place of NaN and the infinities that Python writes but JSON does not have."""
    return json.loads(text, parse_constant=lambda _: None)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for line, text in enumerate(_lines(path, file), 1):
            if not text.strip():
                continue
            try:
                record = _parse(text)
            except (ValueError, RecursionError) as error:
                yield Record(line, {}, f"not JSON: {error}")
                continue
            if isinstance(record, dict):
                yield Record(line, record)
            else:
                yield Record(line, {}, f"a JSON object is needed, not {text.strip()[:40]!r}")


def _read_table(path: Path) -> Iterator[Record]:
    # The reader's limit is one per process, and too low for a long text (131,072 characters).
    csv.field_size_limit(MAX_BYTES)
    with _open(path) as file:
        first = next(_lines(path, file), "")
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        held: list[str] = []  # the lines of the row that is read

        def lines() -> Iterator[str]:
            for line in _lines(path, file):
                held.append(line)
                yield line

        rows = csv.reader(lines(), delimiter=delimiter)
        try:
            header = [name.strip() for name in next(rows, [])]
            _check_columns(path, header)
            held.clear()
            for row in rows:
                if len(held) > 1:
                    _check_closed(held, delimiter)
                line = rows.line_num - len(held) + 1
                held.clear()
                if len(row) > len(header):
                    yield Record(line, {}, f"{len(row)} columns where the header has {len(header)}")
                elif row:
                    cells = {name: cell for name, cell in zip(header, row, strict=False) if cell}
                    yield Record(line, dict.fromkeys(header[: len(row)]) | cells)
        except csv.Error as error:
            line = max(1, rows.line_num - len(held) + 1)  # where the row begins
            raise DocumentError(f"{path} line {line} is no row of a table ({error}); check its quotes") from None


def _check_closed(lines: Sequence[str], delimiter: str) -> None:
    """Raise csv.Error if a quote that is opened in these ``lines`` is never closed: it would take all the rest."""
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, **IN_PIECES) as file:
            # Vectors and blobs are no text and would swell the metadata.
            names = [field.name for field in file.schema_arrow if not is_bulk(pa.types, field.type)]
            _check_columns(path, names)
            batches = file.iter_batches(batch_size=1024, columns=names)
            records = (record for batch in batches for record in batch.to_pylist())
            for row, record in enumerate(records, 1):
                yield Record(row, plain(record))
    except pa.ArrowException as error:
        raise DocumentError(f"{path} is not a readable Parquet file ({error}); write it again") from None


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return ``record`` as JSON can hold it: dates and the like as text, null for NaN."""
    values: dict[str, Any] = _parse(json.dumps(record, default=str))
    return values


def is_bulk(types: Any, kind: Any) -> bool:
    """Return whether columns of the Arrow type ``kind`` hold vectors or blobs; ``types`` is ``pyarrow.types``."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return bool(types.is_floating(kind.value_type))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _check_columns(path: Path, names: list[str]) -> None:
    try:
        record_fields(dict.fromkeys(names, "x"))
    except InputError as error:
        raise DocumentError(f"{path}: {error}; name the column that holds the text") from None


RECORD_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
