"""Loose passages: the built-in ones, a Dataset's or a user's own, in memory and searched exactly."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragstone import local
from ragstone.errors import InputError
from ragstone.knowledge.passages import Passage, as_passages
from ragstone.knowledge.search import Hit

if TYPE_CHECKING:
    from ragstone.encoders import Encoder

__all__ = ["PassageIndex", "dummy_passages"]

logger = logging.getLogger(__name__)


class PassageIndex:
    """Loose passages in memory, searched exactly.

    Args:
        passages: N passages.
        vectors: (N, D) float32, or None until they are encoded.
        dummy: whether these are the built-in passages.
    """

    def __init__(
        self, passages: Sequence[Passage], vectors: np.ndarray[Any, Any] | None = None, *, dummy: bool = False
    ) -> None:
        self.passages = list(passages)
        self.vectors = vectors
        self.dummy = dummy

    def __len__(self) -> int:
        return len(self.passages)

    @classmethod
    def from_dataset(cls, dataset: Any) -> PassageIndex:
        """From a ``datasets.Dataset`` (or anything with its columns) that holds title, text and embeddings."""
        missing = sorted({"title", "text", "embeddings"} - set(dataset.column_names))
        if missing:
            raise InputError(f"The dataset has no column {', '.join(missing)}; it needs title, text and embeddings.")
        vectors = np.asarray(dataset["embeddings"], dtype=np.float32)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise InputError(f"The embeddings have shape {vectors.shape} or hold NaN; they must be finite, (N, D).")
        ids = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
        rows = zip(ids, dataset["title"], dataset["text"], strict=True)
        return cls([Passage(str(i), title or "", text or "") for i, title, text in rows], vectors)

    @classmethod
    def load(cls, path: Path) -> PassageIndex:
        """What :meth:`save` wrote."""
        import pyarrow.parquet as parquet

        table = parquet.read_table(path)
        vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
        columns = (table[name].to_pylist() for name in ("id", "title", "text"))
        return cls([Passage(*row) for row in zip(*columns, strict=True)], vectors)

    def save(self, path: Path, vectors: np.ndarray[Any, Any]) -> None:
        """Write id, title, text and vector to a Parquet file."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns = {name: [getattr(p, name) for p in self.passages] for name in ("id", "title", "text")}
        parquet.write_table(arrow.table({**columns, "vector": list(vectors)}), path)

    def encode(self, encoder: Encoder) -> None:
        """Fill ``vectors``; those of the built-in passages are kept in the cache folder, by the encoder's fingerprint."""
        spec, cache = encoder.spec, None
        if self.dummy:
            name = f"{spec.fingerprint}-{spec.pooling}-{int(spec.normalize)}-{len(self)}.npy"
            cache = local.cache_folder() / "dummy" / name
        self.vectors = _load_vectors(cache, len(self))
        if self.vectors is None:
            self.vectors = encoder.encode_passages([(p.title, p.text) for p in self.passages])
            _save_vectors(cache, self.vectors)

    def search(self, questions: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any], k: int) -> list[list[Hit]]:
        """The k best by inner product: (B, D), (N, D) -> B lists."""
        if questions.shape[1] != vectors.shape[1]:
            raise InputError(
                f"The question vectors have width {questions.shape[1]}, the passages' {vectors.shape[1]}; "
                "use the encoder that belongs to them."
            )
        scores = questions @ vectors.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [Hit(self.passages[i], float(row[i]), vectors[i]) for i in best]
            for row, best in zip(scores, order.tolist(), strict=True)
        ]


def dummy_passages() -> list[Passage]:
    """The 200 general-knowledge passages that come with Ragstone."""
    lines = (files("ragstone.knowledge") / "dummy.jsonl").read_text(encoding="utf-8").splitlines()
    return as_passages(json.loads(line) for line in lines)


def _load_vectors(path: Path | None, count: int) -> np.ndarray[Any, Any] | None:
    if path is None:
        return None
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError):  # absent or damaged: it is only a cache
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == count else None


def _save_vectors(path: Path | None, vectors: np.ndarray[Any, Any]) -> None:
    if path is None:
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, vectors)
        temporary.replace(path)
    except OSError as error:
        logger.info("The vectors of the built-in passages are not cached: %s", error)
