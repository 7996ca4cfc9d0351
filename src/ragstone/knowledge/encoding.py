"""What a knowledge base needs of an encoder, and how it comes by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ragstone.errors import ModelError
from ragstone.knowledge.passages import Passage

__all__ = ["TextEncoder", "check_finite", "encode_passages", "load", "question_encoder_of"]


class TextEncoder(Protocol):
    """Texts in, vectors out; `ragstone.encoders.Encoder` is one."""

    @property
    def width(self) -> int:
        """D, the width of the vectors."""

    @property
    def spec(self) -> Any:
        """Its ``EncoderSpec``."""

    def encode_passages(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Encode (title, text) pairs to (N, D) float32; ``progress`` gets the number of passages just done."""

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Encode questions to (B, D) float32."""


def load(name: str | Path, spec: Mapping[str, Any] | None, *, device: Any, dtype: Any) -> TextEncoder:
    """Load the encoder ``name``; with ``spec``, the fields of an ``EncoderSpec``, set up as that one was."""
    from ragstone.encoders import load_encoder

    chosen = ("pooling", "normalize", "question_prompt", "passage_prompt", "max_length")
    options = {key: spec[key] for key in chosen if key in spec} if spec else {}
    return load_encoder(name, device=device, dtype=dtype, **options)


def question_encoder_of(encoder: TextEncoder, *, device: Any, dtype: Any) -> TextEncoder | None:
    """Return what encodes questions where ``encoder`` encodes passages, or None where that is not at hand.

    It is the same, but for DPR, whose two encoders are two models. They are named alike, so the one leads to the other.
    """
    if type(getattr(encoder, "model", None)).__name__ != "DPRContextEncoder":
        return encoder
    name = str(encoder.spec.name)
    if "ctx_encoder" not in name:
        return None
    try:
        return load(name.replace("ctx_encoder", "question_encoder"), None, device=device, dtype=dtype)
    except ModelError:
        return None


def encode_passages(
    encoder: TextEncoder, passages: Sequence[Passage], progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Return the vectors (N, D) of N passages."""
    vectors = encoder.encode_passages([(passage.title, passage.text) for passage in passages], progress=progress)
    return check_finite(vectors, passages)


def check_finite(vectors: np.ndarray, passages: Sequence[Passage]) -> np.ndarray:
    """Return the vectors (N, D) of N passages; raise ModelError if a number in them is not finite."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = passages[int(np.argmin(finite))]
        raise ModelError(f"the encoder's vector of passage {bad.id!r} is not finite; load the encoder in float32")
    return vectors
