import numpy as np
import pytest
from vectors import filled, found, low_dimensional

from ragstone.knowledge import KnowledgeBase, Passage, codes, search
from ragstone.knowledge.axes import Axes
from ragstone.knowledge.codes import AXES_FILE


def kept(axes: Axes, vectors: np.ndarray) -> np.ndarray:
    """The share of their squared length that ``vectors`` keep, by definition."""
    return np.linalg.norm(vectors @ axes.matrix, axis=1) ** 2 / np.linalg.norm(vectors, axis=1) ** 2


def elsewhere(count: int, width: int, seed: int) -> np.ndarray:
    """Vectors near another plane than those of `low_dimensional`."""
    plane = np.random.default_rng(7).standard_normal((12, width))
    return (np.random.default_rng(seed).standard_normal((count, 12)) @ plane).astype(np.float32)


def test_few_axes_carry_vectors_near_a_plane():
    axes = Axes.of(low_dimensional(2000, 128, seed=0))
    assert axes.matrix.shape == (128, 32)  # the plane has 12 dimensions
    others = low_dimensional(2000, 128, seed=1)
    assert np.quantile(kept(axes, others), 0.01) >= 0.9
    assert axes.suit(others)
    assert not axes.suit(elsewhere(2000, 128, seed=0))


def test_what_is_rare_is_carried_too():
    common, rare = low_dimensional(3880, 128, seed=0), elsewhere(120, 128, seed=0)
    vectors = np.random.default_rng(0).permutation(np.concatenate([common, rare]))
    assert kept(Axes.of(vectors), elsewhere(500, 128, seed=1)).min() >= 0.8
    assert kept(Axes.of(common), elsewhere(500, 128, seed=1)).max() < 0.8


@pytest.mark.parametrize(("count", "width", "numbers"), [(2, 40, 64), (30, 61, 64), (0, 8, 32), (1, 32, 32)])
def test_few_vectors_are_carried_whole(count, width, numbers):
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    axes = Axes.of(vectors)
    assert axes.matrix.shape == (width, numbers)
    others = np.random.default_rng(1).standard_normal((9, width)).astype(np.float32)
    assert axes.along(others) @ axes.along(others).T == pytest.approx(others @ others.T, abs=1e-4)


def test_vectors_of_no_length_say_nothing():
    vectors = low_dimensional(400, 64, seed=0)
    axes = Axes.of(np.concatenate([vectors, np.zeros((400, 64), np.float32)]))
    assert axes.matrix.shape == (64, 32)
    assert axes.suit(np.zeros((5, 64), np.float32))
    assert np.isfinite(Axes.of(np.zeros((5, 64), np.float32)).matrix).all()


def test_a_file_of_anything_else_is_not_read(tmp_path):
    path = tmp_path / "axes.npy"
    axes = Axes.of(low_dimensional(400, 61, seed=0))
    axes.save(path)
    assert np.array_equal(Axes.load(path).matrix, axes.matrix)
    content = path.read_bytes()
    for damaged in (b"", content[:-9], b"no axes", content[:-4] + np.float32(9).tobytes()):
        path.write_bytes(damaged)
        assert Axes.load(path) is None
    others = (2 * axes.matrix, axes.matrix.astype(float), axes.matrix[0], axes.matrix * np.nan, np.array([{}, 1]))
    for other in others:
        np.save(path, other, allow_pickle=True)
        assert Axes.load(path) is None
    path.unlink()
    assert Axes.load(path) is None


@pytest.fixture
def kb(tmp_path, monkeypatch) -> KnowledgeBase:
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    kb, _ = filled(tmp_path / "kb", low_dimensional(2000, 128, seed=0))
    kb.prepare()
    return kb


def test_codes_have_as_many_numbers_as_there_are_axes(kb):
    assert kb._searcher._codes.index.dim == Axes.load(kb.path / AXES_FILE).matrix.shape[1] == 32
    info = kb.info()
    assert (info.axes, info.width) == (32, 128)
    assert info.self_test.recall >= 0.999
    assert KnowledgeBase.open(kb.path, memory=1).info().axes is None


def test_codes_are_built_along_new_axes_where_the_old_ones_no_longer_suit(kb):
    between = (codes.codes_bytes(2200, 128, 2) + codes.codes_bytes(2200, 128, 4)) // 2
    KnowledgeBase.open(kb.path, memory=between).prepare()
    before = {*kb.path.glob("codes-*.tvim")}
    assert len(before) == 2
    new, questions = elsewhere(200, 128, seed=0), elsewhere(20, 128, seed=1)
    kb.add([Passage(f"new{i}") for i in range(200)], vectors=new)
    dense, exact = (kb.search(vectors=questions, k=10, search=method) for method in ("dense", "exact"))
    assert np.mean([len({*found(a)} & {*found(b)}) / 10 for a, b in zip(dense, exact, strict=True)]) >= 0.99
    (file,) = kb.path.glob("codes-*.tvim")  # codes along the old axes, of 2 bits too, are gone
    assert file not in before
    assert kb._searcher._codes.axes.suit(new)
    assert KnowledgeBase.check(kb.path).sound
    file_axes = Axes.load(kb.path / AXES_FILE)
    assert np.array_equal(file_axes.matrix, kb._searcher._codes.axes.matrix)


@pytest.mark.parametrize("how", ["missing", "damaged", "another base's"])
def test_without_their_axes_codes_are_built_anew(kb, how):
    question = low_dimensional(1, 128, seed=5)[0]
    expected = found(kb.search(vectors=question, k=10))
    path = kb.path / AXES_FILE
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        Axes.of(low_dimensional(2000, 128, seed=3)).save(path)
    (fault,) = KnowledgeBase.check(kb.path).faults
    assert fault.kind == "codes"
    assert AXES_FILE in fault.problem
    assert found(KnowledgeBase.open(kb.path).search(vectors=question, k=10)) == expected
    assert KnowledgeBase.check(kb.path).sound
