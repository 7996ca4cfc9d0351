"""Training: question encoder and generator together from answers, and encoders from gold passages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragstone._lazy import loader

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


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
