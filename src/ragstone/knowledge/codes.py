"""Quantised vectors: 4 or 2 bits a number, searched by turbovec. What they find is rescored exactly (search.py).

What is quantised is how far each vector goes along the principal axes of all of them (axes.py). The codes are named by
row id. Their file is a cache: it is used only if its name says that it belongs to this base and its checksum, taken with
that of the axes, is right; then the rows that differ between its version and this one are patched in.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge.axes import Axes, padded
from ragstone.knowledge.storage import PassageStore

__all__ = ["AXES_FILE", "BITS", "Codes", "code_faults", "codes_bytes", "current_codes", "drop_stale_files", "move_file"]

BITS = (4, 2)
"""Of a number; the less where the more would not fit."""

AXES_FILE = "axes.npy"

_ROW_BYTES = 80  # the length of the vector, its row id and where it lies, in turbovec and here
_SAMPLE_ROWS = 4096  # the axes are made from
_CALIBRATION_ROWS = 1024
_REBUILD_SHARE = 0.25  # of the rows differ: patching would cost more, and the calibration would no longer fit
_SAVE_SHARE = 0.02  # of the rows differ from the file: worth writing it anew
_BLOCK_ROWS = 16_384
_AGREEMENT_ROWS = 64
_AGREEMENT = 0.25  # of |q| · |d|: the codes' error is far below, the product of other vectors far above
_STALE_SECONDS = 3600
_FILE_NAME = re.compile(r"codes-(?P<base>[0-9a-f]+)-(?P<version>\d+)-(?P<checksum>[0-9a-f]{8})(?P<coarse>-2bit)?\.tvim")


@dataclass
class Codes:
    """The codes of every vector of one version.

    Attributes:
        index: turbovec's index, ids being row ids.
        axes: along which the vectors were quantised.
        row_ids: those ids, sorted (N,).
        stamps: the versions that last wrote those rows (N,). The same id with the same stamp has the same vector.
        version: the version they show.
        unsaved: how many rows differ from the file; None if there is no file.
    """

    index: Any
    axes: Axes
    row_ids: np.ndarray
    stamps: np.ndarray
    version: int
    unsaved: int | None = None

    @property
    def bits(self) -> int:
        """Of a number."""
        return int(self.index.bit_width)

    def search(self, questions: np.ndarray, count: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """Return the row ids (B, n), n <= ``count``, of about the nearest to ``questions`` (B, D), best first."""
        if not len(self.row_ids if allowed is None else allowed):
            return np.empty((len(questions), 0), np.uint64)
        # No matmul: BLAS's threads would go on waiting for more, on the cores that the search needs.
        coordinates = np.einsum("nd,da->na", questions.astype(np.float32), self.axes.matrix)
        found: np.ndarray = self.index.search(coordinates, min(count, len(self.row_ids)), allowlist=allowed)[1]
        return found


def codes_bytes(count: int, width: int, bits: int = 4) -> int:
    """Return about how much memory codes of ``count`` times ``width`` numbers take, row ids included.

    With the width of the vectors that is the most: where fewer axes do, there are fewer numbers.
    """
    return count * (padded(width) * bits // 8 + _ROW_BYTES)


def current_codes(folder: Path, base_id: str, store: PassageStore, held: Codes | None, bits: int) -> Codes:
    """Return the codes of the version of ``store``: those ``held``, or the file's, brought up to date, or new ones."""
    if held is not None and held.bits != bits:
        held = None
    if held is not None and held.version == store.version:
        return held
    codes = held or _load(folder, base_id, store, bits)
    if codes is None or not _patch(codes, store):
        codes = _build(store, bits, codes.axes if codes else Axes.load(folder / AXES_FILE))
    if codes.unsaved is None or codes.unsaved > _SAVE_SHARE * len(codes.row_ids):
        with contextlib.suppress(OSError):  # a folder that cannot be written to has no cache
            _save(codes, folder, base_id)
    return codes


