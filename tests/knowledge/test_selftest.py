import json

import numpy as np
import pytest
from vectors import brute_force, filled, found, low_dimensional

from ragstone.knowledge import KnowledgeBase, Passage, search, selftest
from ragstone.knowledge.selftest import SELF_TEST_FILE, measure, read_self_test
from ragstone.testing import ToyEncoder


@pytest.fixture(autouse=True)
def quantised(monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 0)


@pytest.fixture
def kb(tmp_path):
    return filled(tmp_path / "kb", low_dimensional(2000, 24, seed=0))[0]


def test_recall_is_measured_against_exact_search(kb):
    """A way that finds every second of all passages has a recall of about a half; one that widens, all."""
    rows = kb._store.row_ids()

    def every(step):
        return lambda questions, k, breadth: [rows[:: max(1, step // breadth)]] * len(questions)

    test = measure(kb._store, "quantised", every(1), [1])
    assert (test.recall, test.breadth, test.k, test.passages, test.version) == (1, 1, 100, 2000, kb.version)
    assert measure(kb._store, "quantised", every(2), [1]).recall == pytest.approx(0.5, abs=0.1)
    widened = measure(kb._store, "quantised", every(8), [1, 2, 8, 16])
    assert (widened.recall, widened.breadth) == (1, 8)


def test_it_is_made_once_and_reported(kb, monkeypatch):
    test = kb.prepare()
    assert test.recall >= 0.999
    assert kb.info().self_test == test
    monkeypatch.setattr(search, "measure", lambda *_: pytest.fail("measured again"))
    again = KnowledgeBase.open(kb.path)
    again.search(vectors=np.ones(24))
    assert again.info().self_test == again.prepare() == test
    again.add([Passage("new")], vectors=np.ones((1, 24)))  # not enough to make a difference
    assert again.info().self_test == test


def test_it_holds_no_longer_once_much_has_changed(kb, tmp_path):
    kb.prepare()
    name = kb._manifest.id
    assert read_self_test(kb.path, name, kb._store, "quantised") is not None
    assert read_self_test(kb.path, name, kb._store, "disk") is None
    assert read_self_test(kb.path, "another", kb._store, "quantised") is None
    kb.delete([f"p{i}" for i in range(600)])
    assert read_self_test(kb.path, name, kb._store, "quantised") is None
    assert kb.info().self_test.passages == 1400


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"key": 1}', b'{"key": 1, "ways": {"quantised": {"k": 1}}}', None]
)
def test_a_damaged_file_is_measured_anew(kb, content):
    test = kb.prepare()
    path = kb.path / SELF_TEST_FILE
    path.unlink() if content is None else path.write_bytes(content)
    assert KnowledgeBase.open(kb.path).prepare() == test
    assert json.loads(path.read_text())["ways"]["quantised"]["recall"] == test.recall


def test_where_too_little_is_found_search_is_exact_and_says_so(tmp_path, monkeypatch, caplog):
    vectors = low_dimensional(600, 24, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    worse = search.current_codes

    def blind(*arguments):
        codes = worse(*arguments)
        codes.search = lambda questions, count, allowed=None: np.tile(codes.row_ids[:300], (len(questions), 1))
        return codes

    monkeypatch.setattr(search, "current_codes", blind)
    assert kb.prepare().recall < selftest.LEAST_RECALL
    question = low_dimensional(1, 24, seed=1)[0]
    for _ in range(2):
        assert found(kb.search(vectors=question, k=20)) == brute_force(ids, vectors, question, 20)
    assert kb.dense_search == kb.info().dense_search == "exact"
    assert len([record for record in caplog.records if "is searched exactly" in record.message]) == 1


def test_other_vectors_are_measured_anew(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(width=32))
    kb.add([Passage(f"p{i}", text=f"word{i}") for i in range(300)])
    version = kb.prepare().version
    kb.reencode(ToyEncoder(width=40))
    assert kb.prepare().version > version


def test_an_exact_base_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 10_000)
    kb, _ = filled(tmp_path / "kb", low_dimensional(200, 24, seed=0))
    assert kb.prepare() is None
    assert kb.info().self_test is None
    assert (kb.dense_search, kb.info().dense_search) == ("exact", "exact")
    assert not (kb.path / SELF_TEST_FILE).exists()
