"""How far a mean over questions can be trusted, and whether two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragstone._extras import extra
from ragstone.errors import InputError

__all__ = ["Comparison", "bootstrap_interval", "compare_scores"]

RESAMPLES = 2000
PERMUTATIONS = 9999
_BATCH_ELEMENTS = 2_000_000
"""Numbers that are held at once while resampling."""


@dataclass(frozen=True)
class Comparison:
    """The mean of one score in two runs over the same n questions.

    Attributes:
        mean, other_mean: of this run and of the other.
        difference: ``mean`` − ``other_mean``.
        interval: the 95 % bootstrap interval of the difference.
        p_value: of the paired permutation test, two-sided: how often a difference of this size arises where it is left
            to chance, question by question, which run has which score.
    """

    n: int
    mean: float
    other_mean: float
    difference: float
    interval: tuple[float, float]
    p_value: float


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron 1979), from 2,000 resamples of the questions.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    stats = extra("evaluation", "scipy.stats", "A confidence interval")
    sample = np.asarray(values, dtype=float)
    if not len(sample):
        raise InputError("values is empty; an interval needs at least 1 question")
    if bool((sample == sample[0]).all()):  # also a single question, which scipy refuses
        return float(sample[0]), float(sample[0])
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_batch(len(sample)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def compare_scores(values: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Comparison:
    """Compare two runs by their scores (n,) on the same n questions in the same order.

    Two questions of two differ, and of the four ways to swap them two give a difference as large:

    >>> compare_scores([1.0, 1.0], [0.0, 0.0]).p_value
    0.5
    """
    stats = extra("evaluation", "scipy.stats", "A comparison of two runs")
    first, second = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    if not len(first) or first.shape != second.shape:
        raise InputError(f"{len(first)} scores came with {len(second)} others; compare runs over the same questions")
    difference = first - second
    p_value = 1.0
    if difference.any() and len(difference) > 1:  # a single pair can only be swapped, and says nothing
        p_value = stats.permutation_test(
            (first, second),
            _mean_difference,
            permutation_type="samples",
            vectorized=True,
            n_resamples=PERMUTATIONS,
            batch=_batch(len(difference)),
            rng=np.random.default_rng(seed),
        ).pvalue
    return Comparison(
        n=len(difference),
        mean=float(first.mean()),
        other_mean=float(second.mean()),
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference.tolist(), seed=seed),
        p_value=float(p_value),
    )


def _mean_difference(first: Any, second: Any, axis: int = -1) -> Any:
    return np.mean(first - second, axis=axis)


def _batch(n: int) -> int:
    return max(_BATCH_ELEMENTS // n, 1)
