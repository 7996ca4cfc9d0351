"""The index that DPR wrote and RAG first read ("legacy"): a faiss file, a pickled list of ids, pickled passages.

A folder holds::

    X.index.dpr          the vectors; in an HNSW graph each has one number more (`without_extra_dimension`)
    X.index_meta.dpr     pickled: the passage id of each vector
    psgs_w100.tsv.pkl    pickled: passage id -> (text, title); psgs_w100.tsv, the table that it was made from, will do
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragstone.errors import InputError
from ragstone.knowledge.checks import unusable
from ragstone.knowledge.documents import Document, read_file
from ragstone.knowledge.exchange.chunks import Chunk, Source, build_chunk
from ragstone.knowledge.exchange.faiss_files import FaissFile
from ragstone.knowledge.exchange.pickles import read_pickle

__all__ = ["INDEX_SUFFIX", "legacy_source", "without_extra_dimension"]

INDEX_SUFFIX = ".index.dpr"
_META_SUFFIX = ".index_meta.dpr"
_PASSAGES = "psgs_w100.tsv.pkl"
_TOLERANCE = 0.05  # 8-bit storage moves lengths by about a hundredth


def legacy_source(path: Path) -> Source:
    """Open the legacy index in the folder ``path``, or the one whose ``X.index.dpr`` is ``path``.

    The pickles are read whole and at once: a million passages of 100 words take about 1 GB. The vectors are streamed.
    """
    file = _only(path, f"*{INDEX_SUFFIX}", f"name the X{INDEX_SUFFIX} that is meant") if path.is_dir() else path
    meta = file.with_name(file.name.removesuffix(INDEX_SUFFIX) + _META_SUFFIX)
    if not file.name.endswith(INDEX_SUFFIX):
        raise InputError(f"{file} is no legacy index; give the file X{INDEX_SUFFIX} or its folder")
    vectors = FaissFile.open(file)
    vectors.check_vectors()
    extra_dimension = vectors.graph and vectors.euclidean
    if vectors.euclidean and not extra_dimension:
        raise InputError(
            f"{file} compares by Euclidean distance, as an {vectors.kind} of DPR never does; write the vectors as Parquet "
            "with title, text and embeddings, and import that"
        )
    ids = _ids(meta, vectors)
    passages = _passages(file.parent)
    if len(ids) != len(passages):
        raise InputError(
            f"{file} holds {len(ids):,} vectors, but its passages are {len(passages):,}; give those that belong to it"
        )

    def chunks(rows: int) -> Iterator[Chunk]:
        start = 0
        for block in vectors.blocks(rows):
            if extra_dimension:
                block = without_extra_dimension(block, file)
            bad = unusable(block)
            if bad.any():
                raise InputError(
                    f"{file}: vector {start + int(np.argmax(bad))} is NaN, infinite or too large; fetch it again"
                )
            records = [_record(passages, id_, file) for id_ in ids[start : start + len(block)]]
            yield build_chunk(file, records, start, block)
            start += len(block)

    width = vectors.width - 1 if extra_dimension else vectors.width
    return Source("legacy", path, vectors.count, width, chunks)


def without_extra_dimension(vectors: np.ndarray, file: Path) -> np.ndarray:
    """Return (n, D) of the (n, D + 1) ``vectors`` that DPR put into an HNSW graph.

    The graph compares by distance only. With √(φ − |d|²) as one number more, φ being the largest |d|², all vectors are
    equally long, and the nearest to a question with a 0 there is the one with the largest inner product (DPR's
    ``DenseHNSWFlatIndexer``).

    Raises:
        InputError: the lengths differ, or the last number is negative: then it is none of those.
    """
    lengths = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    largest = float(np.median(lengths))
    spread = float(np.median(np.abs(lengths - largest)))
    if spread > _TOLERANCE * largest or vectors[:, -1].min() < -_TOLERANCE * np.sqrt(largest):
        raise InputError(
            f"{file} is an HNSW graph by Euclidean distance whose vectors lack DPR's extra dimension; write them as Parquet "
            "with title, text and embeddings, and import that"
        )
    return np.ascontiguousarray(vectors[:, :-1])


def _only(folder: Path, pattern: str, remedy: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"{folder} must hold one file {pattern}, but holds {names}; {remedy}")
    return found[0]


def _ids(meta: Path, vectors: FaissFile) -> list[str]:
    """Return the passage id of each vector, in the order of the index."""
    if not meta.is_file():
        raise InputError(f"{vectors.path} needs {meta.name} beside it, the ids of its vectors; put it there")
    ids = read_pickle(meta)
    if not isinstance(ids, list | tuple) or not all(isinstance(id_, str | int) for id_ in ids):
        raise InputError(f"{meta} holds {type(ids).__name__}, not a list of ids; fetch it again")
    if len(ids) != vectors.count:
        raise InputError(
            f"{meta} lists {len(ids):,} ids, but {vectors.path.name} holds {vectors.count:,} vectors; the two are not "
            "of the same index: fetch both again"
        )
    if vectors.ids is not None:
        if not np.array_equal(np.sort(vectors.ids), np.arange(len(ids))):
            raise InputError(
                f"{vectors.path} numbers its vectors otherwise than 0 to {len(ids) - 1}; give the index DPR wrote"
            )
        ids = [ids[place] for place in vectors.ids.tolist()]
    names = [str(id_) for id_ in ids]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{meta} lists the id {twice!r} twice; an id names one passage")
    return names


def _passages(folder: Path) -> Mapping[str, Any]:
    """Return the passages of the index, by id, as (text, title)."""
    tables = sorted(folder.glob("*.tsv"))
    file = folder / _PASSAGES
    if not file.is_file() and not any(folder.glob("*.pkl")) and len(tables) == 1:
        documents = (document for document in read_file(tables[0]) if isinstance(document, Document))
        return {document.id: (document.sections[0].text, document.title) for document in documents}
    if not file.is_file():
        file = _only(folder, "*.pkl", f"put {_PASSAGES}, the passages, beside the index")
    passages = read_pickle(file)
    if not isinstance(passages, dict):
        raise InputError(f"{file} holds {type(passages).__name__}, not a dict of passages by id; fetch it again")
    return passages


def _record(passages: Mapping[Any, Any], id_: str, file: Path) -> dict[str, Any]:
    passage = passages.get(id_)
    if passage is None and id_.isdigit():
        passage = passages.get(int(id_))
    if passage is None:
        raise InputError(
            f"{file} has a vector of the passage {id_!r}, which is not among its passages; fetch them again"
        )
    if not isinstance(passage, list | tuple) or len(passage) < 2:
        raise InputError(f"the passage {id_!r} of {file} is {str(passage)[:60]!r}, not (text, title); fetch them again")
    return {"id": id_, "text": passage[0] or "", "title": passage[1] or ""}
