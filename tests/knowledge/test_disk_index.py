"""Search through Lance's index on disk, against brute force, whatever was written since the index was made."""

import logging

import numpy as np
import pytest
from damage import damage
from vectors import brute_force, filled, found, low_dimensional

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, search
from ragstone.testing import ToyEncoder

SMALL = 40_000  # bytes, in which neither vectors nor codes of these bases fit


@pytest.fixture(autouse=True)
def many(monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    monkeypatch.setattr(search, "_FEW_ALLOWED", 50)


@pytest.fixture
def base(tmp_path):
    vectors = low_dimensional(3000, 24, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    kb = KnowledgeBase.open(kb.path, memory=SMALL)
    assert kb.prepare().recall >= 0.98
    return kb, dict(zip(ids, vectors, strict=True))


def check(kb, held, where=None, allowed=None) -> None:
    ids = [*(held if allowed is None else allowed)]
    vectors = np.array([held[id_] for id_ in ids])
    questions = low_dimensional(40, 24, seed=1)
    shares = []
    for question, hits in zip(questions, kb.search(vectors=questions, k=10, where=where), strict=True):
        expected = dict(brute_force(ids, vectors, question, 10))
        shares.append(len(expected.keys() & {hit.passage.id for hit in hits}) / 10)
        assert all(score == expected[id_] for id_, score in found(hits) if id_ in expected)
        assert {hit.passage.id for hit in hits} <= {*ids}
    assert np.mean(shares) >= 0.97


def test_it_is_chosen_by_memory_and_found_again(base):
    kb, held = base
    assert kb.dense_search == kb.info().dense_search == "disk"
    check(kb, held)
    again = KnowledgeBase.open(kb.path, memory=SMALL)
    check(again, held)
    assert again.info().self_test == kb.info().self_test
    assert KnowledgeBase.open(kb.path).dense_search == "quantised"
    assert not [*kb.path.glob("codes-*")] or again._searcher._codes is None


def test_it_finds_what_came_and_not_what_went(base):
    kb, held = base
    new = low_dimensional(400, 24, seed=5) * 2  # large: they would be among the best
    kb.add([Passage(f"new{i}", page=i % 10) for i in range(200)], vectors=new[:200])
    kb.upsert([Passage(f"p{i}", page=i % 10) for i in range(200)], vectors=new[200:])
    kb.delete([f"p{i}" for i in range(300, 900)])
    held |= {f"new{i}": new[i] for i in range(200)} | {f"p{i}": new[200 + i] for i in range(200)}
    held = {id_: vector for id_, vector in held.items() if id_ not in {f"p{i}" for i in range(300, 900)}}
    check(kb, held)
    kb._store.index_words(all_rows=True)  # brings this index up to date too
    kb.refresh()
    check(kb, held)
    kb._store._dataset.optimize.compact_files()
    kb.refresh()
    assert kb.dense_search == "disk"
    check(kb, held)


def test_predicates_hold(base):
    kb, held = base
    places = {f"p{place * 7919 % 3000}": place for place in range(3000)}
    check(kb, held, "page < 4", [id_ for id_, place in places.items() if place % 10 < 4])
    few = [id_ for id_, place in places.items() if place % 10 == 3 and id_ < "p12"]
    check(kb, held, "page = 3 AND id < 'p12'", few)
    assert kb.search(vectors=low_dimensional(1, 24, seed=1)[0], where="page = 99") == []


def test_without_it_all_vectors_are_compared_and_that_is_said(tmp_path, caplog):
    vectors = low_dimensional(300, 61, seed=0)  # too few, and of a width that Lance cannot index
    kb, ids = filled(tmp_path / "kb", vectors)
    kb = KnowledgeBase.open(kb.path, memory=2000)
    assert kb.prepare() is None
    question = low_dimensional(1, 61, seed=1)[0]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert found(kb.search(vectors=question, k=7)) == brute_force(ids, vectors, question, 7)
    assert len([record for record in caplog.records if "no index for search by vector" in record.message]) == 1
    assert kb.dense_search == "exact"


def test_other_vectors_have_no_old_index(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(width=32), memory=SMALL)
    kb.add([Passage(f"p{i}", text=f"word{i} word{i % 7}") for i in range(1500)])
    assert kb.prepare() is not None
    assert kb.dense_search == "disk"
    kb.reencode(ToyEncoder(width=40))
    assert kb.dense_search == "exact"
    questions = [f"word{i} word{i % 7}" for i in range(0, 1500, 37)]  # near to passages: these have no clusters
    expected = kb.search(questions, k=5, search="exact")
    assert kb.search(questions, k=5) == expected
    assert kb.prepare() is not None
    assert kb.dense_search == "disk"
    pairs = zip(kb.search(questions, k=5), expected, strict=True)
    assert np.mean([len(dict(found(hits)).keys() & dict(found(best)).keys()) / 5 for hits, best in pairs]) >= 0.97


def test_one_that_is_damaged_is_named_and_repaired(base):
    kb, held = base
    dataset = kb._store._dataset
    index = next(index["uuid"] for index in dataset.list_indices() if index["fields"] == ["vector"])
    file = max((kb.path / "passages.lance/_indices" / index).iterdir(), key=lambda file: file.stat().st_size)
    damage(file, "flipped")
    with pytest.raises(KnowledgeBaseError, match=rf"{file.name}.*--repair"):
        KnowledgeBase.open(kb.path, memory=SMALL)
    assert any(file.name in fault.file for fault in KnowledgeBase.check(kb.path).faults)
    assert KnowledgeBase.check(kb.path, repair=True).sound
    kb = KnowledgeBase.open(kb.path, memory=SMALL)
    assert kb.dense_search == "exact"
    assert kb.prepare().recall >= 0.98
    check(kb, held)
