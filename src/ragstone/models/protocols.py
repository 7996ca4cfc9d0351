"""What a model needs of a retriever. Any object of this shape will do; :class:`ragstone.RagRetriever` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor
from transformers import BatchEncoding

__all__ = ["Retriever"]


@runtime_checkable
class Retriever(Protocol):
    """Chooses passages without gradient; the model scores them with gradient."""

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
        """Retrieve K = ``n_docs`` passages for each of B questions and build their contexts.

        Args:
            question_input_ids: (B, S) question tokens, decoded where ``questions`` is not given.
            question_hidden_states: (B, D) float32 question vectors.
            prefix: replaces the configured prefix of seq2seq contexts.
            n_docs: K.
            return_tensors: ``"pt"`` for tensors, None for lists.
            questions: the B question texts, which win over decoding.
            null_passage: write one more context for each question, the last, without a passage: contexts, ``truncated`` and
                ``prompt_lengths`` then have K + 1 slots, the rest K. Passed only by models that have a null passage.

        Returns:
            ``context_input_ids`` and ``context_attention_mask`` (B·K, S), ``retrieved_doc_embeds`` (B, K, D),
            ``retrieved_doc_mask`` (B, K) (false in an empty slot), ``truncated`` (B, K) and ``doc_ids``, B lists of at
            most K ids; optionally ``prompt_lengths`` (B, K), the tokens of causal contexts that depend on the passage alone,
            and ``keyword_scores`` (B, K), of passages that were searched by words.
        """
        ...

    def tokenize_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Question texts as the question encoder wants them: ids and mask, each (B, S)."""
        ...

    def attach(self, question_encoder: Any) -> None:
        """Hand over the model's question encoder, the passage encoder of last resort."""
        ...
