"""Vectors like those of texts, bases made of them, and search by definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ragstone.knowledge import Hit, KnowledgeBase, Passage


def low_dimensional(count: int, width: int, seed: int) -> np.ndarray:
    """Vectors (count, width) that lie near a 12-dimensional plane, as texts' do, with lengths from 0.5 to 2."""
    plane = np.random.default_rng(99).standard_normal((12, width))
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, 12)) @ plane + 0.05 * random.standard_normal((count, width))
    return (vectors * random.uniform(0.5, 2, (count, 1))).astype(np.float32)


def brute_force(ids: list[str], vectors: np.ndarray, question: np.ndarray, k: int) -> list[tuple[str, float]]:
    """The definition: all inner products, the largest first, equal ones by id."""
    scores = (vectors.astype(np.float64) @ question.astype(np.float64)).astype(np.float32)
    return sorted(zip(ids, scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))[:k]


def found(hits: list[Hit]) -> list[tuple[str, float]]:
    return [(hit.passage.id, hit.score) for hit in hits]


def filled(path: Path, vectors: np.ndarray) -> tuple[KnowledgeBase, list[str]]:
    kb = KnowledgeBase.create(path, encoder=None, width=vectors.shape[1])
    ids = [f"p{place * 7919 % len(vectors)}" for place in range(len(vectors))]
    pages = [Passage(id_, text=f"word{place % 5}", page=place % 10) for place, id_ in enumerate(ids)]
    kb.add(pages, vectors=vectors)
    return kb, ids
