"""Training: question encoder and generator together from answers, and encoders from gold passages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragstone.training.contrastive import EncoderReport, train_encoder
    from ragstone.training.options import TrainingOptions
    from ragstone.training.presets import PRESETS, Preset
    from ragstone.training.refresh import PassageRefresher
    from ragstone.training.rescoring import FreshHits, rescore
    from ragstone.training.trainer import RagTrainer, last_checkpoint

__all__ = [
    "PRESETS",
    "EncoderReport",
    "FreshHits",
    "PassageRefresher",
    "Preset",
    "RagTrainer",
    "TrainingOptions",
    "last_checkpoint",
    "rescore",
    "train_encoder",
]

_HOMES = {
    "EncoderReport": "contrastive",
    "FreshHits": "rescoring",
    "PRESETS": "presets",
    "PassageRefresher": "refresh",
    "Preset": "presets",
    "RagTrainer": "trainer",
    "TrainingOptions": "options",
    "last_checkpoint": "trainer",
    "rescore": "rescoring",
    "train_encoder": "contrastive",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use (PEP 562), as in `ragstone.knowledge`.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