def code_faults(folder: Path, store: PassageStore) -> Iterator[tuple[Path, str]]:
    """Yield the code files that are damaged, and those that do not agree with the vectors of ``store``, with why."""
    from turbovec import IdMapIndex

    axes = Axes.load(folder / AXES_FILE)
    for path in sorted(folder.glob("codes-*.tvim")):
        name = _FILE_NAME.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another process has replaced it
            if name is None or axes is None or _checksum(path, axes) != name["checksum"]:
                yield path, f"is damaged: its checksum, taken with {AXES_FILE}, is not the one in its name"
            elif int(name["version"]) == store.version and not _agree(IdMapIndex.load(str(path)), axes, store):
                yield path, "does not agree with the vectors"


def _agree(index: Any, axes: Axes, store: PassageStore) -> bool:
    """Return whether the inner products by codes are about those of the vectors, in a sample."""
    row_ids = store.row_ids()
    sample, vectors = _sample(store, row_ids, _AGREEMENT_ROWS)
    if len(index) != len(row_ids) or not len(sample):
        return len(index) == len(row_ids)
    try:
        scores, found = index.search(axes.along(vectors), len(sample), allowlist=sample)
    except (KeyError, ValueError, RuntimeError):  # it lacks some of them
        return False
    exact = np.take_along_axis(vectors @ vectors.T, np.searchsorted(sample, found), axis=1)
    lengths = np.linalg.norm(vectors, axis=1)
    bounds = _AGREEMENT * lengths[:, None] * lengths[np.searchsorted(sample, found)]
    return bool((np.abs(scores - exact) <= bounds + np.finfo(np.float32).tiny).mean() > 0.99)


