"""`Encoder`: texts in, float32 vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ragstone.encoders.checkpoint import fingerprint, load_backbone, load_tokenizer, read_encoder_settings
from ragstone.encoders.pooling import embed

__all__ = ["Encoder", "EncoderSpec", "load_encoder"]


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides which vector a text gets; stored in a knowledge base's manifest.

    Attributes:
        name: name or folder as `load_encoder` takes it.
        fingerprint: hash of the weights, see `ragstone.encoders.fingerprint`.
        pooling: one of `ragstone.encoders.POOLINGS`.
        normalize: whether vectors are scaled to length 1.
        template: ``"pair"`` (DPR's (title, text) pair) or ``"title\\ntext"``.
        width: D, the vector width.
        max_length: tokens after which a text is cut.
        question_prompt: put before every question.
        passage_prompt: put before every passage.
    """

    name: str
    fingerprint: str
    pooling: str
    normalize: bool
    template: str
    width: int
    max_length: int
    question_prompt: str = ""
    passage_prompt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderSpec:
        """Rebuild a spec from `to_dict`; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


class Encoder:
    """Turns passages and questions into vectors."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.spec.width

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in (vectors are float32 always)."""
        return next(self.model.parameters()).dtype

    def encode_passages(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Encode (title, text) pairs to (N, D) float32; ``progress`` gets the number of passages just done."""
        texts = [f"{title}\n{text}" for title, text in pairs]
        return self._encode([self.spec.passage_prompt + text for text in texts], progress)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Encode questions to (B, D) float32."""
        return self._encode([self.spec.question_prompt + text for text in texts], None)

    @torch.inference_mode()
    def _encode(self, texts: list[str], progress: Callable[[int], None] | None) -> np.ndarray:
        out = np.zeros((len(texts), self.width), np.float32)
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32],
                padding=True,
                truncation=True,
                max_length=self.spec.max_length,
                return_tensors="pt",
            ).to(self.device)
            out[start : start + 32] = embed(
                self.model, **batch, pooling=self.spec.pooling, normalize=self.spec.normalize
            ).cpu()
            if progress is not None:
                progress(len(batch["input_ids"]))
        return out


def load_encoder(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    question_prompt: str | None = None,
    passage_prompt: str | None = None,
    max_length: int | None = None,
) -> Encoder:
    """Load any encoder checkpoint: "local", a folder or a hub name."""
    settings = read_encoder_settings(name_or_path)
    model = load_backbone(name_or_path).eval()
    from ragstone import local

    tokenizer = load_tokenizer(local.resolve(str(name_or_path), "encoder"), settings)
    spec = EncoderSpec(
        name=str(name_or_path),
        fingerprint=fingerprint(model),
        pooling=settings.pooling if pooling is None else pooling,
        normalize=settings.normalize if normalize is None else normalize,
        template=settings.template,
        width=model.config.hidden_size,
        max_length=max_length or settings.max_length or 512,
        question_prompt=settings.question_prompt if question_prompt is None else question_prompt,
        passage_prompt=settings.passage_prompt if passage_prompt is None else passage_prompt,
    )
    return Encoder(model.to(device or "cpu"), tokenizer, spec)
