"""Stale vectors find the candidates, fresh ones rank them: retrieval while the passage encoder learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ragstone.errors import InputError
from ragstone.knowledge import Hit, Passage

__all__ = ["FreshHits", "rescore"]


@dataclass(frozen=True)
class FreshHits:
    """The best of the candidates of B questions by fresh vectors, best first.

    Attributes:
        hits: B lists of at most K hits, with their fresh scores and vectors.
        vectors: (B, K, D), with gradient; zero in empty slots.
        scores: (B, K), q·d with gradient; zero in empty slots.
        mask: (B, K), whether a slot holds a passage.
    """

    hits: list[list[Hit]]
    vectors: Tensor
    scores: Tensor
    mask: Tensor


def rescore(
    question_vectors: Tensor,
    hits: Sequence[Sequence[Hit]],
    encode_passages: Callable[[list[Passage]], Tensor],
    k: int,
) -> FreshHits:
    """Score all C candidates of each question with fresh vectors, and keep the ``k`` best.

    Passages are chosen without gradient and then scored with gradient, so memory is needed for those kept alone. Each
    passage is encoded once for all questions. Equal scores are ordered by passage id, as in `KnowledgeBase.search`.

    Args:
        question_vectors: (B, D).
        hits: B lists of up to C candidates, found by vectors that may be stale; C should exceed ``k``.
        encode_passages: N passages to their vectors (N, D), with gradient where that is on.
        k: K, how many are kept of each question.
    """
    if k < 1:
        raise InputError(f"k={k} must be at least 1")
    if len(hits) != len(question_vectors):
        raise InputError(
            f"there are {len(question_vectors)} question vectors and {len(hits)} lists of hits; give one each"
        )
    with torch.no_grad():
        candidates, fresh = _encode(hits, encode_passages, question_vectors)
        kept = [
            sorted(
                (
                    replace(hit, score=float(vector @ question), vector=vector.float().cpu().numpy())
                    for hit, vector in zip(row, fresh[[candidates[hit.passage.id] for hit in row]], strict=True)
                ),
                key=lambda hit: (-hit.score, hit.passage.id),
            )[:k]
            for question, row in zip(question_vectors, hits, strict=True)
        ]
    places, vectors = _encode(kept, encode_passages, question_vectors)
    empty = len(places)  # the row of zeros that follows the vectors
    slots = [[places[hit.passage.id] for hit in row] + [empty] * (k - len(row)) for row in kept]
    index = torch.tensor(slots, dtype=torch.long, device=vectors.device).reshape(len(kept), k)
    chosen = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])[index]
    scores = torch.einsum("bd,bkd->bk", question_vectors, chosen)
    return FreshHits(kept, chosen, scores, index != empty)


def _encode(
    hits: Sequence[Sequence[Hit]], encode_passages: Callable[[list[Passage]], Tensor], question_vectors: Tensor
) -> tuple[dict[str, int], Tensor]:
    """Return the place of each distinct passage by its id, and the vectors (n, D) in that order."""
    passages = {hit.passage.id: hit.passage for row in hits for hit in row}
    width = question_vectors.shape[1]
    vectors = encode_passages([*passages.values()]) if passages else question_vectors.new_zeros(0, width)
    if vectors.shape != (len(passages), width):
        raise InputError(
            f"encode_passages gave {tuple(vectors.shape)} for {len(passages)} passages; it must give (N, D) with the "
            f"width {width} of the question vectors"
        )
    return {id_: place for place, id_ in enumerate(passages)}, vectors
