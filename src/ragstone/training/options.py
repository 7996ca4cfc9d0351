"""What a training run of a RAG model needs to know beside transformers' ``TrainingArguments``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ragstone.errors import InputError
from ragstone.evaluation.running import depths

__all__ = ["TrainingOptions"]

_OF_TEXTS = ("exact_match", "f1", "contains")
_BETTER_LESS = ("loss", "reading_errors", "retrieval_errors", "calibration_error")
_MEASURES = (*_BETTER_LESS, "accuracy", *_OF_TEXTS, "correct_where_found", "reciprocal_rank")
_AT_K = ("recall", "hit", "ndcg")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How passages are found while training, what learns, and how.

    Attributes:
        k: passages a question (K) in training.
        test_k: passages a question on the dev set and in the saved model; ``k`` by default.
        search: how passages are found, as in :meth:`ragstone.KnowledgeBase.search`; their prior is τ·(q·d) in any case.
        where: a filter on passages, as SQL.
        with_positives: a question's gold passage takes the last place where it was not found; with ``k = 1`` the generator
            learns from gold passages alone.
        in_batch: passages are those that are gold for any question of the batch, the question's own among them, and batches
            hold questions that stand side by side in the file. A causal generator reads each passage once for all of them.
            Nothing is searched.
        decline_weight: w of an added loss w·mean_z −log p(∅|x,z) over the passages in which no accepted answer stands: from
            these the generator learns to write nothing, so that they leave the answer to the others. For answers that stand
            in passages word for word.
        extractive: whether dev questions, and those of whoever loads the saved model, are answered with spans of passages,
            as the model does by default. Training itself is the same.
        train_question_encoder, train_generator: whether the part learns.
        train_passage_encoder: the question encoder reads passages too and learns from both. Stale vectors find
            ``candidates``·K passages, of which the K best by fresh vectors are kept, with gradient.
        candidates: how many times K are encoded anew.
        refresh_every: steps after which a process of its own re-encodes the knowledge base; 0: never.
        lora_rank, question_encoder_lora_rank: rank of a low-rank adapter on all linear layers of the generator, of the
            question encoder; 0 trains the part itself.
        lora_alpha: α; the adapter is scaled by α over its rank. Twice the rank by default.
        lora_dropout: dropout in front of the adapter.
        adapters: a checkpoint that holds adapters, and nothing else that was trained, of the same ranks on the same base, to
            begin with; ``lora_alpha`` is theirs.
        learn_score_scale: τ is learnt too (one parameter, log τ).
        question_encoder_learning_rate: of the question encoder and τ; ``TrainingArguments.learning_rate`` by default.
        answers: ``"sample"`` trains on one accepted answer a step, drawn anew each time; ``"all"`` on −log Σ_a p(a|x), the
            probability that any of them is given.
        max_answers: of one question, with ``"all"``.
        max_target_length: tokens of an answer, its end included.
        dev_metric: ``"loss"`` or a measure of :mod:`ragstone.evaluation` such as ``"exact_match"``.
        labels: dev questions are classified: the most probable of these is the answer.
        decode: how RAG-Sequence answers dev questions.
        max_new_tokens: of an answer to a dev question.
    """

    k: int = 5
    test_k: int | None = None
    search: Literal["dense", "exact", "keyword", "hybrid"] = "dense"
    where: str | None = None
    with_positives: bool = False
    in_batch: bool = False
    decline_weight: float = 0.0
    extractive: bool | None = None
    train_question_encoder: bool = True
    train_generator: bool = True
    train_passage_encoder: bool = False
    candidates: int = 4
    refresh_every: int = 0
    lora_rank: int = 0
    question_encoder_lora_rank: int = 0
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    adapters: str | None = None
    learn_score_scale: bool = False
    question_encoder_learning_rate: float | None = None
    answers: Literal["sample", "all"] = "sample"
    max_answers: int = 8
    max_target_length: int = 64
    dev_metric: str = "loss"
    labels: tuple[str, ...] = ()
    decode: Literal["thorough", "fast"] = "thorough"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in ("k", "test_k", "candidates", "max_answers", "max_target_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if not (self.decline_weight >= 0 and math.isfinite(self.decline_weight)):
            raise InputError(f"decline_weight is {self.decline_weight}; give 0 or a positive number.")
        for name in ("lora_rank", "question_encoder_lora_rank"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 (no adapter) or a rank.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1.")
        for rank, learns in (
            ("lora_rank", "train_generator"),
            ("question_encoder_lora_rank", "train_question_encoder"),
        ):
            if getattr(self, rank) and not getattr(self, learns):
                raise InputError(f"{rank} is {getattr(self, rank)}, but {learns} is False; leave one of them out.")
        if (self.lora_alpha or self.lora_dropout) and not (self.lora_rank or self.question_encoder_lora_rank):
            raise InputError("lora_alpha and lora_dropout are those of adapters, but no rank is given; give one.")
        if self.adapters is not None and not (self.lora_rank or self.question_encoder_lora_rank):
            raise InputError(
                f"adapters is {self.adapters!r}, but no adapter is trained; give the ranks it was made with."
            )
        known = [*_MEASURES, *(f"{name}_at_{depth}" for name in _AT_K for depth in depths(self.k_at_test))]
        if self.dev_metric not in known:
            raise InputError(f"dev_metric is {self.dev_metric!r}; choose one of {', '.join(known)}.")
        if self.dev_metric == "accuracy" and not self.labels:
            raise InputError("dev_metric is 'accuracy', which is that of a choice among labels; give labels.")
        if self.dev_metric in _OF_TEXTS and self.labels:
            raise InputError(f"dev_metric is {self.dev_metric!r}, but labels are chosen, not written; take 'accuracy'.")
        if self.answers not in ("sample", "all"):
            raise InputError(f"answers is {self.answers!r}; choose 'sample' or 'all'.")
        if self.train_passage_encoder and (self.with_positives or not self.train_question_encoder):
            raise InputError(
                "train_passage_encoder needs a question encoder that learns, and leaves gold passages out."
            )
        if self.in_batch and (self.train_passage_encoder or self.with_positives or self.where):
            raise InputError("in_batch searches nothing; leave train_passage_encoder, with_positives and where out.")
        if self.refresh_every and not self.train_passage_encoder:
            raise InputError(
                "refresh_every has no meaning while passages keep their vectors; set train_passage_encoder."
            )
        if not (self.train_question_encoder or self.train_generator or self.learn_score_scale):
            raise InputError("Nothing is left to train; let the question encoder, the generator or τ learn.")

    @property
    def greater_is_better(self) -> bool:
        """Whether more of ``dev_metric`` is better."""
        return self.dev_metric not in _BETTER_LESS

    @property
    def k_at_test(self) -> int:
        """K on the dev set and in the saved model."""
        return self.test_k or self.k
