"""The settings of the paper, each with its source.

[P] is Lewis et al. 2020 (arXiv 2005.11401) with the section; [T] the training script that was published with it
(``finetune_rag.py`` and its ``finetune_rag.sh`` in transformers' research projects), whose values the paper does not state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ragstone.errors import InputError

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One task's settings.

    Attributes:
        k: passages in training.
        test_k_sequence, test_k_token: passages at test time.
        num_beams: of the search at test time.
        decode: how RAG-Sequence decodes.
        labels: the label strings of a classification task, which are scored instead of generated.
        learning_rate, label_smoothing, warmup_steps, max_grad_norm, weight_decay, batch_size, epochs: of the optimisation.
    """

    k: int
    test_k_sequence: int
    test_k_token: int
    num_beams: int = 1
    decode: Literal["thorough", "fast"] = "thorough"
    labels: tuple[str, ...] = ()
    learning_rate: float = 3e-5
    label_smoothing: float = 0.1
    warmup_steps: int = 500
    max_grad_norm: float = 0.1
    weight_decay: float = 0.001
    batch_size: int = 8
    epochs: float = 100

    def test_k(self, method: str) -> int:
        """K at test time for ``"sequence"`` or ``"token"``."""
        return self.test_k_sequence if method == "sequence" else self.test_k_token

    def arguments(self) -> dict[str, Any]:
        """As transformers' ``TrainingArguments`` names them."""
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "polynomial",
            "warmup_steps": self.warmup_steps,
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": self.weight_decay,
            "per_device_train_batch_size": self.batch_size,
            "num_train_epochs": self.epochs,
        }


SOURCES = {
    "k": "[P] §3: 5 or 10 passages in training; 5 is [T]'s default",
    "test_k": "[P] appendix A: 50 for RAG-Sequence and 15 for RAG-Token on open-domain QA, 10 on generation tasks",
    "num_beams, decode": "[P] appendix A: greedy and thorough on QA, 4 beams and fast decoding on generation tasks",
    "optimizer": "[P] §2.4: stochastic gradient descent with Adam, the passage encoder and its index frozen",
    "learning_rate": "[T] 3e-5, polynomial decay",
    "label_smoothing": "[T] 0.1",
    "warmup_steps": "[T] 500",
    "max_grad_norm": "[T] 0.1",
    "weight_decay": "[T] 0.001",
    "batch_size": "[T] 8 a device",
    "epochs": "[T] at most 100, ended by the dev metric",
    "labels": "[P] §3.4: a class is generated as one token",
}
"""Where each field comes from."""

_QA = Preset(k=5, test_k_sequence=50, test_k_token=15)
_GENERATION = Preset(k=10, test_k_sequence=10, test_k_token=10, num_beams=4, decode="fast")

PRESETS: dict[str, Preset] = {
    "paper-nq": _QA,
    "triviaqa": _QA,
    "webq": _QA,
    "trec": _QA,
    "msmarco": _GENERATION,
    "jeopardy": _GENERATION,
    "fever2": Preset(k=10, test_k_sequence=10, test_k_token=10, labels=("SUPPORTS", "REFUTES")),
    "fever3": Preset(k=10, test_k_sequence=10, test_k_token=10, labels=("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")),
}
"""The tasks of the paper. WebQuestions and CuratedTREC start from a model trained on Natural Questions [P §3.1]."""


def preset(name: str) -> Preset:
    """The settings of a task.

    Raises:
        InputError: there is no such task.
    """
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
