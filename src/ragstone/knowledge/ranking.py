"""Rankings: candidates scored by inner product or by rank, equal scores ordered by passage id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ragstone.knowledge.storage import PassageStore

__all__ = ["Ranking", "exact_candidates", "fuse", "rank", "rescore", "spread"]

_FUSION_CONSTANT = 60  # Cormack, Clarke and Büttcher 2009, §2
_FLOAT32_ROUNDING = 2.0**-24

Block = tuple[np.ndarray, np.ndarray]
"""Row ids (n,) and their vectors (n, D)."""


@dataclass(frozen=True)
class Ranking:
    """What one question found, best first: row ids (k,), passage ids and scores (k,).

    A passage id may be "" where nothing but the score decides the passage's place. ``keyword_scores`` (k,) are those by
    words, where words were looked up.
    """

    row_ids: np.ndarray
    passage_ids: list[str]
    scores: np.ndarray
    keyword_scores: np.ndarray | None = None

    def at(self, places: Sequence[int] | np.ndarray) -> Ranking:
        """Return what is at ``places`` (n,), in that order."""
        words = None if self.keyword_scores is None else self.keyword_scores[places]
        return Ranking(self.row_ids[places], [self.passage_ids[place] for place in places], self.scores[places], words)

    def with_words(self, words: Ranking, depth: int) -> Ranking:
        """Return this ranking with the scores of ``words``, the first ``depth`` by words.

        A passage that those lack has no word in common with the question or, where they are ``depth``, at most the last
        score: then it is given that one.
        """
        known = dict(zip(words.row_ids.tolist(), words.scores.tolist(), strict=True))
        least = words.scores[-1] if depth == len(words.scores) else 0.0
        return replace(self, keyword_scores=np.array([known.get(i, least) for i in self.row_ids.tolist()]))


def rank(row_ids: np.ndarray, passage_ids: Sequence[str], scores: np.ndarray, k: int) -> Ranking:
    """Return the ``k`` best of n candidates by descending score; equal scores are ordered by passage id."""
    keys = [*zip((-scores).tolist(), passage_ids, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)[:k]
    return Ranking(row_ids, list(passage_ids), scores).at(order)


def fuse(rankings: Sequence[Ranking], k: int) -> Ranking:
    """Return the ``k`` best by reciprocal rank fusion: the score of a passage is the sum of 1 / (60 + its rank).

    Cormack, Clarke and Büttcher (2009), "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods". Ranks count from 1; a passage that a ranking lacks gets nothing from it.
    """
    passage_ids: dict[int, str] = {}
    scores: dict[int, float] = {}
    for ranking in rankings:
        for place, row_id in enumerate(ranking.row_ids.tolist()):
            passage_ids[row_id] = ranking.passage_ids[place]
            scores[row_id] = scores.get(row_id, 0.0) + 1 / (_FUSION_CONSTANT + place + 1)
    return rank(np.array([*scores], np.uint64), [*passage_ids.values()], np.array([*scores.values()]), k)


def exact_candidates(blocks: Iterable[Block], questions: np.ndarray, k: int) -> list[np.ndarray]:
    """Return, for each of ``questions`` (B, D), the row ids (n,) of all vectors that may be among its ``k`` best.

    Products are taken in float32. A vector is kept if it could reach the k-th best within the rounding error
    2 · D · 2^-24 · |q| · |d|, so the true best k are always among the n, and so are all that tie with the last.
    """
    question_lengths = np.linalg.norm(questions, axis=1)
    kept = [(np.empty(0, np.uint64), np.empty(0, np.float32))] * len(questions)
    longest = 0.0
    for row_ids, vectors in blocks:
        longest = max(longest, float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max(initial=0.0))))
        slack = 4 * vectors.shape[1] * _FLOAT32_ROUNDING * longest * question_lengths
        for b, scores in enumerate(questions @ vectors.T):
            ids, best = np.concatenate([kept[b][0], row_ids]), np.concatenate([kept[b][1], scores])
            if len(ids) > k:
                keep = best >= np.partition(best, -k)[-k] - slack[b]
                ids, best = ids[keep], best[keep]
            kept[b] = ids, best
    return [ids for ids, _ in kept]


def rescore(
    store: PassageStore, candidates: Sequence[np.ndarray], questions: np.ndarray, k: int, *, named: bool = False
) -> tuple[list[Ranking], Block]:
    """Return the ``k`` best of each question's candidates by q·d, and the vectors of all candidates, sorted by row id.

    Products are summed in float64 and rounded to float32, so a passage has the same score whichever way it was found.
    Passage ids are read for all that are found if they are to be ``named``, else only for those with equal scores, which
    the ids put in order; the others have "".
    """
    union = np.unique(np.concatenate(candidates))
    vectors = store.vectors_of(union)
    kept = []
    for row_ids, question in zip(candidates, questions, strict=True):
        places = np.searchsorted(union, row_ids)
        # No matmul: for so few products BLAS would wait for its threads.
        scores = np.einsum("nd,d->n", vectors[places], question.astype(np.float64)).astype(np.float32)
        if len(scores) > k:
            best = scores >= np.partition(scores, -k)[-k]  # more than k where scores are equal
            places, scores = places[best], scores[best]
        kept.append((union[places], scores))
    needed = np.unique(np.concatenate([row_ids if named else row_ids[_equal(scores)] for row_ids, scores in kept]))
    passage_ids = dict(zip(needed.tolist(), store.ids_of(needed), strict=True))
    rankings = [rank(ids, [passage_ids.get(i, "") for i in ids.tolist()], scores, k) for ids, scores in kept]
    return rankings, (union, vectors)


def _equal(scores: np.ndarray) -> np.ndarray:
    """Return which of ``scores`` (n,) occur more than once (n,)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    equal: np.ndarray = counts[inverse] > 1
    return equal


def spread(ranking: Ranking, documents: Sequence[str | None], count: int, k: int) -> Ranking:
    """Return the ``k`` best with at most ``count`` of each of the ``documents`` (n,); None is a document of its own."""
    seen: dict[str | None, int] = {}
    places = []
    for place, document in enumerate(documents):
        seen[document] = seen.get(document, 0) + 1
        if document is None or seen[document] <= count:
            places.append(place)
    return ranking.at(places[:k])
