"""Whether probabilities mean what they say, and whether retrieval still does anything: numbers in, numbers out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ragstone.errors import InputError

__all__ = ["CalibrationBin", "calibration_bins", "calibration_error", "entropy", "same_passages"]


@dataclass(frozen=True)
class CalibrationBin:
    """The answers whose probability lies in (``low``, ``high``]: how many, how sure on average, how many right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration_bins(probabilities: Sequence[float], correct: Sequence[bool], bins: int = 10) -> list[CalibrationBin]:
    """Sort answers by their probability into bins of equal width; bins without answers are left out.

    >>> [(b.count, b.confidence, b.accuracy) for b in calibration_bins([0.25, 0.75, 0.75], [False, True, False], 2)]
    [(1, 0.25, 0.0), (2, 0.75, 0.5)]
    """
    if bins < 1:
        raise InputError(f"bins={bins}: take at least 1")
    members: dict[int, list[tuple[float, bool]]] = {}
    for probability, right in zip(probabilities, correct, strict=True):
        place = min(max(math.ceil(probability * bins) - 1, 0), bins - 1)
        members.setdefault(place, []).append((probability, right))
    return [
        CalibrationBin(
            place / bins,
            (place + 1) / bins,
            len(found),
            sum(probability for probability, _ in found) / len(found),
            sum(right for _, right in found) / len(found),
        )
        for place, found in sorted(members.items())
    ]


def calibration_error(probabilities: Sequence[float], correct: Sequence[bool], bins: int = 10) -> float:
    """Return the expected calibration error Σ_bin (n_bin / n) · |accuracy − confidence| (Guo et al. 2017, eq. 3).

    >>> calibration_error([0.75, 0.75], [True, False])
    0.25
    """
    found = calibration_bins(probabilities, correct, bins)
    total = sum(each.count for each in found)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in found) / total if total else 0.0


def entropy(probabilities: Iterable[float]) -> float:
    """Return −Σ p log p in nats: log K if all K passages matter alike, 0 if one does alone.

    >>> entropy([0.5, 0.5]) == math.log(2), entropy([1.0, 0.0])
    (True, 0.0)
    """
    return -sum(p * math.log(p) for p in probabilities if p > 0) + 0.0


def same_passages(retrieved: Iterable[Iterable[str]]) -> float:
    """Return the share of questions that got the very passages, in any order, that another one got too.

    Where retrieval has collapsed (paper, appendix H) this is near 1: the retriever finds the same whatever is asked.

    >>> same_passages([["a", "b"], ["b", "a"], ["a", "c"], ["d", "e"]])
    0.5
    """
    sets = [frozenset(ids) for ids in retrieved]
    counts = Counter(sets)
    return sum(counts[each] > 1 for each in sets) / len(sets) if sets else 0.0
