"""Joint training of question encoder and generator: passages are found with the current question encoder at every step."""

from ragstone.training.options import TrainingOptions
from ragstone.training.presets import PRESETS, Preset
from ragstone.training.trainer import RagTrainer, last_checkpoint

__all__ = ["PRESETS", "Preset", "RagTrainer", "TrainingOptions", "last_checkpoint"]
