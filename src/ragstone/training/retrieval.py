"""What a model retrieves with while it trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

from ragstone.errors import InputError, ModelError
from ragstone.knowledge import Hit, KnowledgeBase, Passage
from ragstone.metrics import has_answer
from ragstone.questions import Question
from ragstone.retriever import RagRetriever
from ragstone.training.options import TrainingOptions
from ragstone.training.passages import SharedEncoder
from ragstone.training.rescoring import rescore

__all__ = ["TrainingRetriever", "answerable", "check_gold"]

logger = logging.getLogger(__name__)


def check_gold(retriever: RagRetriever, questions: Sequence[Question], options: TrainingOptions) -> None:
    """Raise InputError where ``options`` put gold passages in and they are not known, or not in the knowledge base."""
    if not (options.in_batch or options.with_positives):
        return
    lost = next((q for q in questions if not q.positive_ids), None) if options.in_batch else None
    if lost is not None:
        raise InputError(
            f"The question {lost.question[:60]!r} names no gold passage, which in_batch needs for each; give it "
            "positive_ids, or leave in_batch out."
        )
    ids = {id_: q for q in questions for id_ in q.positive_ids}
    if not ids:
        raise InputError("with_positives puts gold passages in, but no question names one; give them positive_ids.")
    base = retriever.index
    missing = sorted(set(ids) - base.known(ids)) if isinstance(base, KnowledgeBase) else []
    if missing:
        raise InputError(
            f"{base} lacks {len(missing)} of {len(ids)} gold passages, such as {missing[0]!r} of the question "
            f"{ids[missing[0]].question[:60]!r}; index them, or correct positive_ids."
        )


def answerable(retriever: RagRetriever, questions: Sequence[Question], options: TrainingOptions) -> list[Question]:
    """The questions for which a passage is found; search by words may find none, and there is nothing to learn from."""
    if options.search != "keyword" or options.in_batch or not questions:
        return list(questions)
    assert isinstance(retriever.index, KnowledgeBase)
    hits = retriever.index.search([q.question for q in questions], k=1, search="keyword", where=options.where)
    gold = options.with_positives
    kept = [q for q, row in zip(questions, hits, strict=True) if row or (gold and q.positive_ids)]
    if len(kept) < len(questions):
        lost = next(q for q in questions if q not in kept)
        logger.warning(
            "%d of %d questions are left out, for search by words finds no passage for them, such as %r.",
            len(questions) - len(kept), len(questions), lost.question[:60],
        )  # fmt: skip
    return kept


class TrainingRetriever:
    """A :class:`ragstone.RagRetriever` that searches as the options say and can put gold passages in.

    Args:
        retriever: over a knowledge base.
        options: ``search``, ``where``, ``with_positives``, ``in_batch`` and ``decline_weight`` count here.
        questions: those whose gold passages and answers are known.
        encoder: encodes candidates anew, with gradient, where the passage encoder learns.
    """

    def __init__(
        self,
        retriever: RagRetriever,
        options: TrainingOptions,
        questions: Sequence[Question] = (),
        encoder: SharedEncoder | None = None,
    ) -> None:
        self.retriever, self.options, self.encoder = retriever, options, encoder
        self.positives: dict[str, tuple[str, ...]] = {}  # of all questions that have the same words
        self.answers: dict[str, tuple[str, ...]] = {}
        for q in questions:
            self.positives[q.question] = self.positives.get(q.question, ()) + q.positive_ids
            if options.decline_weight:
                self.answers[q.question] = self.answers.get(q.question, ()) + q.answers
        self._gold: dict[str, Hit] = {}
        self.in_batch, self.with_positives = options.in_batch, options.with_positives
        """Whether passages come from the batch, or gold ones are put in; not while dev questions are measured."""
        self.without_answer: Tensor | None = None
        """(B, K), where the passages found last neither are gold nor hold an answer, with ``decline_weight``."""

    def __call__(
        self,
        question_input_ids: Any,
        question_hidden_states: np.ndarray[Any, Any],
        prefix: str | None = None,
        n_docs: int | None = None,
        return_tensors: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        null_passage: bool = False,
    ) -> BatchEncoding:
        """See :class:`ragstone.models.Retriever`."""
        assert questions is not None
        if not np.isfinite(question_hidden_states).all():
            raise ModelError(
                "The question encoder's vectors hold NaN or infinity: it has diverged; lower its learning rate."
            )
        k = self.options.k if n_docs is None else n_docs
        if self.in_batch:
            hits = self._in_batch(questions, question_hidden_states, k)
        else:
            search, where = self.options.search, self.options.where
            found = k if self.encoder is None else k * self.options.candidates
            hits = self.retriever.retrieve(
                question_hidden_states, found, questions=questions, search=search, where=where
            )
        fresh = None
        if self.encoder is not None:
            vectors = torch.from_numpy(question_hidden_states).to(self.encoder.encoder.device)
            fresh = rescore(vectors, hits, self.encoder, k)
            hits = fresh.hits
        if self.with_positives:
            hits = [self._with_gold(question, row, k) for question, row in zip(questions, hits, strict=True)]
        if self.answers:
            lacks = [[self._lacks(q, hit.passage) for hit in row] for q, row in zip(questions, hits, strict=True)]
            self.without_answer = torch.tensor([row + [False] * (k - len(row)) for row in lacks])
        width = question_hidden_states.shape[1]
        form: dict[str, Any] = {"prefix": prefix, "return_tensors": return_tensors, "null_passage": null_passage}
        batch = self.retriever.batch(questions, hits, k, width, **form)
        if fresh is not None:
            batch["retrieved_doc_embeds"] = fresh.vectors
        return batch

    def _in_batch(self, questions: Sequence[str], vectors: np.ndarray[Any, Any], k: int) -> list[list[Hit]]:
        """The k best of all questions' gold passages for each question, its own among them."""
        own = [self.positives[question][0] for question in questions]
        gold = [self._hit(id_) for id_ in dict.fromkeys(own)]
        scores = vectors @ np.stack([hit.vector for hit in gold]).T
        ranked = [[gold[n] for n in row] for row in np.argsort(-scores, axis=1, kind="stable")]
        return [self._with_gold(question, hits[:k], k) for question, hits in zip(questions, ranked, strict=True)]

    def _with_gold(self, question: str, hits: list[Hit], k: int) -> list[Hit]:
        """The hits of a question, the last of which gives way to a gold passage if none is there."""
        wanted = self.positives.get(question, ())
        if not wanted or any(hit.passage.id in wanted for hit in hits):
            return hits
        return [*hits[: k - 1], self._hit(wanted[0])]

    def _lacks(self, question: str, passage: Passage) -> bool:
        gold = passage.id in self.positives.get(question, ())
        return not gold and not has_answer(f"{passage.title} {passage.text}", self.answers.get(question, ()))

    def _hit(self, id_: str) -> Hit:
        if id_ not in self._gold:
            base = self.retriever.index
            assert isinstance(base, KnowledgeBase)
            self._gold[id_] = Hit(base.get(id_)[0], 0.0, base.vectors(id_)[0])
        return self._gold[id_]

    def tokenize_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Question texts as ids and mask, each (B, S)."""
        return self.retriever.tokenize_questions(questions)

    def attach(self, question_encoder: Any) -> None:
        """Hand over the model's question encoder."""
        self.retriever.attach(question_encoder)
