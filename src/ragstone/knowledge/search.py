"""Search: exact or by candidates that are rescored exactly, by words, or by both fused. What it does at each size it says.

Candidates come from quantised codes in memory, or from an index on disk where the codes would not fit (see `Searcher`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ragstone.knowledge.codes import Codes, codes_bytes, current_codes
from ragstone.knowledge.disk_index import DiskIndex
from ragstone.knowledge.memory import default_memory
from ragstone.knowledge.passages import Passage, instances
from ragstone.knowledge.ranking import Block, Ranking, exact_candidates, fuse, rank, rescore, spread
from ragstone.knowledge.selftest import LEAST_RECALL, SelfTest, measure, read_self_test, write_self_test
from ragstone.knowledge.storage import PassageStore

__all__ = ["EXACT_BELOW", "DenseWay", "Hit", "SearchMethod", "SearchOptions", "Searcher"]

EXACT_BELOW = 50_000
"""With fewer passages, dense search compares all vectors: that takes milliseconds and needs no codes."""

_LEAST_CANDIDATES = 50
_BREADTH = 4  # candidates per passage wanted, before anything was measured
_BREADTHS = (1.25, 1.5, 2, 3, 4, 8, 16)
_FEW_ALLOWED = 2000  # rows that fulfil a predicate: they are all compared
_REMEMBERED_PREDICATES = 8
_DEEPEST = 10_000  # passages of a ranking that are looked through for other documents
_SLICE_BYTES = 256 << 20  # of candidates' vectors at a time
_NOTHING: Block = np.empty(0, np.uint64), np.empty((0, 1), np.float32)

_NO_INDEX = (
    "has no index for search by vector and its codes would not fit the memory given; all vectors are compared, which "
    "is slow: call KnowledgeBase.prepare, or give more memory"
)

logger = logging.getLogger(__name__)

SearchMethod = Literal["dense", "exact", "keyword", "hybrid"]
DenseWay = Literal["exact", "quantised", "coarse", "disk"]
_BITS: dict[DenseWay, int] = {"quantised": 4, "coarse": 2}  # of the codes, by the ways that search by them


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found, its score, and its vector (D,), from which a model recomputes q·d with gradient.

    ``keyword_score`` is its BM25 score where it was searched by words, alone or as well, and 0 elsewhere. A hit made by
    hand may leave its vector out, (0,): a pipeline encodes the passages that it is given.
    """

    passage: Passage
    score: float
    vector: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32), repr=False, compare=False)
    keyword_score: float = field(default=0.0, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is looked for.

    Attributes:
        k: how many passages.
        method: how they are found.
        where: an SQL predicate that they must fulfil.
        min_score: the least score.
        per_document: how many of one document at most.
    """

    k: int
    method: SearchMethod = "dense"
    where: str | None = None
    min_score: float | None = None
    per_document: int | None = None


class Searcher:
    """Searches one version after another of a knowledge base, and keeps in memory what the next question needs too.

    Args:
        folder: the base's.
        base_id: its name.
        memory: how many bytes the codes, the vectors of a small base or the cache of the index on disk may take; half
            of the machine's memory by default.
    """

    def __init__(self, folder: Path, base_id: str, memory: int | None = None) -> None:
        self.memory = default_memory() if memory is None else memory
        self._folder = folder
        self._base_id = base_id
        self._codes: Codes | None = None
        self._codes_lock = threading.Lock()  # they are brought to another version in place
        self._disk: DiskIndex | None = None
        self._blocks: tuple[int, list[Block]] | None = None  # all vectors of a version of a small base
        self._allowed: dict[tuple[int, str], np.ndarray] = {}
        self._tests: dict[tuple[int, str], SelfTest | None] = {}  # by version and way
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Searcher:
        return Searcher(self._folder, self._base_id, self.memory)

    def fitting_way(self, store: PassageStore) -> DenseWay:
        """Return the way of searching by vector that is right for the size of the base and the memory."""
        count = len(store)
        if count < EXACT_BELOW and 4 * store.width * count <= self.memory:
            return "exact"
        for way, bits in _BITS.items():
            if codes_bytes(count, store.width, bits) <= self.memory:
                return way
        return "disk"

    def lacks_disk_index(self, store: PassageStore) -> bool:
        """Return whether search by vector needs an index on disk that is not there."""
        return self.fitting_way(store) == "disk" and not self._disk_index(store).exists

    def dense_way(self, store: PassageStore) -> DenseWay:
        """Return what ``method="dense"`` does: the fitting way, or "exact" where that is not there or finds too little."""
        way = self.fitting_way(store)
        if self.lacks_disk_index(store):
            self._warn("no index", _NO_INDEX)
            return "exact"
        test = None if way == "exact" else self._known_test(store, way)
        if test is not None and test.recall < LEAST_RECALL:
            self._warn(
                "recall", f"is searched exactly, for {way} search finds only {test.recall:.0%} of what that does"
            )
            return "exact"
        return way

    def self_test(self, store: PassageStore) -> SelfTest | None:
        """Return what approximate search finds of what exact search finds, measured now if it was not; None: exact."""
        way = self.fitting_way(store)
        if way == "exact" or not len(store) or self.lacks_disk_index(store):
            return None
        test = self._known_test(store, way)
        if test is None:
            if way in _BITS:
                test = measure(store, way, lambda q, k, b: self._search_codes(store, q, _count(k, b)), _BREADTHS)
            else:
                disk = self._disk_index(store)
                test = measure(store, way, lambda q, k, b: disk.search(q, _count(k), int(b)), disk.breadths)
            write_self_test(self._folder, self._base_id, store, test)
            self._tests[store.version, way] = test
        return test

    def search(
        self, store: PassageStore, texts: Sequence[str] | None, vectors: np.ndarray | None, options: SearchOptions
    ) -> list[list[Hit]]:
        """Return up to ``k`` hits for each of B questions: their ``texts``, their ``vectors`` (B, D), or both."""
        count = len(texts if texts is not None else vectors)  # type: ignore[arg-type]
        step = max(1, min(1024, _SLICE_BYTES // (4 * store.width * _count(options.k))))
        hits: list[list[Hit]] = []
        for start in range(0, count, step):
            part = slice(start, start + step)
            some_texts, some_vectors = (None if both is None else both[part] for both in (texts, vectors))
            rankings, read = self._spread(store, some_texts, some_vectors, options)  # type: ignore[arg-type]
            with _uncollected():
                hits += _hits(store, rankings, read, options.min_score)
        return hits

    def _spread(
        self, store: PassageStore, texts: Sequence[str] | None, vectors: np.ndarray | None, options: SearchOptions
    ) -> tuple[list[Ranking], Block]:
        """Return rankings with at most ``per_document`` passages of a document, from as long ones as that takes.

        With them come the vectors that were read for them.
        """
        k, depth = options.k, options.k
        rankings, read = self._rankings(store, texts, vectors, depth, options)
        if options.per_document is None:
            return rankings, read
        while True:
            union = np.unique(np.concatenate([ranking.row_ids for ranking in rankings]))
            documents = store.fetch(union, ["document_id"])["document_id"].to_pylist()
            chosen = [
                spread(r, [documents[i] for i in np.searchsorted(union, r.row_ids)], options.per_document, k)
                for r in rankings
            ]
            short = [len(r.row_ids) == depth and len(c.row_ids) < k for r, c in zip(rankings, chosen, strict=True)]
            if not any(short) or depth >= max(_DEEPEST, k):
                return chosen, read
            depth = min(4 * depth, max(_DEEPEST, k))
            rankings, read = self._rankings(store, texts, vectors, depth, options)

    def _rankings(
        self,
        store: PassageStore,
        texts: Sequence[str] | None,
        vectors: np.ndarray | None,
        k: int,
        options: SearchOptions,
    ) -> tuple[list[Ranking], Block]:
        where = options.where
        if options.method == "keyword":
            return [_by_words(store, text, k, where) for text in texts or ()], _NOTHING
        if options.method == "hybrid":
            depth = max(_LEAST_CANDIDATES, 4 * k)
            dense, read = self._by_vector(store, vectors, depth, "dense", where, named=True)
            words = [_by_words(store, text, depth, where) for text in texts or ()]
            return [fuse(pair, k).with_words(pair[1], depth) for pair in zip(dense, words, strict=True)], read
        return self._by_vector(store, vectors, k, options.method, where)

    def _by_vector(
        self,
        store: PassageStore,
        vectors: np.ndarray | None,
        k: int,
        method: SearchMethod,
        where: str | None,
        *,
        named: bool = False,
    ) -> tuple[list[Ranking], Block]:
        if vectors is None:
            return [], _NOTHING
        return rescore(store, self._candidates(store, vectors, k, method, where), vectors, k, named=named)

    def _candidates(
        self, store: PassageStore, vectors: np.ndarray, k: int, method: SearchMethod, where: str | None
    ) -> Sequence[np.ndarray]:
        """Return, for each of B questions, the row ids that the best ``k`` are among, or most of them."""
        way = "exact" if method == "exact" else self.dense_way(store)
        if way == "exact":
            return exact_candidates(self._vectors(store, where), vectors, k)
        allowed = None if where is None else self._fulfilling(store, where)
        if allowed is not None and len(allowed) <= _FEW_ALLOWED:
            return [allowed] * len(vectors)
        test = self.self_test(store)
        if way == "disk":
            disk = self._disk_index(store)
            return disk.search(vectors, _count(k), int(test.breadth) if test else disk.parts, where)
        return list(self._search_codes(store, vectors, _count(k, test.breadth if test else _BREADTH), allowed))

    def _search_codes(
        self, store: PassageStore, vectors: np.ndarray, count: int, allowed: np.ndarray | None = None
    ) -> np.ndarray:
        with self._codes_lock:
            bits = _BITS[self.fitting_way(store)]
            self._codes = current_codes(self._folder, self._base_id, store, self._codes, bits)
            return self._codes.search(vectors, count, allowed)

    def _disk_index(self, store: PassageStore) -> DiskIndex:
        disk = self._disk
        if disk is None or disk.version != store.version:
            self._disk = disk = DiskIndex(store, self.memory)
        return disk

    def _known_test(self, store: PassageStore, way: str) -> SelfTest | None:
        key = store.version, way
        if self._tests.get(key) is None:
            self._tests[key] = read_self_test(self._folder, self._base_id, store, way)
        return self._tests[key]

    def _fulfilling(self, store: PassageStore, where: str) -> np.ndarray:
        """Return the row ids that fulfil ``where``; those of the last few predicates stay in memory."""
        key = store.version, where
        allowed = self._allowed.get(key)
        if allowed is None:
            allowed = store.row_ids(where)
            kept = [*self._allowed.items()][1 - _REMEMBERED_PREDICATES :]
            self._allowed = dict([*kept, (key, allowed)])
        return allowed

    def _vectors(self, store: PassageStore, where: str | None) -> Iterator[Block]:
        """Yield the blocks of vectors of all rows that fulfil ``where``; those of a small base stay in memory."""
        if self.fitting_way(store) != "exact":
            yield from store.vectors(where)
            return
        blocks = self._blocks  # another thread may put those of another version there
        if blocks is None or blocks[0] != store.version:
            self._blocks = blocks = store.version, list(store.vectors())
        allowed = None if where is None else self._fulfilling(store, where)
        for row_ids, vectors in blocks[1]:
            if allowed is None:
                yield row_ids, vectors
            else:
                fulfil = np.isin(row_ids, allowed, assume_unique=True)
                yield row_ids[fulfil], vectors[fulfil]

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s %s", self._folder, message)


def _count(k: int, breadth: float = _BREADTH) -> int:
    """Return how many candidates are rescored for ``k`` passages."""
    return max(_LEAST_CANDIDATES, int(breadth * k))


def _by_words(store: PassageStore, question: str, k: int, where: str | None) -> Ranking:
    # Twice as many, so that equal scores at the end of the list are ordered by id too.
    found = rank(*store.search_words(question, 2 * k, where), k)
    return replace(found, keyword_scores=found.scores)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from looking through all objects of the process, time and again, while thousands are made."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _hits(store: PassageStore, rankings: Sequence[Ranking], read: Block, min_score: float | None) -> list[list[Hit]]:
    """Return what the passages of ``rankings`` are. Vectors that were ``read`` already are not read again."""
    if min_score is not None:
        rankings = [ranking.at(np.flatnonzero(ranking.scores >= min_score)) for ranking in rankings]
    union, places = np.unique(np.concatenate([ranking.row_ids for ranking in rankings]), return_inverse=True)
    passages, vectors = store.passages_of(union), [*_vectors_of(store, union, read)]
    words = [np.zeros(len(r.scores)) if r.keyword_scores is None else r.keyword_scores for r in rankings]
    columns = [
        [passages[place] for place in places.tolist()],
        np.concatenate([ranking.scores for ranking in rankings]).tolist(),
        [vectors[place] for place in places.tolist()],
        np.concatenate(words).tolist(),
    ]
    hits = iter(instances(Hit, columns))
    return [list(islice(hits, len(ranking.scores))) for ranking in rankings]


def _vectors_of(store: PassageStore, row_ids: np.ndarray, read: Block) -> np.ndarray:
    """Return the vectors (n, D) of the rows ``row_ids`` (n,), which are sorted, of those ``read`` and of the store."""
    _, here, there = np.intersect1d(row_ids, read[0], assume_unique=True, return_indices=True)
    if len(here) == len(row_ids):
        return read[1][there]
    vectors = np.empty((len(row_ids), store.width), np.float32)
    vectors[here] = read[1][there]
    rest = np.delete(np.arange(len(row_ids)), here)
    vectors[rest] = store.vectors_of(row_ids[rest])
    return vectors
