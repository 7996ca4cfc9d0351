"""A small double of an encoder: the vector of a text is the sum of its words' random vectors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np


@dataclass(frozen=True)
class ToySpec:
    width: int
    name: str = "toy"
    fingerprint: str = "toy-1"
    pooling: str = "mean"
    normalize: bool = False

    def to_dict(self) -> dict:
        return asdict(self)


@lru_cache(maxsize=100_000)
def word_vector(word: str, width: int) -> np.ndarray:
    return np.random.default_rng(crc32(word.encode())).standard_normal(width).astype(np.float32)


class ToyEncoder:
    """Counts what it encodes in ``encoded``; ``delay`` is how many seconds it spends on each passage."""

    def __init__(self, width: int = 32, *, delay: float = 0.0, **spec) -> None:
        self.spec = ToySpec(width, **spec)
        self.width = width
        self.delay = delay
        self.encoded = 0

    def encode_passages(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        self.encoded += len(pairs)
        vectors = []
        for title, text in pairs:
            time.sleep(self.delay)
            vectors.append(self._vector(f"{title}\n{text}"))
            if progress is not None:
                progress(1)
        return np.array(vectors, np.float32).reshape(-1, self.width)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._vector(text) for text in texts], np.float32).reshape(-1, self.width)

    def _vector(self, text: str) -> np.ndarray:
        words = re.findall(r"\w+", text.lower())
        return sum((word_vector(word, self.width) for word in words), np.zeros(self.width, np.float32))
