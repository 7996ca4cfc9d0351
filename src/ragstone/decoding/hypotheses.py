"""What is known of one question's hypotheses while RAG-Sequence looks for the best: scores so far, and bounds on the rest.

Every statement here follows from two facts: a probability is at most 1, and the probabilities of different complete strings
under one passage add up to at most 1. So a hypothesis h that is not scored under passage z has there at most what the
hypotheses that are scored leave over, r(z) = 1 − Σ p(h'|x,z), and no string at all exceeds Σ p(z)·r(z) beside them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ragstone.decoding.scoring import Hypothesis

__all__ = ["HypothesisTable"]

Floats = NDArray[np.float64]

_SLACK = 1e-5
"""Added to every upper bound of a probability, so that rounding in float32 never drops or certifies the wrong string."""


class HypothesisTable:
    """The hypotheses of one question and log p(h|x,z) of each under its K passages, as far as it is known.

    Args:
        log_prior: (K,), log p(z|x).
        disjoint: whether different hypotheses exclude each other. They do unless the caller stops strings early, or the
            model writes padding, which is not scored.
    """

    def __init__(self, log_prior: Tensor, *, disjoint: bool = True) -> None:
        self.log_prior: Floats = log_prior.double().cpu().numpy()
        self.disjoint = disjoint
        real = np.flatnonzero(~np.isneginf(self.log_prior))
        self.order = [int(k) for k in real[np.argsort(-self.log_prior[real], kind="stable")]]
        self.seen: list[int] = []
        """Passages that have been searched, in the order of the prior."""
        self.hypotheses: list[Hypothesis] = []
        self.found: list[tuple[int, int]] = []
        """(hypothesis, passage) for every string that a search produced, repeats included."""
        self.log_probs: Floats = np.full((0, len(self.log_prior)), np.nan)
        """(H, K) log p(h|x,z); NaN where it is not known."""
        self.tokens: dict[tuple[int, int], Tensor] = {}
        """Its summands by token (T',), for every pair that is known."""
        self._number: dict[Hypothesis, int] = {}

    def add(self, hypothesis: Hypothesis, passage: int) -> int:
        """Take note of what a search under ``passage`` produced, and return its number."""
        number = self._number.setdefault(hypothesis, len(self.hypotheses))
        if number == len(self.hypotheses):
            self.hypotheses.append(hypothesis)
            self.log_probs = np.vstack([self.log_probs, np.full((1, len(self.log_prior)), np.nan)])
        self.found.append((number, passage))
        return number

    def score(self, number: int, passage: int, token_log_probs: Tensor) -> None:
        """Set log p(y_t|x,z,y_<t) (T',) of a hypothesis under a passage."""
        self.tokens[number, passage] = token_log_probs
        self.log_probs[number, passage] = float(token_log_probs.double().sum())

    def leftover(self) -> Floats:
        """r(z) (K,): what the hypotheses that are scored under a passage leave to all other strings."""
        if not self.disjoint:
            return np.ones_like(self.log_prior)
        known = np.where(np.isnan(self.log_probs), -np.inf, self.log_probs)
        return np.clip(1.0 - np.exp(known).sum(axis=0) + _SLACK, 0.0, 1.0)

    def bounds(self) -> tuple[Floats, Floats]:
        """log p(h|x) is at least and at most: (H,), (H,)."""
        joint = np.where(np.isnan(self.log_probs), -np.inf, self.log_probs) + self.log_prior
        low = _logsumexp(joint)
        rest = (np.isnan(self.log_probs) * np.exp(self.log_prior) * self.leftover()).sum(axis=1)
        with np.errstate(divide="ignore"):
            return low, np.logaddexp(low, np.log(rest))

    def candidates(self, count: int) -> NDArray[np.intp]:
        """The hypotheses that may still be among the best ``count``: all whose upper bound reaches the count-th lower."""
        low, high = self.bounds()
        if len(low) <= count:
            return np.arange(len(low))
        return np.flatnonzero(high >= np.sort(low)[-count] - _SLACK)

    def unscored(self, numbers: NDArray[np.intp], passages: list[int]) -> list[tuple[int, int]]:
        """The pairs of ``numbers`` and ``passages`` that are not known, by passage."""
        return [(int(h), k) for k in passages for h in numbers if np.isnan(self.log_probs[h, k])]

    def certified(self) -> bool:
        """Whether the best hypothesis beats every string there is, whatever the passages that were not searched hold.

        L(y) > max( U(h) of all others, Σ_z p(z)·r(z) ), where r(z) = 1 for a passage that was not searched.
        """
        if not self.hypotheses or not self.disjoint:
            return False
        low, high = self.bounds()
        best = int(low.argmax())
        others = np.delete(high, best)
        anything = np.exp(self.log_prior) @ self.leftover()
        return bool(np.exp(low[best]) > max(np.exp(others).max(initial=0.0), anything))

    def next_passages(self, *, stop_early: bool) -> list[int]:
        """The passages to search next, none when all are seen.

        With ``stop_early``, as few as would certify the winner if they behaved like those seen so far (at first: if all of
        them were certain of one string); all that are left if that is out of reach.
        """
        left = self.order[len(self.seen) :]
        if not stop_early or not left:
            return left
        prior = np.exp(self.log_prior)
        seen, confidence, runner_up, spare = 0.0, 1.0, 0.0, 0.0
        if self.seen:
            low, _ = self.bounds()
            seen = prior[self.seen].sum()
            ranked = np.sort(np.exp(low))[::-1]
            confidence, runner_up = ranked[0] / seen, (ranked[1] / seen if len(ranked) > 1 else 0.0)
            spare = float(prior[self.seen] @ self.leftover()[self.seen]) / seen
        for count in range(1, len(left)):
            seen += prior[left[count - 1]]
            if confidence * seen > max(runner_up, spare) * seen + (1.0 - seen):
                return left[:count]
        return left


def _logsumexp(values: Floats) -> Floats:
    """Over the last axis; −inf where all are."""
    top = values.max(axis=-1, initial=-np.inf)
    safe = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(values - safe[:, None]).sum(axis=-1)))
