"""Which passages answer a question: by vector (exact, or quantised and rescored), by words, or by both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ragstone.knowledge.codes import Codes, current_codes
from ragstone.knowledge.passages import Passage
from ragstone.knowledge.storage import PassageStore

__all__ = ["EXACT_BELOW", "Hit", "Ranking", "SearchMethod", "Searcher", "exact_candidates", "fuse", "rank"]

EXACT_BELOW = 50_000
"""With fewer passages, dense search compares all vectors: that takes milliseconds and needs no codes."""

_FUSION_CONSTANT = 60  # Cormack, Clarke and Büttcher 2009, §2
_FLOAT32_ROUNDING = 2.0**-24

SearchMethod = Literal["dense", "exact", "keyword", "hybrid"]

Block = tuple[np.ndarray, np.ndarray]
"""Row ids (n,) and their vectors (n, D)."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, its score, and its vector (D,), from which a model recomputes q·d with gradient."""

    passage: Passage
    score: float
    vector: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Ranking:
    """What one question found, best first: row ids (k,), passage ids and scores (k,)."""

    row_ids: np.ndarray
    passage_ids: list[str]
    scores: np.ndarray


def rank(row_ids: np.ndarray, passage_ids: Sequence[str], scores: np.ndarray, k: int) -> Ranking:
    """Return the ``k`` best of n candidates by descending score; equal scores are ordered by passage id."""
    order = sorted(range(len(row_ids)), key=lambda i: (-scores[i], passage_ids[i]))[:k]
    return Ranking(row_ids[order], [passage_ids[i] for i in order], scores[order])


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


class Searcher:
    """Searches one version after another of a knowledge base, and keeps in memory what the next question needs too."""

    def __init__(self, folder: Path, base_id: str) -> None:
        self._folder = folder
        self._base_id = base_id
        self._codes: Codes | None = None
        self._blocks: tuple[int, list[Block]] | None = None  # all vectors of a version of a small base

    def dense_method(self, store: PassageStore) -> Literal["exact", "quantised"]:
        """Return what ``method="dense"`` does at this size."""
        return "exact" if len(store) < EXACT_BELOW else "quantised"

    def search(
        self,
        store: PassageStore,
        texts: Sequence[str] | None,
        vectors: np.ndarray | None,
        k: int,
        method: SearchMethod,
        where: str | None,
    ) -> list[list[Hit]]:
        """Return up to ``k`` hits for each of B questions: their ``texts``, their ``vectors`` (B, D), or both."""
        if method == "keyword":
            rankings = [_by_words(store, text, k, where) for text in texts or ()]
        elif method == "hybrid":
            depth = max(50, 4 * k)
            dense = self._by_vector(store, vectors, depth, "dense", where)
            words = [_by_words(store, text, depth, where) for text in texts or ()]
            rankings = [fuse(pair, k) for pair in zip(dense, words, strict=True)]
        else:
            rankings = self._by_vector(store, vectors, k, method, where)
        return _hits(store, rankings)

    def _by_vector(
        self, store: PassageStore, vectors: np.ndarray | None, k: int, method: SearchMethod, where: str | None
    ) -> list[Ranking]:
        if vectors is None or not len(vectors):
            return []
        if method == "exact" or self.dense_method(store) == "exact":
            return _rescore(store, exact_candidates(self._vectors(store, where), vectors, k), vectors, k)
        self._codes = current_codes(self._folder, self._base_id, store, self._codes)
        allowed = None if where is None else store.row_ids(where)
        return _rescore(store, list(self._codes.search(vectors, max(50, 4 * k), allowed)), vectors, k)

    def _vectors(self, store: PassageStore, where: str | None) -> Iterator[Block]:
        """Yield the blocks of vectors of all rows that fulfil ``where``; those of a small base stay in memory."""
        if len(store) >= EXACT_BELOW:
            yield from store.vectors(where)
            return
        if self._blocks is None or self._blocks[0] != store.version:
            self._blocks = store.version, list(store.vectors())
        allowed = None if where is None else store.row_ids(where)
        for row_ids, vectors in self._blocks[1]:
            if allowed is None:
                yield row_ids, vectors
            else:
                fulfil = np.isin(row_ids, allowed, assume_unique=True)
                yield row_ids[fulfil], vectors[fulfil]


def _by_words(store: PassageStore, question: str, k: int, where: str | None) -> Ranking:
    # Twice as many, so that equal scores at the end of the list are ordered by id too.
    return rank(*store.search_words(question, 2 * k, where), k)


def _rescore(store: PassageStore, candidates: Sequence[np.ndarray], questions: np.ndarray, k: int) -> list[Ranking]:
    """Return the ``k`` best of each question's candidates by q·d, summed in float64 and rounded to float32.

    So a passage has the same score whichever way it was found.
    """
    union = np.unique(np.concatenate(candidates))
    passage_ids, vectors = store.fetch_vectors(union)
    rankings = []
    for row_ids, question in zip(candidates, questions.astype(np.float64), strict=True):
        places = np.searchsorted(union, row_ids)
        scores = (vectors[places] @ question).astype(np.float32)
        rankings.append(rank(row_ids, [passage_ids[i] for i in places], scores, k))
    return rankings


def _hits(store: PassageStore, rankings: Sequence[Ranking]) -> list[list[Hit]]:
    union = np.unique(np.concatenate([np.empty(0, np.uint64), *(ranking.row_ids for ranking in rankings)]))
    passages, vectors = store.fetch_passages(union)
    return [
        [
            Hit(passages[place], float(score), vectors[place])
            for place, score in zip(np.searchsorted(union, ranking.row_ids), ranking.scores, strict=True)
        ]
        for ranking in rankings
    ]
