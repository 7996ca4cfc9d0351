"""Vectors read from their place in Lance's files against those that Lance reads."""

from dataclasses import replace

import numpy as np
import pytest
from vectors import filled, low_dimensional

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import Passage, mapped


def mapping(kb) -> mapped.MappedVectors:
    return kb._store._all_rows()[1]


def held(kb) -> dict[str, list[float]]:
    """All vectors by id, as a scan of Lance's reads them."""
    table = kb._store.scan(["id", kb._store.vector_name])
    return dict(zip(table["id"].to_pylist(), table[kb._store.vector_name].to_pylist(), strict=True))


def check(kb) -> None:
    row_ids = np.random.default_rng(0).permutation(kb._store.row_ids())
    ids, vectors = kb._store.ids_of(row_ids), kb._store.vectors_of(row_ids)
    assert dict(zip(ids, vectors.tolist(), strict=True)) == held(kb)
    assert len(ids) == len(kb)


@pytest.mark.parametrize("width", [64, 61, 8, 1])
def test_vectors_are_those_of_their_rows_whatever_was_written(tmp_path, width):
    vectors = low_dimensional(700, width, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors[:500])
    check(kb)
    kb.add([Passage(f"new{i}") for i in range(100)], vectors=vectors[500:600])
    kb.upsert([Passage(id_) for id_ in ids[50:150]], vectors=vectors[600:])
    kb.delete(ids[::7])
    check(kb)
    kb._store._dataset.optimize.compact_files()
    kb.refresh()
    check(kb)


def test_files_of_ordinary_vectors_are_mapped(tmp_path):
    kb, _ = filled(tmp_path / "kb", low_dimensional(500, 64, seed=0))
    kb.add([Passage(f"new{i}") for i in range(100)], vectors=low_dimensional(100, 64, seed=1))
    check(kb)
    assert len(mapping(kb)._opened) == 2
    assert None not in mapping(kb)._opened.values()


def test_a_file_that_reads_otherwise_is_left_to_lance(tmp_path, monkeypatch):
    kb, _ = filled(tmp_path / "kb", low_dimensional(500, 64, seed=0))
    right = mapped.MappedVectors._map

    def shifted(self, file, rows):
        pages = right(self, file, rows)
        return replace(pages, places=pages.places + 1)

    monkeypatch.setattr(mapped.MappedVectors, "_map", shifted)
    check(kb)
    assert set(mapping(kb)._opened.values()) == {None}


def test_a_cut_file_is_an_error_and_not_a_crash(tmp_path):
    kb, _ = filled(tmp_path / "kb", low_dimensional(500, 64, seed=0))
    row_ids = kb._store.row_ids()
    (file,) = (kb.path / "passages.lance" / "data").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    with pytest.raises(KnowledgeBaseError, match="cannot be read"):
        kb._store.vectors_of(row_ids)


def test_a_row_that_is_not_there_is_an_error(tmp_path):
    kb, _ = filled(tmp_path / "kb", low_dimensional(20, 64, seed=0))
    for row_ids in ([5, 1000], [2**40]):
        with pytest.raises(KnowledgeBaseError, match="lacks rows"):
            kb._store.vectors_of(np.array(row_ids, np.uint64))
        with pytest.raises(KnowledgeBaseError, match="lacks rows"):
            kb._store.passages_of(np.array(row_ids, np.uint64))
