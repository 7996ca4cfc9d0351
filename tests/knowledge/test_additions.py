"""Many passages in one commit, piece by piece, against the same passages stored at once."""

import numpy as np
import pytest
from vectors import low_dimensional

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, Passage, additions, base
from ragstone.testing import ToyEncoder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(additions, "PIECE", 64)
    monkeypatch.setattr(base, "PIECE", 64)


def passages(count):
    return (Passage(f"p{i}", text=f"word{i}") for i in range(count))


def content(kb):
    table = kb._store.scan(["id", "text", "vector"]).to_pylist()
    return {row["id"]: (row["text"], row["vector"]) for row in table}


def expected(vectors, start=0):
    return {f"p{start + i}": (f"word{start + i}", vector.tolist()) for i, vector in enumerate(vectors)}


@pytest.fixture
def kb(tmp_path):
    return KnowledgeBase.create(tmp_path / "kb", encoder=None, width=8)


@pytest.mark.parametrize("count", [64, 65, 128, 300])
@pytest.mark.parametrize("kind", ["array", "mapped", "float64", "list"])
def test_pieces_are_one_commit(kb, tmp_path, count, kind):
    vectors = given = low_dimensional(count, 8, seed=0)
    if kind == "mapped":
        np.save(tmp_path / "vectors.npy", vectors)
        given = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    elif kind != "array":
        given = vectors.astype(np.float64) if kind == "float64" else vectors.tolist()
    versions = len(kb.versions())
    assert kb.add(passages(count), vectors=given) == count
    assert content(kb) == expected(vectors)
    numbers = {entry.passages for entry in kb.versions()[versions:]}
    assert numbers == {count}


def test_many_are_encoded_piece_by_piece(tmp_path):
    encoder = ToyEncoder()
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=encoder)
    assert kb.add(passages(200)) == 200
    assert encoder.encoded == 200
    assert content(kb) == expected(encoder.encode_passages([("", f"word{i}") for i in range(200)]))


def test_upsert_replaces_and_the_last_of_equal_ids_counts(kb):
    vectors = low_dimensional(500, 8, seed=0)
    kb.add(passages(100), vectors=vectors[:100])
    given = [*passages(200), *(Passage(f"p{i}", text="again") for i in range(50))]
    assert kb.upsert(iter(given), vectors=vectors[100:350]) == 200
    held = expected(vectors[100:300]) | {f"p{i}": ("again", vectors[300 + i].tolist()) for i in range(50)}
    assert content(kb) == held
    assert kb.upsert((Passage(f"q{i}") for i in range(90)), vectors=vectors[:90]) == 90
    assert len(kb) == 290


@pytest.mark.parametrize("replacing", [False, True])
def test_what_is_wrong_late_leaves_nothing_behind(kb, replacing):
    put = kb.upsert if replacing else kb.add
    kb.add([Passage("kept")], vectors=np.ones((1, 8)))
    vectors = low_dimensional(300, 8, seed=0)
    bad = vectors.copy()
    bad[250, 3] = np.nan
    version = kb.version
    with pytest.raises(InputError, match="number 250 is NaN"):
        put(passages(300), vectors=bad)
    with pytest.raises(InputError, match=r"vectors \(299\) and of texts"):
        put(passages(300), vectors=vectors[:299])
    with pytest.raises(InputError, match=r"vectors \(300\) and of texts \(290\)"):
        put(passages(290), vectors=vectors)
    with pytest.raises(InputError, match="width 8"):
        put(passages(300), vectors=vectors[:, :7])
    with pytest.raises(InputError, match="a passage is a string"):
        put([*passages(299), 7], vectors=vectors)
    if not replacing:
        with pytest.raises(InputError, match="'p3' is given twice"):
            put([*passages(299), Passage("p3")], vectors=vectors)
        with pytest.raises(InputError, match="has a passage with the id 'kept'"):
            put([*passages(299), Passage("kept")], vectors=vectors)
    kb.refresh()
    assert (kb.version, len(kb)) == (version, 1)
    assert put(passages(300), vectors=vectors) == 300
