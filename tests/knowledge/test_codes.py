import itertools
import shutil
import threading

import numpy as np
import pytest
from vectors import brute_force, filled, found, low_dimensional

from ragstone.knowledge import KnowledgeBase, Passage, codes, search


@pytest.fixture(autouse=True)
def quantised(monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 0)


@pytest.mark.parametrize("width", [64, 61])
def test_quantised_search_finds_what_exact_search_finds(tmp_path, width):
    vectors = low_dimensional(5000, width, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    assert kb.info().dense_search == "quantised"
    questions = low_dimensional(100, width, seed=1)
    for k in (1, 10, 100):
        dense, exact = (kb.search(vectors=questions, k=k, search=method) for method in ("dense", "exact"))
        recalls = [len(set(found(a)) & set(found(b))) / k for a, b in zip(dense, exact, strict=True)]
        assert np.mean(recalls) >= 0.99
    where = kb.search(vectors=questions, k=10, where="page = 3")
    allowed = [place for place in range(5000) if place % 10 == 3]
    expected = [brute_force([ids[i] for i in allowed], vectors[allowed], question, 10) for question in questions]
    assert np.mean([len(set(found(a)) & set(b)) / 10 for a, b in zip(where, expected, strict=True)]) >= 0.99
    assert kb.search(vectors=questions[0], where="page = 99") == []
    assert len(kb.search(vectors=questions[0], k=10_000)) == 5000


def check_codes_are_right(kb, vectors_by_id: dict[str, np.ndarray]) -> None:
    """Each passage is the best for its own vector, and the codes name just the rows there are."""
    ids = sorted(vectors_by_id)
    questions = np.array([vectors_by_id[id_] for id_ in ids])
    expected = [brute_force(ids, questions, question, 3) for question in questions[:40]]
    assert [found(hits) for hits in kb.search(vectors=questions[:40], k=3)] == expected
    assert len(kb._searcher._codes.index) == len(kb)


@pytest.fixture
def grown(tmp_path):
    vectors = low_dimensional(400, 24, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    held = dict(zip(ids, vectors, strict=True))
    check_codes_are_right(kb, held)
    return kb, held


def forbid_building(monkeypatch):
    monkeypatch.setattr(codes, "_build", lambda *_: pytest.fail("the codes were built anew"))


@pytest.mark.parametrize("reopened", [False, True])
def test_codes_are_patched_after_add_upsert_and_delete(grown, monkeypatch, reopened):
    kb, held = grown
    forbid_building(monkeypatch)
    new = low_dimensional(60, 24, seed=5)
    kb.add([Passage(f"new{i}") for i in range(20)], vectors=new[:20])
    kb.upsert([Passage(f"p{i}") for i in range(20)], vectors=new[20:40])
    kb.delete([f"p{i}" for i in range(100, 120)])
    held |= {f"new{i}": new[i] for i in range(20)} | {f"p{i}": new[20 + i] for i in range(20)}
    held = {id_: vector for id_, vector in held.items() if id_ not in {f"p{i}" for i in range(100, 120)}}
    kb = KnowledgeBase.open(kb.path) if reopened else kb
    check_codes_are_right(kb, held)
    kb._store._dataset.optimize.compact_files()  # keeps row ids
    check_codes_are_right(kb, held)


def test_codes_are_right_for_an_older_version_and_for_one_restored(grown):
    kb, held = grown
    version = kb.version
    new = low_dimensional(20, 24, seed=5)
    kb.upsert([Passage(f"p{i}") for i in range(20)], vectors=new)
    changed = held | {f"p{i}": new[i] for i in range(20)}
    check_codes_are_right(kb, changed)
    check_codes_are_right(KnowledgeBase.open(kb.path, version=version), held)
    KnowledgeBase.open(kb.path, version=version)._store._dataset.restore()
    kb.refresh()
    check_codes_are_right(kb, held)


@pytest.mark.parametrize("damage", ["missing", "cut", "bit", "garbage", "another base"])
def test_damaged_codes_are_built_anew(grown, tmp_path, damage):
    kb, held = grown
    (file,) = kb.path.glob("codes-*.tvim")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "garbage":
        file.write_bytes(b"not codes")
    else:
        vectors = low_dimensional(400, 24, seed=3)
        other, ids = filled(tmp_path / "other", vectors)
        shutil.copy(file, other.path)
        kb, held = other, dict(zip(ids, vectors, strict=True))
    check_codes_are_right(KnowledgeBase.open(kb.path), held)
    check_codes_are_right(KnowledgeBase.open(kb.path), held)


def test_codes_work_where_nothing_can_be_written(grown, monkeypatch):
    kb, held = grown
    for file in kb.path.glob("codes-*.tvim"):
        file.unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(codes, "_save", refuse)
    check_codes_are_right(KnowledgeBase.open(kb.path), held)


def test_only_the_newest_codes_are_kept(grown):
    kb, held = grown
    new = low_dimensional(300, 24, seed=5)
    kb.add([Passage(f"new{i}") for i in range(300)], vectors=new)
    check_codes_are_right(kb, held | {f"new{i}": new[i] for i in range(300)})
    assert [int(file.name.split("-")[2]) for file in kb.path.glob("codes-*.tvim")] == [kb.version]
    assert not [file for file in kb.path.iterdir() if file.name.startswith(".codes")]


def test_threads_that_share_a_base_search_while_it_changes(grown):
    kb, held = grown
    ids = [*held]
    question = low_dimensional(1, 24, seed=6)[0]
    states, failures, done = [dict(held)], [], threading.Event()
    for turn in range(6):
        new = low_dimensional(10, 24, seed=7 + turn)
        states.append(states[-1] | dict(zip(ids[10 * turn :], 2 * new, strict=False)))
    allowed = [tuple(brute_force(ids, np.array([state[i] for i in ids]), question, 3)) for state in states]

    def search_on() -> None:
        while not done.is_set():
            hits = tuple(found(kb.search(vectors=question, k=3)))
            if hits not in allowed:
                failures.append(hits)

    threads = [threading.Thread(target=search_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for before, after in itertools.pairwise(states):
        changed = [i for i in ids if after[i] is not before[i]]
        kb.upsert([Passage(i) for i in changed], vectors=np.array([after[i] for i in changed]))
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert tuple(found(kb.search(vectors=question, k=3))) == allowed[-1]


def test_codes_of_half_the_size_where_the_others_do_not_fit(tmp_path, monkeypatch):
    vectors = low_dimensional(5000, 64, seed=0)
    large, ids = filled(tmp_path / "large", vectors)
    between = (codes.codes_bytes(5000, 64, 2) + codes.codes_bytes(5000, 64, 4)) // 2
    coarse = KnowledgeBase.open(large.path, memory=between)
    assert coarse.dense_search == "coarse"
    questions = low_dimensional(100, 64, seed=1)
    large.search(vectors=questions[:1])
    dense, exact = (coarse.search(vectors=questions, k=10, search=method) for method in ("dense", "exact"))
    assert np.mean([len(set(found(a)) & set(found(b))) / 10 for a, b in zip(dense, exact, strict=True)]) >= 0.99
    assert coarse.info().self_test.way == "coarse"
    assert coarse._searcher._codes.bits == 2
    # Both files are there now; each is found by those who can hold it, patched, and only the newest of its kind stays.
    forbid_building(monkeypatch)
    coarse.delete(ids[:200])
    left = dict(zip(ids[200:], vectors[200:], strict=True))
    for memory, bits in ((between, 2), (None, 4)):
        reader = KnowledgeBase.open(large.path, memory=memory)
        check_codes_are_right(reader, left)
        assert reader._searcher._codes.bits == bits
    assert len(list(large.path.glob("codes-*-2bit.tvim"))) == 1
    assert len(list(large.path.glob("codes-*.tvim"))) == 2
    assert KnowledgeBase.check(large.path).sound
