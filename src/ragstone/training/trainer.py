"""transformers' ``Trainer`` around a RAG model: retrieval in every step, answers, adapters, checkpoints that survive."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ragstone.errors import InputError, ModelError
from ragstone.knowledge import KnowledgeBase
from ragstone.marginal import any_answer_nll
from ragstone.models import RagForGeneration, RagTokenizer
from ragstone.pipeline import RagPipeline
from ragstone.questions import Question
from ragstone.retriever import RagRetriever
from ragstone.training.kernels import sound_attention
from ragstone.training.options import TrainingOptions
from ragstone.training.parts import (
    check_finite,
    fields_set,
    frozen_parts,
    make_trainable,
    save_trained,
    trained_weights,
)
from ragstone.training.passages import RefreshPassages, SharedEncoder
from ragstone.training.retrieval import TrainingRetriever, answerable, check_gold

__all__ = ["Estimate", "RagTrainer", "last_checkpoint"]

logger = logging.getLogger(__name__)

_WEIGHTS, _STATE = "trained.safetensors", "trainer_state.json"


@dataclass(frozen=True)
class Estimate:
    """What a run will cost: ``steps`` (updates) of ``seconds_per_step`` each, forward and backward, as measured."""

    steps: int
    seconds_per_step: float


@final
class RagTrainer(Trainer):
    """Trains a RAG model from questions and answers; which passages matter is never given, but summed out.

    Distribution, mixed precision, accumulation, schedules and loggers are transformers'. Checkpoints hold the weights that
    learn, and nothing else of the model.

    Args:
        model: a :class:`ragstone.RagTokenForGeneration` or :class:`ragstone.RagSequenceForGeneration` in float32.
        args: transformers' ``TrainingArguments``.
        tokenizer: the model's :class:`ragstone.RagTokenizer`.
        retriever: finds passages; the model gets it too.
        questions: what is trained on.
        dev_questions: what :meth:`evaluate` measures.
        options: see :class:`ragstone.training.TrainingOptions`.
        base_model: name or folder of ``model``, to which a saved adapter refers.
        callbacks: transformers' ``TrainerCallback`` objects.

    Raises:
        InputError: no question, or options that do not fit.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: RagForGeneration,
        args: TrainingArguments,
        *,
        tokenizer: RagTokenizer,
        retriever: RagRetriever,
        questions: Sequence[Question],
        dev_questions: Sequence[Question] = (),
        options: TrainingOptions | None = None,
        base_model: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.options = TrainingOptions() if options is None else options
        if self.options.answers == "all" and model.config.label_smoothing:
            raise InputError("label_smoothing has no meaning with answers='all'; set one of them back.")
        check_gold(retriever, questions, self.options)
        questions = answerable(retriever, questions, self.options)
        searched = replace(self.options, in_batch=False, with_positives=False)
        dev_questions = answerable(retriever, dev_questions, searched)
        if not questions:
            raise InputError("There are no questions to train on.")
        self.rag_tokenizer, self.base_model = tokenizer, base_model
        self._tell_of_cuts(questions)
        self.plain_retriever = retriever
        retriever.attach(model.question_encoder)  # compared with the base's encoder while it is what it was
        set_seed(args.seed)  # of the adapters' first weights
        self.adapted = make_trainable(model, self.options)
        self._frozen = frozen_parts(model)
        self.shared_encoder: SharedEncoder | None = None
        if args.bf16 and base_model is not None and "generator" in self.adapted:
            for weight in model.generator.parameters():  # which autocast would convert at every step
                if not weight.requires_grad:
                    weight.data = weight.data.bfloat16()
        if self.options.extractive is not None:
            model.config.extractive = self.options.extractive
        self._end = 0, 0
        if self.options.decline_weight:
            opening, end = tokenizer.target_frame()
            self._end = len(opening), end  # where the empty answer parts from all others, and what stands there
            model.config.min_answer_tokens = self._end[0] + 1
        callbacks = list(callbacks or [])
        if self.options.train_passage_encoder:
            if not isinstance(retriever.index, KnowledgeBase):
                raise InputError("train_passage_encoder needs a knowledge base.")
            self.shared_encoder = SharedEncoder(model, retriever.index, self.adapted.get("question_encoder"))
            retriever.check_encoders = False  # the base follows the model from now on
            if every := self.options.refresh_every:
                folder = Path(args.output_dir) / "encoders"
                callbacks.append(RefreshPassages(retriever.index, self.shared_encoder, every, folder))
        model.set_retriever(TrainingRetriever(retriever, self.options, questions, self.shared_encoder))
        model.config.n_docs = self.options.k
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_they_are,
            train_dataset=list(questions),
            eval_dataset=list(dev_questions) or None,
            callbacks=callbacks,
        )

    def _tell_of_cuts(self, questions: Sequence[Question]) -> None:
        """Warn of answers that training does not see whole."""
        answers = [answer for question in questions for answer in question.answers]
        most = self.options.max_target_length
        long = sum(len(ids) > most for ids in self.rag_tokenizer(text_target=answers)["labels"])
        if long:
            logger.warning(
                "%d of %d answers have more than %d tokens and are cut there; max_target_length=… takes in more "
                "(--max-target-length).", long, len(answers), most,
            )  # fmt: skip
        most = self.options.max_answers
        many = sum(len(question.answers) > most for question in questions)
        if self.options.answers == "all" and many:
            logger.warning("%d questions have more than max_answers=%d answers; only the first count.", many, most)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Questions, and the answers that this step trains on, as the model takes them."""
        rows = [(n, q, answer) for n, q in enumerate(inputs["rows"]) for answer in self._answers(q)]
        prepared = self._batch([q.question for _, q, _ in rows], [answer for _, _, answer in rows])
        if self.options.answers == "all":
            prepared["groups"] = torch.tensor([n for n, _, _ in rows], device=self.args.device)
        return prepared

    def _batch(self, questions: list[str], answers: list[str]) -> dict[str, Any]:
        length = self.options.max_target_length
        targets = self.rag_tokenizer(
            text_target=answers, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return {"questions": questions, "labels": targets["labels"].to(self.args.device)}

    def _answers(self, question: Question) -> Sequence[str]:
        if self.options.answers == "all":
            return question.answers[: self.options.max_answers]
        # By seed, step and question alone, so that an interrupted run and several processes draw the same.
        draw = random.Random(f"{self.args.seed} {self.state.global_step} {question.id}")
        return [draw.choice(question.answers)]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' step, with gradients that are numbers.

        Raises:
            ModelError: the loss is none.
        """
        with sound_attention():
            loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise ModelError(
                f"The loss is no number at step {self.state.global_step + 1}: the training has diverged. Lower the learning "
                f"rate (it is {self.args.learning_rate:g}); checkpoints of earlier steps are in {self.args.output_dir}."
            )
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of −log p(y|x) over the questions of a batch."""
        for part in self._frozen:
            part.eval()  # no dropout where nothing learns
        groups = inputs.pop("groups", None)
        weight = self.options.decline_weight
        with self._narrow_adapters():
            out = model(**inputs, alternative=self._end[1] if weight else None)
        loss = out.loss if groups is None else any_answer_nll(out.nll, groups).mean()
        if weight:
            loss = loss + weight * self._decline_loss(out)
        return (loss, out) if return_outputs else loss

    def _narrow_adapters(self) -> AbstractContextManager[Any]:
        """Under autocast, adapters take their inputs as they come; peft would widen each of them to float32 first."""
        narrow = (self.args.bf16 or self.args.fp16) and not self.args.gradient_checkpointing
        if not self.adapted or not narrow:
            return nullcontext()
        from peft.helpers import disable_input_dtype_casting

        return disable_input_dtype_casting(self.model)

    def _decline_loss(self, out: Any) -> Tensor:
        """The mean over all passages of −log p(∅|x,z), counted where no accepted answer stands."""
        lacking, end = self.model.retriever.without_answer, self._end[0]
        passages = slice(lacking.shape[1])  # without the null passage
        log_probs = out.token_log_probs[:, passages, :end].sum(-1) + out.alternative_log_probs[:, passages, end]
        lacking = lacking.to(log_probs.device) & ~torch.isneginf(out.doc_scores[:, passages])
        return -log_probs.masked_fill(~lacking, 0.0).mean()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.options.in_batch:
            return super()._get_train_sampler(train_dataset)
        return _SideBySide(len(self.train_dataset), self.args.train_batch_size, self.args.seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the contexts are only known once passages are found."""
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' optimizer, with a learning rate of its own for what makes the prior."""
        rate = self.options.question_encoder_learning_rate
        if self.optimizer is None and rate is not None:
            model = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[bool, bool], list[Tensor]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = (".generator." not in name, name in decayed)
                    groups.setdefault(key, []).append(parameter)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "lr": rate if retrieves else self.args.learning_rate,
                    }
                    for (retrieves, decays), parameters in groups.items()
                ],
                **settings,
            )
        return super().create_optimizer(model)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the dev questions: their loss and, if ``dev_metric`` is another measure, their answers."""
        start = time.perf_counter()
        questions = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        own = questions[self.args.process_index :: self.args.world_size]
        self.model.eval()
        with (
            fields_set(self.model.config, n_docs=self.options.k_at_test),
            fields_set(self.model.retriever, in_batch=False, with_positives=False),
        ):
            sums = {"loss": sum(self._losses(own))}
            if self.options.dev_metric != "loss":
                sums[self.options.dev_metric] = self._measure(own)
        totals = torch.tensor([*sums.values(), len(own)], dtype=torch.float64, device=self.args.device)
        *values, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in zip(sums, values, strict=True)}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _losses(self, questions: Sequence[Question]) -> list[float]:
        """−log p(y|x) of the first answer of each question, K as at test time."""
        size, losses = self.args.eval_batch_size, []
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            batch = self._batch([q.question for q in part], [q.answers[0] for q in part])
            with self.accelerator.autocast():
                losses += self.model(**batch).nll.tolist()
        return losses

    def _measure(self, questions: Sequence[Question]) -> float:
        """The sum of ``dev_metric`` over questions that the model answers."""
        from ragstone.evaluation import evaluate

        answering: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens, "decode": self.options.decode}
        if self.options.labels:
            answering = {"labels": self.options.labels}
        training = self.model.retriever
        rag = RagPipeline(self.model, self.rag_tokenizer)
        rag.retriever = self.plain_retriever
        try:
            found = evaluate(
                rag,
                questions,
                k=self.options.k_at_test,
                search=self.options.search,
                where=self.options.where,
                **answering,
            )
        finally:
            self.model.set_retriever(training)
        nothing = 0.0 if self.options.greater_is_better else 1.0  # no passage was found, or no question answered
        return float(found.summary.get(self.options.dev_metric, nothing)) * len(questions)

    def estimate(self, steps: int = 2) -> Estimate:
        """Measure ``steps`` steps (the first only warms up), leaving every weight as it is."""
        seconds = []
        for n, rows in enumerate(self.get_train_dataloader()):
            if n > steps:
                break
            start = time.perf_counter()
            self.model.train()
            with self.accelerator.autocast():
                loss = self.compute_loss(self.model, self._prepare_inputs(rows))
            loss.backward()
            self.model.zero_grad()
            seconds.append(time.perf_counter() - start)
        measured = seconds[1:] or seconds
        return Estimate(self.steps, sum(measured) / len(measured) * self.args.gradient_accumulation_steps)

    @property
    def steps(self) -> int:
        """How many updates the run has."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        return math.ceil(math.ceil(batches / self.args.gradient_accumulation_steps) * self.args.num_train_epochs)

    # Checkpoints: what learns, and what transformers adds (optimizer, schedule, random states).

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained model, for ``from_pretrained``; checkpoints in between hold only what learns."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.shared_encoder is not None:
            self.shared_encoder.save(folder / "passage_encoder")
        with fields_set(self.model.config, n_docs=self.options.k_at_test):
            save_trained(
                self.model,
                self.rag_tokenizer,
                folder,
                adapted=self.adapted,
                base_model=self.base_model,
                passage_encoder=self._passage_encoder(folder),
                passage_fingerprint=self._passage_fingerprint(),
            )

    def _passage_encoder(self, folder: Path) -> str | None:
        """The encoder of passages, where the question encoder was the same and has moved on, with it or without."""
        if self.shared_encoder is not None:
            return str(folder / "passage_encoder")
        base = self.plain_retriever.index
        if not self.options.train_question_encoder or not isinstance(base, KnowledgeBase) or not base.has_encoder:
            return None
        return base.encoder.spec.name

    def _passage_fingerprint(self) -> str | None:
        """The weights that the question encoder learned to find passages of, unless these learn too."""
        base = self.plain_retriever.index
        if self.shared_encoder is not None or not isinstance(base, KnowledgeBase) or base.encoder_spec is None:
            return None
        return str(base.encoder_spec["fingerprint"])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        weights = trained_weights(self.model, state_dict)
        check_finite(weights)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / _WEIGHTS
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read ({error}); resume from another checkpoint.") from error
        expected = trained_weights(self.model)
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in expected.items()}:
            raise ModelError(f"{file} holds other weights than those that learn; resume with the options of its run.")
        self.model.load_state_dict(weights, strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _SideBySide(Sampler[int]):
    """Batches of questions that stand side by side, in random order; each epoch cuts them elsewhere."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        first = draw.randrange(self.count)
        ring = [(first + n) % self.count for n in range(self.count)]
        batches = [ring[n : n + self.size] for n in range(0, self.count - self.size + 1, self.size)]
        draw.shuffle(batches)
        rest = ring[len(batches) * self.size :]  # a shorter batch would shift those behind it
        return iter([n for batch in [*batches, rest] for n in batch])


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run, None if there is none; one that a kill cut short is passed over."""
    for place in sorted(Path(folder).glob("checkpoint-*"), key=_step_of, reverse=True):
        try:
            json.loads((place / _STATE).read_text(encoding="utf-8"))
            load_file(place / _WEIGHTS)
        except (OSError, ValueError, SafetensorError):
            continue
        return str(place)
    return None


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def _as_they_are(rows: list[Question]) -> dict[str, list[Question]]:
    return {"rows": rows}
