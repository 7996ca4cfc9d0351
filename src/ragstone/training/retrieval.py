"""What a model retrieves with while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

from ragstone.knowledge import Hit, KnowledgeBase, Passage
from ragstone.metrics import has_answer
from ragstone.questions import Question
from ragstone.retriever import RagRetriever
from ragstone.training.options import TrainingOptions
from ragstone.training.passages import SharedEncoder
from ragstone.training.rescoring import rescore

__all__ = ["TrainingRetriever"]


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
        self.positives = {q.question: q.positive_ids for q in questions if q.positive_ids}
        self._gold: dict[str, Hit] = {}
        self.in_batch = options.in_batch
        """Whether passages come from the batch; not while dev questions are measured."""
        self.answers = {q.question: q.answers for q in questions} if options.decline_weight else {}
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
        if self.options.with_positives:
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
