"""Vectors and texts where Lance wrote them: its data files, memory-mapped, so that they are read at memory's speed.

Lance stores vectors of 64 numbers or more that are never null as they are, one after the other, page by page; strings
that are kept apart and not compressed have their length before them, and a page's table says where each begins. Where a
file's description says so, a value is read from its place in the file, many times as fast as through Lance. Files are
never changed once they are written. What the operating system holds of them it can drop at any time.
"""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["APART", "DataFiles", "MappedTexts", "MappedVectors"]

APART = {"lance-encoding:structural-encoding": "fullzip", "lance-encoding:compression": "none"}
"""Metadata of a column of strings, by which it can be mapped (but for a column of few different ones)."""

_PLAIN = ("FullZipLayout", "bits_rep:0,", "bits_def:0,")
_PLAIN_VECTORS = (*_PLAIN, "bits_per_value:32,")
_PLAIN_TEXTS = (*_PLAIN, "compression:Some(Variable(", "values:None", "BitsPerOffset(32,)")
_CHECKED_ROWS = 4
_LENGTH_BYTES = 4
_TABLE_SIZES = (1, 2, 4, 8)  # bytes of a number; as many as the page's largest needs


@dataclass(frozen=True)
class _VectorPages:
    """The vectors of one fragment: the first row of each page (p,), where that lies in its file, and the file's numbers.

    Places are counted in numbers of 4 bytes, and ``windows`` (n, D) has the D numbers from each place on.
    """

    starts: np.ndarray
    places: np.ndarray
    windows: np.ndarray

    def take(self, offsets: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of the rows ``offsets`` (n,) of the fragment."""
        pages = np.searchsorted(self.starts, offsets, side="right") - 1
        taken: np.ndarray = self.windows[self.places[pages] + (offsets - self.starts[pages]) * self.windows.shape[1]]
        return taken


@dataclass(frozen=True)
class _TextPages:
    """The texts of one fragment: the first row of each page (p,), where it begins, its table, and the file's bytes.

    A table (n + 1,) says where, counted from the page's begin, each of its n texts begins, and where the last ends.
    """

    starts: np.ndarray
    places: np.ndarray
    tables: list[np.ndarray]
    bytes: np.ndarray

    def take(self, offsets: np.ndarray) -> np.ndarray:
        """Return the texts (n,) of the rows ``offsets`` (n,) of the fragment."""
        pages = np.searchsorted(self.starts, offsets, side="right") - 1
        entries = offsets - self.starts[pages]
        begins, ends = np.empty((2, len(offsets)), np.int64)
        for page in np.unique(pages).tolist():
            mine = pages == page
            begins[mine] = self.places[page] + self.tables[page][entries[mine]] + _LENGTH_BYTES
            ends[mine] = self.places[page] + self.tables[page][entries[mine] + 1]
        before = begins[:, None] - np.arange(_LENGTH_BYTES, 0, -1)
        if (
            max(begins.max(), ends.max()) > len(self.bytes)
            or (self.bytes[before].view("<u4")[:, 0] != ends - begins).any()
        ):
            raise ValueError("the lengths of texts in a data file are not those in its tables")
        content = self.bytes.data
        bounds = zip(begins.tolist(), ends.tolist(), strict=True)
        return _as_objects([str(content[begin:end], "utf-8") for begin, end in bounds])


class DataFiles:
    """The data files of one version of a ``dataset`` in the folder ``path``, each looked at once for all columns."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.dataset = dataset
        self.fragments = {fragment.fragment_id: fragment.metadata for fragment in dataset.get_fragments()}
        self._path = path
        self._opened: dict[str, tuple[Any, mmap.mmap] | None] = {}

    def open(self, file: Any) -> tuple[Any, mmap.mmap] | None:
        """Return how a file describes its columns, and the file, of which only what is looked at is read.

        None if it is not as long as it was written: reading past its end would end the process.
        """
        if file.path not in self._opened:
            self._opened[file.path] = self._map(self._path / "data" / file.path, file.file_size_bytes)
        return self._opened[file.path]

    @staticmethod
    def _map(path: Path, size: int) -> tuple[Any, mmap.mmap] | None:
        from lance.file import LanceFileReader

        if path.stat().st_size != size:
            return None
        columns = LanceFileReader(str(path)).metadata().columns
        with path.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # or each value would bring its neighbours from the disk
        return columns, mapped


class _MappedColumn(ABC):
    """The column ``column`` of one version of a dataset.

    A fragment's file is looked at when one of its rows is first wanted; then some rows are compared with what Lance
    reads. A fragment whose values cannot be mapped is left to Lance.
    """

    def __init__(self, files: DataFiles, column: str) -> None:
        self._files = files
        self._column = column
        self._field = files.dataset.lance_schema.field(column).id()
        self._opened: dict[int, Any] = {}

    def take(self, row_ids: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Return the values (n, …) of the rows ``row_ids`` (n,), which are at ``addresses`` (n,)."""
        fragments = (addresses >> np.uint64(32)).astype(np.int64)
        offsets = (addresses & np.uint64(0xFFFFFFFF)).astype(np.int64)
        values = self._empty(len(row_ids))
        unread = np.zeros(len(row_ids), bool)
        for fragment in np.unique(fragments).tolist():
            mine = fragments == fragment
            if fragment not in self._opened:
                self._opened[fragment] = self._open(fragment, row_ids[mine], offsets[mine])
            pages = self._opened[fragment]
            if pages is not None and mine.all():
                taken: np.ndarray = pages.take(offsets)
                return taken
            if pages is None:
                unread |= mine
            else:
                values[mine] = pages.take(offsets[mine])
        if unread.any():
            values[unread] = self._read(row_ids[unread])
        return values

    def _read(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the values (n, …) of ``row_ids`` (n,) as Lance reads them."""
        return self._values(self._files.dataset._take_rows(row_ids, columns=[self._column]))

    def _open(self, fragment: int, row_ids: np.ndarray, offsets: np.ndarray) -> Any:
        """Map a fragment; return None if its file is not as simple as it has to be, or ``row_ids`` read otherwise."""
        metadata = self._files.fragments[fragment]
        if getattr(metadata, "overlays", None):
            return None
        holding = [file for file in metadata.files if self._field in file.fields]
        if len(holding) != 1:
            return None
        with contextlib.suppress(OSError, ValueError):
            pages = self._map(holding[0], metadata.physical_rows)
            some = slice(_CHECKED_ROWS)
            if pages is not None and np.array_equal(pages.take(offsets[some]), self._read(row_ids[some])):
                return pages
        return None

    def _map(self, file: Any, rows: int) -> Any:
        opened = self._files.open(file)
        if opened is None:
            return None
        columns, mapped = opened
        described = columns[file.column_indices[list(file.fields).index(self._field)]].pages
        found = [self._place("".join(str(page.encoding).split()), page.buffers) for page in described]
        if None in found or sum(place[0] for place in found if place) != rows:
            return None
        return self._pages(mapped, np.array(found).T)

    @abstractmethod
    def _empty(self, count: int) -> np.ndarray:
        """Return room for ``count`` values."""

    @abstractmethod
    def _values(self, table: Any) -> np.ndarray:
        """Return the values (n, …) of the column in a ``table`` of n rows that Lance read."""

    @abstractmethod
    def _place(self, encoding: str, buffers: Any) -> tuple[int, ...] | None:
        """Return how many values a page has, and where they are; None if they are not there as they are."""

    @abstractmethod
    def _pages(self, file: mmap.mmap, places: np.ndarray) -> Any:
        """Return the p pages of ``file`` that are at ``places`` (m, p), of each what `_place` says."""


class MappedVectors(_MappedColumn):
    """A column of vectors of ``width`` numbers: values are (n, D)."""

    def __init__(self, files: DataFiles, column: str, width: int) -> None:
        super().__init__(files, column)
        self._width = width

    def _empty(self, count: int) -> np.ndarray:
        return np.empty((count, self._width), np.float32)

    def _values(self, table: Any) -> np.ndarray:
        vectors: np.ndarray = table[self._column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return vectors.reshape(-1, self._width)

    def _place(self, encoding: str, buffers: Any) -> tuple[int, ...] | None:
        if len(buffers) != 1 or not all(sign in encoding for sign in _PLAIN_VECTORS):
            return None
        count, rest = divmod(buffers[0].size, 4 * self._width)
        if rest or not count or buffers[0].position % 4 or f"num_items:{count}," not in encoding:
            return None
        return count, buffers[0].position // 4

    def _pages(self, file: mmap.mmap, places: np.ndarray) -> Any:
        numbers = np.frombuffer(file, np.float32, len(file) // 4)
        return _VectorPages(_starts(places[0]), places[1], sliding_window_view(numbers, self._width))


class MappedTexts(_MappedColumn):
    """A column of strings: values are (n,)."""

    def _empty(self, count: int) -> np.ndarray:
        return np.empty(count, object)

    def _values(self, table: Any) -> np.ndarray:
        return _as_objects(table[self._column].to_pylist())

    def _place(self, encoding: str, buffers: Any) -> tuple[int, ...] | None:
        if len(buffers) != 2 or not all(sign in encoding for sign in _PLAIN_TEXTS):
            return None
        count = int(encoding.split("num_items:")[1].split(",")[0])
        size, rest = divmod(buffers[1].size, count + 1)
        if rest or size not in _TABLE_SIZES:
            return None
        return count, buffers[0].position, buffers[1].position, size

    def _pages(self, file: mmap.mmap, places: np.ndarray) -> Any:
        tables = [np.frombuffer(file, f"<u{size}", count + 1, place) for count, _, place, size in places.T.tolist()]
        return _TextPages(_starts(places[0]), places[1], tables, np.frombuffer(file, np.uint8))


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return the first rows (p,) of pages of ``counts`` (p,) rows."""
    starts: np.ndarray = np.cumsum(counts) - counts
    return starts


def _as_objects(texts: list[str]) -> np.ndarray:
    """Return ``texts`` as an array (n,) that holds them."""
    objects = np.empty(len(texts), object)
    objects[:] = texts
    return objects