def _build(store: PassageStore, bits: int, axes: Axes | None) -> Codes:
    """Quantise all vectors of ``store``, along ``axes`` if these suit them, else along new ones."""
    from turbovec import IdMapIndex

    row_ids, stamps = store.row_stamps()
    sample = _sample(store, row_ids, _SAMPLE_ROWS)[1]
    if axes is None or len(axes.matrix) != store.width or not axes.suit(sample):
        axes = Axes.of(sample)
    index = IdMapIndex(dim=axes.matrix.shape[1], bit_width=bits)
    if len(sample) > 1:
        index.calibrate(axes.along(sample[:: -(-len(sample) // _CALIBRATION_ROWS)]))
    for block_ids, vectors in store.vectors():
        index.add_with_ids(axes.along(vectors), block_ids)
    return Codes(index, axes, row_ids, stamps, store.version)


def _sample(store: PassageStore, row_ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most ``count`` of ``row_ids`` (N,), drawn at random and sorted (n,), and their vectors (n, D)."""
    chosen = np.sort(np.random.default_rng(0).choice(row_ids, min(count, len(row_ids)), replace=False))
    return chosen, store.vectors_of(chosen)


def _patch(codes: Codes, store: PassageStore) -> bool:
    """Bring ``codes`` to the version of ``store``, or return False where building anew is right."""
    row_ids, stamps = store.row_stamps()
    removed = np.setdiff1d(codes.row_ids, row_ids, assume_unique=True)
    _, here, there = np.intersect1d(row_ids, codes.row_ids, assume_unique=True, return_indices=True)
    same = here[stamps[here] == codes.stamps[there]]
    changed = np.delete(row_ids, same)
    differing = len(changed) + len(removed)
    if differing > _REBUILD_SHARE * len(row_ids):
        return False
    if len(changed) and not codes.axes.suit(_sample(store, row_ids, _CALIBRATION_ROWS)[1]):
        return False
    for row_id in [*removed.tolist(), *changed.tolist()]:
        codes.index.remove(row_id)  # does nothing for an id that is new
    for start in range(0, len(changed), _BLOCK_ROWS):
        block_ids = changed[start : start + _BLOCK_ROWS]
        codes.index.add_with_ids(codes.axes.along(store.vectors_of(block_ids)), block_ids)
    codes.row_ids, codes.stamps, codes.version = row_ids, stamps, store.version
    if codes.unsaved is not None:
        codes.unsaved += differing
    return len(codes.index) == len(row_ids)


def _files(folder: Path, base_id: str, bits: int | None = None) -> list[tuple[int, str, Path]]:
    """Return version, checksum and path of the code files of this base, of all if not of ``bits``, newest first."""
    found = [(_FILE_NAME.fullmatch(path.name), path) for path in folder.glob("codes-*.tvim")]
    own = [
        (int(m["version"]), m["checksum"], path)
        for m, path in found
        if m is not None and m["base"] == base_id and bits in (None, 2 if m["coarse"] else 4)
    ]
    return sorted(own, reverse=True)


def _load(folder: Path, base_id: str, store: PassageStore, bits: int) -> Codes | None:
    """Return the codes of the newest sound file of as many ``bits``, or None."""
    from turbovec import IdMapIndex

    axes = Axes.load(folder / AXES_FILE)
    if axes is None:
        return None
    for version, checksum, path in _files(folder, base_id, bits):
        # A file may vanish as another process replaces it, and the version it shows may have been cleaned up.
        with contextlib.suppress(OSError, ValueError, KnowledgeBaseError):
            if _checksum(path, axes) == checksum:
                index = IdMapIndex.load(str(path))
                shown = store if version == store.version else PassageStore.open(folder, store.width, version)
                row_ids, stamps = shown.row_stamps()
                if len(index) == len(row_ids) and index.bit_width == bits:
                    return Codes(index, axes, row_ids, stamps, version, unsaved=0)
    return None


def _save(codes: Codes, folder: Path, base_id: str) -> None:
    """Write the codes to a file of their own, unless there is a newer one, and remove those that it takes the place of.

    These are the older ones of as many bits, and all that are of other axes.
    """
    held = Axes.load(folder / AXES_FILE)
    new_axes = held is None or not np.array_equal(held.matrix, codes.axes.matrix)
    replaced = None if new_axes else codes.bits
    if any(version > codes.version for version, _, _ in _files(folder, base_id, replaced)):
        return
    _drop_partial_files(folder)
    partial, partial_axes = (folder / f".codes.{os.getpid()}{kind}" for kind in ("", ".axes"))
    suffix = "" if codes.bits == 4 else "-2bit"
    try:
        codes.index.write(str(partial))
        file = folder / f"codes-{base_id}-{codes.version}-{_checksum(partial, codes.axes)}{suffix}.tvim"
        if new_axes:
            codes.axes.save(partial_axes)
            partial_axes.replace(folder / AXES_FILE)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
        partial_axes.unlink(missing_ok=True)
    codes.unsaved = 0
    for version, _, path in _files(folder, base_id, replaced):
        if path != file and version <= codes.version:
            path.unlink(missing_ok=True)


def move_file(folder: Path, base_id: str, store: PassageStore) -> None:
    """Bring the code files, if there are any, to the version of ``store``, since their own may be about to go."""
    for bits in BITS:
        codes = _load(folder, base_id, store, bits)
        if codes is not None and codes.version < store.version and _patch(codes, store):
            _save(codes, folder, base_id)


def drop_stale_files(folder: Path, base_id: str) -> None:
    """Delete the code files of other bases, from which the folder was copied, and what killed processes left."""
    _drop_partial_files(folder)
    own = {path for _, _, path in _files(folder, base_id)}
    for path in folder.glob("codes-*.tvim"):
        if path not in own:
            path.unlink(missing_ok=True)


def _drop_partial_files(folder: Path) -> None:
    for partial in folder.glob(".codes.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:  # else somebody may be writing it
                partial.unlink()


def _checksum(path: Path, axes: Axes) -> str:
    """Return the checksum of the file ``path`` of codes and of the axes along which they are."""
    checksum = zlib.crc32(axes.matrix.tobytes())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
