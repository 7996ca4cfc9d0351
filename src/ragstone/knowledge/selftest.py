"""How much approximate search finds of what exact search finds, measured on the base itself and kept beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ragstone.knowledge.manifest import write_file
from ragstone.knowledge.passages import content_hash
from ragstone.knowledge.ranking import exact_candidates, rescore
from ragstone.knowledge.storage import PassageStore

__all__ = ["LEAST_RECALL", "SELF_TEST_FILE", "SelfTest", "measure", "read_self_test", "write_self_test"]

SELF_TEST_FILE = "selftest.json"
LEAST_RECALL = 0.95
"""A way of searching that finds less of what exact search finds is not used."""

_ENOUGH_RECALL = {"quantised": 0.999, "coarse": 0.999, "disk": 0.99}  # more candidates in memory cost little
_QUESTIONS = 64
_K = 100
_NOISE = 0.5  # length of the difference between a question and a stored vector, per length of that vector
_CHANGED_SHARE = 0.25  # of the passages came or went since: what was measured holds no longer

Candidates = Callable[[np.ndarray, int, float], Iterable[np.ndarray]]
"""Questions (B, D), k and breadth in, B arrays of row ids out."""


@dataclass(frozen=True)
class SelfTest:
    """What approximate search finds of what exact search finds.

    Attributes:
        way: how candidates are found: "quantised", "coarse" or "disk".
        breadth: how widely it looks; for search by codes, candidates per passage wanted, on disk, parts of the index.
        recall: mean share of the ``k`` best passages that are found with that breadth.
        k: how many were looked for.
        questions: how many questions that was measured with: stored vectors, each moved by half its length.
        passages: how many passages there were.
        version: the version that it was measured on.
    """

    way: str
    breadth: float
    recall: float
    k: int
    questions: int
    passages: int
    version: int


def measure(store: PassageStore, way: str, candidates: Candidates, breadths: Sequence[float]) -> SelfTest:
    """Compare ``candidates`` with exact search over all vectors; the least of the ``breadths`` that suffices is taken.

    It takes one pass over all vectors.
    """
    row_ids = store.row_ids()
    random = np.random.default_rng(0)
    k = max(1, min(_K, len(row_ids) // 10))
    vectors = store.vectors_of(np.sort(random.choice(row_ids, min(_QUESTIONS, len(row_ids)), replace=False)))
    noise = random.standard_normal(vectors.shape, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    questions = vectors + _NOISE * lengths * noise
    best, _ = rescore(store, exact_candidates(store.vectors(), questions, k), questions, k)
    recall, breadth = 0.0, breadths[0]
    for breadth in breadths:
        found = candidates(questions, k, breadth)
        shares = [np.isin(ranking.row_ids, ids).mean() for ranking, ids in zip(best, found, strict=True)]
        recall = float(np.mean(shares))
        if recall >= _ENOUGH_RECALL[way]:
            break
    return SelfTest(way, breadth, recall, k, len(questions), len(row_ids), store.version)


def read_self_test(folder: Path, base_id: str, store: PassageStore, way: str) -> SelfTest | None:
    """Return what was measured of ``way`` on this base, if it still holds for the version of ``store``."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        held = json.loads((folder / SELF_TEST_FILE).read_bytes())
        test = SelfTest(**held["ways"][way])
        changed = abs(len(store) - test.passages)
        if held["key"] == _key(base_id, store) and changed <= _CHANGED_SHARE * test.passages:
            return test
    return None


def write_self_test(folder: Path, base_id: str, store: PassageStore, test: SelfTest) -> None:
    """Keep what was measured, where the folder can be written to."""
    path, key = folder / SELF_TEST_FILE, _key(base_id, store)
    ways = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(path.read_bytes())
        ways = dict(held["ways"]) if held["key"] == key else {}
    with contextlib.suppress(OSError):
        write_file(path, json.dumps({"key": key, "ways": {**ways, test.way: asdict(test)}}, indent=2).encode())


def _key(base_id: str, store: PassageStore) -> str:
    """Return what names the base and what made its vectors."""
    return content_hash(base_id, store.width, store.encoder)
