"""Files of faiss: the vectors of one, in blocks, and one of exact search by inner product, written in blocks."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ragstone._extras import extra
from ragstone.errors import InputError

__all__ = ["FaissFile", "FlatWriter", "faiss_if_installed"]

# The file of an IndexFlatIP: its name, then D, n, two constants, "is trained", the metric (0: inner product), and the
# number of 4-byte values that follow; little-endian without padding.
_FLAT_HEADER = struct.Struct("<4siqqq?iQ")
_FLAT_NAME, _FLAT_CONSTANT = b"IxFI", 1 << 20
# faiss begins with the function and the line of its source where it noticed.
_PLACE = re.compile(r"^Error in .*? at \S+:\d+: (Error: )?", re.DOTALL)


@dataclass(frozen=True)
class FaissFile:
    """An index that faiss wrote. Its vectors stay on disk where faiss can leave them there.

    Attributes:
        path: the file.
        kind: the class of the index.
        count: n, how many vectors it holds.
        width: how wide they are.
        euclidean: whether it compares by distance; otherwise by inner product.
        graph: whether it is an HNSW graph.
        ids: (n,) the ids it gives its vectors, None where these are 0, 1, 2, ….
    """

    path: Path
    kind: str
    count: int
    width: int
    euclidean: bool
    graph: bool
    ids: np.ndarray | None
    _storage: Any = field(repr=False)
    _owner: Any = field(repr=False)  # keeps the storage alive

    @classmethod
    def open(cls, path: Path) -> FaissFile:
        """Open the index in ``path``.

        faiss reads it in C++ and trusts it further than a reader should: open files of people you trust.

        Raises:
            InputError: there is no such file, it is cut off, or faiss does not know it.
            MissingExtraError: faiss is not installed.
        """
        faiss = extra("import", "faiss", f"{path}: reading a faiss index")
        if not path.is_file():
            raise InputError(f"{path} is not a file; give the file that faiss.write_index wrote")
        try:
            owner = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            said = _PLACE.sub("", str(error)).strip()
            raise InputError(
                f"{path} is damaged, cut off or no faiss index ({said}); fetch or write it again"
            ) from None
        kind, index, ids = type(owner).__name__, owner, None
        if isinstance(owner, faiss.IndexIDMap):  # IndexIDMap2 is one too
            index, ids = faiss.downcast_index(owner.index), faiss.vector_to_array(owner.id_map)
        graph = isinstance(index, faiss.IndexHNSW)
        storage = faiss.downcast_index(index.storage) if graph else index
        # Of others faiss cannot give the vectors back, or ends the process when it is asked to.
        whole = isinstance(storage, faiss.IndexFlat | faiss.IndexScalarQuantizer)
        euclidean = index.metric_type != faiss.METRIC_INNER_PRODUCT
        return cls(
            path, kind, int(index.ntotal), int(index.d), euclidean, graph, ids, storage if whole else None, owner
        )

    def check_vectors(self) -> None:
        """Raise InputError unless `blocks` can give the vectors."""
        if self._storage is None:
            raise InputError(
                f"{self.path} is an {self.kind}, which does not keep whole vectors; give one of the kinds Flat or HNSW, or "
                "the Dataset or Parquet files that it was made from"
            )

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield the vectors in order, (m, width) float32 with m up to ``rows``."""
        self.check_vectors()
        for start in range(0, self.count, rows):
            yield self._storage.reconstruct_n(start, min(rows, self.count - start))


class FlatWriter:
    """Writes a faiss ``IndexFlatIP`` of (count, width) vectors without ever holding more than a block of them."""

    def __init__(self, file: IO[bytes], count: int, width: int) -> None:
        self._file = file
        self._file.write(
            _FLAT_HEADER.pack(_FLAT_NAME, width, count, _FLAT_CONSTANT, _FLAT_CONSTANT, True, 0, count * width)
        )

    def write(self, vectors: np.ndarray) -> None:
        """Append (m, width) vectors."""
        self._file.write(np.ascontiguousarray(vectors, "<f4").data if len(vectors) else b"")


def faiss_if_installed(path: Path) -> FaissFile | None:
    """Open ``path``, or return None where faiss is not installed."""
    with contextlib.suppress(ImportError):
        return FaissFile.open(path)
    return None
