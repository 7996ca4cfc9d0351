"""Vectors and texts read from their place in Lance's files against those that Lance reads."""

from dataclasses import replace

import numpy as np
import pytest
from vectors import filled, low_dimensional

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, mapped, storage


def opened(kb, column: str) -> dict[int, object]:
    """The fragments whose files were looked at for a column, None for those left to Lance."""
    return kb._store._all_rows()[1][column]._opened


def check(kb) -> None:
    """Compare all rows with what a scan of Lance's reads."""
    row_ids = np.random.default_rng(0).permutation(kb._store.row_ids())
    passages, vectors = kb._store.fetch_passages(row_ids)
    table = kb._store.scan(["id", "title", "text", kb._store.vector_name])
    held = {id_: rest for id_, *rest in zip(*(column.to_pylist() for column in table.columns[:4]), strict=True)}
    rows = zip(passages, vectors.tolist(), strict=True)
    assert {passage.id: [passage.title, passage.text, vector] for passage, vector in rows} == held
    assert kb._store.ids_of(row_ids) == [passage.id for passage in passages]
    assert len(passages) == len(kb)


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
    assert len(opened(kb, "vector")) == 2
    assert None not in opened(kb, "vector").values()


@pytest.mark.parametrize("length", [3, 300, 70_000])
def test_files_of_ordinary_texts_are_mapped(tmp_path, length):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2)
    letters = [*"abc äöü ßçé 漢字かな 👩‍🚀\0"]

    def passages(name: str, count: int) -> list[Passage]:
        drawn = np.random.default_rng(count).choice(letters, (count, length))
        return [Passage(f"{name}{i}-é", title=f"Title {i}", text="".join(row)) for i, row in enumerate(drawn)]

    some = max(8, 900_000 // length) if length > 3 else 20_000
    kb.add(passages("p", some), vectors=np.ones((some, 2)))
    kb.add(passages("new", some // 2), vectors=np.ones((some // 2, 2)))
    kb.upsert(passages("p", some // 4), vectors=np.ones((some // 4, 2)))
    kb.delete([f"p{i}-é" for i in range(0, some, 5)])
    check(kb)
    mapped_columns = ["id", "title", "text"] if length > 3 else ["id", "title"]  # few different texts have a dictionary
    for column in mapped_columns:
        assert len(opened(kb, column)) == 3
        assert None not in opened(kb, column).values()
    kb._store._dataset.optimize.compact_files()
    kb.refresh()
    check(kb)
    for column in mapped_columns:
        assert None not in opened(kb, column).values()


@pytest.mark.parametrize("titles", [["", "", ""], ["Rome", "Rome", "Oslo"], ["Rome", "", "Bern" * 1000]])
def test_few_different_texts_are_read_too(tmp_path, titles):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2)
    kb.add([Passage(f"p{i}", title=titles[i % 3], text=titles[i % 2]) for i in range(3000)], vectors=np.ones((3000, 2)))
    check(kb)


def test_texts_of_bases_made_before_are_left_to_lance(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "APART", {})
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2)
    words = np.random.default_rng(0).choice([f"word{i}" for i in range(1000)], (600, 50))
    passages = [Passage(f"p{i}", text=" ".join(row)) for i, row in enumerate(words.tolist())]
    kb.add(passages[:300], vectors=np.ones((300, 2)))
    monkeypatch.undo()
    kb.add(passages[300:], vectors=np.ones((300, 2)))
    check(kb)
    assert opened(kb, "text")[0] is None


def test_a_text_that_is_cut_is_an_error(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2)
    texts = [f"{i} " + "x" * 1000 for i in range(50)]
    kb.add([Passage(f"p{i}", text=text) for i, text in enumerate(texts)], vectors=np.ones((50, 2)))
    check(kb)
    (file,) = (kb.path / "passages.lance" / "data").iterdir()
    content = file.read_bytes()
    place = content.index(texts[30].encode()) - 4
    row_id = kb._store.find(["p30"])["p30"]
    for damaged in (b"\x05" + content[place + 1 : place + 8], content[place : place + 5] + b"\xff\xff\xff"):
        with file.open("r+b") as written:  # it is mapped
            written.seek(place)
            written.write(damaged)
        with pytest.raises(KnowledgeBaseError, match="cannot be read"):
            kb._store.passages_of(np.array([row_id], np.uint64))
    pages = opened(kb, "text")[0]
    for table in (pages.tables[0].astype(np.int64) + 2**31, pages.tables[0][::-1]):
        opened(kb, "text")[0] = replace(pages, tables=[table])
        with pytest.raises(KnowledgeBaseError, match="cannot be read"):
            kb._store.passages_of(np.array([row_id + 1], np.uint64))


def test_a_file_that_reads_otherwise_is_left_to_lance(tmp_path, monkeypatch):
    kb, _ = filled(tmp_path / "kb", low_dimensional(500, 64, seed=0))
    right = mapped.MappedVectors._map

    def shifted(self, file, rows):
        pages = right(self, file, rows)
        return replace(pages, places=pages.places + 1)

    monkeypatch.setattr(mapped.MappedVectors, "_map", shifted)
    check(kb)
    assert set(opened(kb, "vector").values()) == {None}


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
