"""One small interface over seq2seq and causal models: encode contexts once, score targets, step."""

from __future__ import annotations

from typing import Any

from ragstone.generators.base import DecodingState, EncodedContexts, Generator, trim_padding
from ragstone.generators.causal import CausalGenerator
from ragstone.generators.seq2seq import Seq2SeqGenerator

__all__ = [
    "CausalGenerator",
    "DecodingState",
    "EncodedContexts",
    "Generator",
    "Seq2SeqGenerator",
    "generator_for",
    "trim_padding",
]


def generator_for(model: Any, *, fast: bool = True) -> Generator:
    """The adapter for a raw Hugging Face model, by its own ``is_encoder_decoder``; ``fast`` as in :class:`Generator`."""
    kind = Seq2SeqGenerator if model.config.is_encoder_decoder else CausalGenerator
    return kind(model, fast=fast)
