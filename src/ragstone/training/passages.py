"""Passages that are encoded anew while the model learns: one encoder reads questions and passages (paper, §2.2 and §4.5)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ragstone.encoders import Encoder
from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, Passage
from ragstone.models import RagForGeneration
from ragstone.training.refresh import PassageRefresher

__all__ = ["RefreshPassages", "SharedEncoder"]


class SharedEncoder:
    """The model's question encoder, which reads passages as well, and learns from both.

    Args:
        model: the model.
        base: the knowledge base, whose encoder the question encoder was when training began.
        adapted: peft's model of the question encoder, if it has an adapter.

    Raises:
        InputError: the question encoder is another model than the base's encoder.
    """

    def __init__(self, model: RagForGeneration, base: KnowledgeBase, adapted: Any = None) -> None:
        known = base.encoder if base.has_encoder else None
        part = model.question_encoder
        if not isinstance(known, Encoder) or (known.model.config.model_type, known.width) != (
            part.config.model_type,
            model.config.question_width,
        ):
            raise InputError(
                f"{base.path} has vectors of another encoder than the model's question encoder, so these cannot learn as "
                "one; re-encode it with the question encoder (`ragstone reindex`), or keep the passages as they are."
            )
        self.encoder = Encoder(part, known.tokenizer, known.spec)
        self.adapted = adapted

    def __call__(self, passages: list[Passage]) -> Tensor:
        """N passages -> (N, D), with gradient where that is on."""
        return self.encoder.embed_passages([(p.title, p.text) for p in passages])

    def save(self, folder: Path) -> Path:
        """Write the encoder as it is now, adapters merged, for :func:`ragstone.encoders.load_encoder`."""
        part = self.encoder.model
        if self.adapted is not None:
            part = copy.deepcopy(self.adapted).merge_and_unload()
        Encoder(part, self.encoder.tokenizer, self.encoder.spec).save(folder)
        return folder


class RefreshPassages(TrainerCallback):
    """Lets a process of its own re-encode the knowledge base now and then, and moves on to each new version.

    Every checkpoint holds a ``knowledge_base.json`` with the version and the encoder it was trained on.

    Args:
        base: what is searched.
        encoder: what passages are encoded with.
        every: steps between the starts of two re-encodings; one that is not done yet is waited for.
        folder: where encoders are saved; that of the version in use stays.
    """

    def __init__(self, base: KnowledgeBase, encoder: SharedEncoder, every: int, folder: Path) -> None:
        self.base, self.encoder, self.every, self.folder = base, encoder, every, folder
        self.refresher = PassageRefresher(base.path)
        self.used: Path | None = None
        self._coming: Path | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what is ready, and start the next."""
        if not state.is_world_process_zero:
            self.base.refresh()
            return
        if self.refresher.poll() is not None:
            self.base.refresh()
            if self.used is not None:
                shutil.rmtree(self.used, ignore_errors=True)
            self.used, self._coming = self._coming, None
        if state.global_step % self.every == 0 and not self.refresher.running and state.global_step < state.max_steps:
            self._coming = self.encoder.save(self.folder / f"step-{state.global_step}")
            self.refresher.start(self._coming)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the version."""
        if state.is_world_process_zero:
            record = {"version": self.base.version, "encoder": None if self.used is None else self.used.name}
            place = Path(args.output_dir, f"checkpoint-{state.global_step}", "knowledge_base.json")
            place.write_text(json.dumps(record), encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End what is under way; the trained encoder re-encodes the base once more."""
        self.refresher.close()
