"""The vectors where Lance wrote them: its data files, memory-mapped, so that rescoring reads them at memory's speed.

Lance stores vectors of 64 numbers or more that are never null as they are, one after the other, page by page. Where a
file's description says so, a vector is read from its place in the file: 20 times as fast as through Lance. Files are
never changed once they are written. What the operating system holds of them it can drop at any time.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["MappedVectors"]

_PLAIN = ("FullZipLayout", "bits_rep: 0", "bits_def: 0", "bits_per_value: 32")
_CHECKED_ROWS = 4


@dataclass(frozen=True)
class _Pages:
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


class MappedVectors:
    """The column ``column`` of vectors of one version of a dataset in the folder ``path``.

    A fragment's file is looked at when one of its rows is first wanted; then some rows are compared with what Lance
    reads. A fragment whose vectors cannot be mapped is left to Lance.
    """

    def __init__(self, path: Path, dataset: Any, column: str, width: int) -> None:
        self._path = path
        self._dataset = dataset
        self._column = column
        self._width = width
        self._field = dataset.lance_schema.field(column).id()
        self._fragments = {fragment.fragment_id: fragment.metadata for fragment in dataset.get_fragments()}
        self._opened: dict[int, _Pages | None] = {}

    def take(self, row_ids: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of the rows ``row_ids`` (n,), which are at ``addresses`` (n,)."""
        fragments = (addresses >> np.uint64(32)).astype(np.int64)
        offsets = (addresses & np.uint64(0xFFFFFFFF)).astype(np.int64)
        vectors = np.empty((len(row_ids), self._width), np.float32)
        unread = np.zeros(len(row_ids), bool)
        for fragment in np.unique(fragments).tolist():
            mine = fragments == fragment
            if fragment not in self._opened:
                self._opened[fragment] = self._open(fragment, row_ids[mine], offsets[mine])
            pages = self._opened[fragment]
            if pages is not None and mine.all():
                return pages.take(offsets)
            if pages is None:
                unread |= mine
            else:
                vectors[mine] = pages.take(offsets[mine])
        if unread.any():
            vectors[unread] = self._read(row_ids[unread])
        return vectors

    def _read(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of ``row_ids`` (n,) as Lance reads them."""
        column = self._dataset._take_rows(row_ids, columns=[self._column])[self._column].combine_chunks()
        vectors: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self._width)
        return vectors

    def _open(self, fragment: int, row_ids: np.ndarray, offsets: np.ndarray) -> _Pages | None:
        """Map a fragment; return None if its file is not as simple as it has to be, or ``row_ids`` read otherwise."""
        metadata = self._fragments[fragment]
        if getattr(metadata, "overlays", None):
            return None
        holding = [file for file in metadata.files if self._field in file.fields]
        if len(holding) != 1:
            return None
        pages = self._map(holding[0], metadata.physical_rows)
        some = slice(_CHECKED_ROWS)
        if pages is None or not np.array_equal(pages.take(offsets[some]), self._read(row_ids[some])):
            return None
        return pages

    def _map(self, file: Any, rows: int) -> _Pages | None:
        from lance.file import LanceFileReader

        path = self._path / "data" / file.path
        try:
            if path.stat().st_size != file.file_size_bytes:  # reading past the end of a file would end the process
                return None
            column = file.column_indices[list(file.fields).index(self._field)]
            described = LanceFileReader(str(path)).metadata().columns[column].pages
            numbers = _map_file(path)
        except (OSError, ValueError):
            return None
        counts, places = [], []
        for page in described:
            encoding = str(page.encoding)
            if len(page.buffers) != 1 or not all(sign in encoding for sign in _PLAIN):
                return None
            position, size = page.buffers[0].position, page.buffers[0].size
            count, rest = divmod(size, 4 * self._width)
            if rest or not count or position % 4 or f"num_items: {count}," not in encoding:
                return None
            counts.append(count)
            places.append(position // 4)
        if sum(counts) != rows:
            return None
        return _Pages(np.cumsum([0, *counts[:-1]]), np.array(places), sliding_window_view(numbers, self._width))


def _map_file(path: Path) -> np.ndarray:
    """Return a file as numbers (n,) of 4 bytes, of which only what is looked at is read."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # or each vector would bring its neighbours from the disk
    return np.frombuffer(mapped, np.float32, len(mapped) // 4)
