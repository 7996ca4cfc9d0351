"""What a forward pass takes once passages are chosen, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from ragstone.marginal import log_prior

__all__ = ["RagInputs", "RagOutput", "TargetScores"]


@dataclass
class RagOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: scalar, the mean of ``nll`` over the batch (its sum with ``reduce_loss``), label-smoothed if configured.
        nll: (B,) −log p(y|x), the sum over scored tokens, in nats.
        doc_scores: (B, K), the logits s of the prior; −inf in an empty slot. With a null passage, whose slot is the last,
            there are K + 1 slots here and below, except of ``retrieved_doc_embeds`` and ``retrieved_doc_ids``.
        logits: only with ``output_logits``: marginal log-probabilities (B, T, V) for RAG-Token, each passage's own
            log-probabilities (B, K, T, V) for RAG-Sequence.
        token_log_probs: (B, K, T) log p(y_t|x,z,y_<t), 0 where a label is not scored.
        scored: (B, T) bool, the labels that count.
        alternative_log_probs: (B, K, T) log p(a|x,z,y_<t) of one other token a in the place of each label, if it was given.
        truncated: (B, K) bool, the contexts whose passage was cut.
        context_input_ids, context_attention_mask: (B·K, S) with ``output_retrieved``.
        retrieved_doc_embeds: (B, K, D) with ``output_retrieved``.
        retrieved_doc_ids: B lists of at most K passage ids with ``output_retrieved``.
        question_encoder_last_hidden_state: (B, D), the question vectors (transformers' name), where it retrieved.
    """

    loss: Tensor | None = None
    nll: Tensor | None = None
    doc_scores: Tensor | None = None
    logits: Tensor | None = None
    token_log_probs: Tensor | None = None
    scored: Tensor | None = None
    alternative_log_probs: Tensor | None = None
    truncated: Tensor | None = None
    context_input_ids: Tensor | None = None
    context_attention_mask: Tensor | None = None
    retrieved_doc_embeds: Tensor | None = None
    retrieved_doc_ids: list[list[str]] | None = None
    question_encoder_last_hidden_state: Tensor | None = None


@dataclass(frozen=True)
class TargetScores:
    """What the generator says of targets, before passages are summed out.

    ``scored`` is (B, T) bool, the labels that count, ``log_probs`` (B, K, T) log p(y_t|x,z,y_<t), ``uniform`` (B, K, T) the
    log-probability of a uniform target and ``alternative`` (B, K, T) that of another token, where they were asked for; all
    are 0 where a label is not scored.
    """

    scored: Tensor
    log_probs: Tensor
    uniform: Tensor | None = None
    alternative: Tensor | None = None


@dataclass
class RagInputs:
    """B questions with their K passages, ready for the generator: contexts (B·K, S) and scores (B, K)."""

    context_input_ids: Tensor
    context_attention_mask: Tensor
    doc_scores: Tensor
    truncated: Tensor | None = None
    retrieved_doc_embeds: Tensor | None = None
    retrieved_doc_ids: list[list[str]] | None = None
    question_vectors: Tensor | None = None
    prompt_lengths: Tensor | None = None

    @property
    def log_prior(self) -> Tensor:
        """(B, K), log p(z|x)."""
        return log_prior(self.doc_scores)

    def output(self, *, retrieved: bool) -> RagOutput:
        """The part of an output that the inputs alone decide; contexts and vectors only if ``retrieved``."""
        out = RagOutput(
            doc_scores=self.doc_scores,
            truncated=self.truncated,
            question_encoder_last_hidden_state=self.question_vectors,
        )
        if retrieved:
            out.context_input_ids = self.context_input_ids
            out.context_attention_mask = self.context_attention_mask
            out.retrieved_doc_embeds = self.retrieved_doc_embeds
            out.retrieved_doc_ids = self.retrieved_doc_ids
        return out
