"""Fresh scores against brute force by definition."""

import numpy as np
import pytest
import torch

from ragstone.errors import InputError
from ragstone.knowledge import Hit, Passage
from ragstone.training import rescore

N, D = 12, 6
PASSAGES = [Passage(f"p{n:02}", text=f"text {n}") for n in range(N)]


class Encoder:
    """Vectors that are parameters; counts what it encodes, with and without gradient."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(N, D, dtype=torch.float64))
        self.calls = []

    def __call__(self, passages):
        self.calls.append((torch.is_grad_enabled(), [p.id for p in passages]))
        return self.table[[int(p.id[1:]) for p in passages]]


def candidates(*rows):
    return [[Hit(PASSAGES[n], 99.0 - n, np.zeros(D, np.float32)) for n in row] for row in rows]


@pytest.fixture
def questions():
    return torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


ROWS = [list(range(8)), list(range(4, 12)), [0, 11]]


def test_the_best_by_fresh_vectors_are_kept_in_their_order(questions):
    encoder = Encoder()
    fresh = rescore(questions, candidates(*ROWS), encoder, 3)
    for b, row in enumerate(ROWS):
        scores = {n: (encoder.table[n] @ questions[b]).item() for n in row}
        best = sorted(row, key=lambda n: -scores[n])[:3]
        assert [hit.passage.id for hit in fresh.hits[b]] == [f"p{n:02}" for n in best]
        real = len(best)
        assert fresh.mask[b].tolist() == [True] * real + [False] * (3 - real)
        expected = [scores[n] for n in best] + [0.0] * (3 - real)
        torch.testing.assert_close(fresh.scores[b], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(fresh.vectors[b, :real], encoder.table[best])
        assert (fresh.vectors[b, real:] == 0).all()
        for hit, n in zip(fresh.hits[b], best, strict=True):
            assert hit.score == pytest.approx(scores[n])
            np.testing.assert_allclose(hit.vector, encoder.table[n].detach().numpy(), rtol=1e-6)


def test_the_gradient_reaches_the_questions_and_the_kept_passages_alone(questions):
    encoder = Encoder()
    fresh = rescore(questions, candidates(*ROWS), encoder, 2)
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0], [1.5, 0.0]], dtype=torch.float64)
    (fresh.scores * weights).sum().backward()
    expected = torch.zeros(N, D, dtype=torch.float64)
    for b, row in enumerate(fresh.hits):
        for hit, weight in zip(row, weights[b], strict=False):
            expected[int(hit.passage.id[1:])] += weight * questions[b].detach()
    torch.testing.assert_close(encoder.table.grad, expected)
    torch.testing.assert_close(questions.grad, torch.einsum("bk,bkd->bd", weights, fresh.vectors.detach()))


def test_each_passage_is_encoded_once_and_only_the_kept_ones_with_gradient(questions):
    encoder = Encoder()
    fresh = rescore(questions, candidates(*ROWS), encoder, 2)
    (first, all_ids), (second, kept_ids) = encoder.calls
    assert (first, second) == (False, True)
    assert sorted(all_ids) == [p.id for p in PASSAGES]
    assert sorted(kept_ids) == sorted({hit.passage.id for row in fresh.hits for hit in row})


def test_equal_scores_are_ordered_by_id(questions):
    encoder = Encoder()
    with torch.no_grad():
        encoder.table[:] = 1.0
    fresh = rescore(questions, candidates([5, 2, 9], [9, 5, 2], [2, 9, 5]), encoder, 2)
    assert [[hit.passage.id for hit in row] for row in fresh.hits] == [["p02", "p05"]] * 3


def test_questions_without_candidates_have_empty_slots(questions):
    fresh = rescore(questions, [[], [], []], Encoder(), 2)
    assert fresh.hits == [[], [], []]
    assert not fresh.mask.any()
    assert fresh.vectors.shape == (3, 2, D)
    assert (fresh.scores == 0).all()


def test_misfits_are_named(questions):
    with pytest.raises(InputError, match="k=0"):
        rescore(questions, candidates(*ROWS), Encoder(), 0)
    with pytest.raises(InputError, match="3 question vectors and 2 lists"):
        rescore(questions, candidates(*ROWS[:2]), Encoder(), 2)
    with pytest.raises(InputError, match=r"gave \(12, 5\) for 12 passages"):
        rescore(questions, candidates(*ROWS), lambda passages: torch.zeros(len(passages), 5), 2)
