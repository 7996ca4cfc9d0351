"""One small interface over seq2seq and causal models: encode contexts once, score targets, step."""

from __future__ import annotations

from typing import Any

from ragstone.generators.base import DecodingState, EncodedContexts, Generator, trim_padding
from ragstone.generators.causal import CausalGenerator
from ragstone.generators.prompt_store import PromptStore
from ragstone.generators.seq2seq import Seq2SeqGenerator

__all__ = [
    "CausalGenerator",
    "DecodingState",
    "EncodedContexts",
    "Generator",
    "PromptStore",
    "Seq2SeqGenerator",
    "generator_for",
    "trim_padding",
]


def generator_for(model: Any, *, fast: bool = True, store: PromptStore | None = None) -> Generator:
    """The adapter for a raw Hugging Face model, by its own ``is_encoder_decoder``; ``fast`` as in :class:`Generator`.

    ``store`` keeps the beginnings of a causal generator's prompts from question to question.
    """
    if model.config.is_encoder_decoder:
        return Seq2SeqGenerator(model, fast=fast)
    return CausalGenerator(model, fast=fast, store=store)
