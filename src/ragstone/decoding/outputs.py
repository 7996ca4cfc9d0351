"""What decoding returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from ragstone.marginal import (
    mean_token_posterior,
    sequence_log_likelihood,
    sequence_posterior,
    token_log_likelihood,
)

__all__ = ["RagGenerateOutput", "sequence_output", "token_output"]


@dataclass
class RagGenerateOutput(ModelOutput):
    """Generated sequences with the model's own probabilities: before processors, temperatures and length penalties.

    R = B · ``num_return_sequences`` rows, best first within a question (in the order drawn when sampling).

    Attributes:
        sequences: (R, T) token ids; with the start token for a seq2seq generator, new tokens only for a causal one.
        log_probs: (R,) log p(y|x), the full marginal over all K passages, in nats.
        posteriors: (R, K), p(z|x,y); for RAG-Token the mean over the scored tokens of ``token_posteriors``.
        token_posteriors: (R, K, T'), p(z|x,y_≤t) of each predicted token, 0 past the end (RAG-Token).
        token_log_probs: (R, K, T'), log p(y_t|x,z,y_<t) of each predicted token, 0 past the end.
        sequences_scores: (R,) what the search ranked by: RAG-Sequence's (thorough or fast) marginal; RAG-Token's beam score,
            where ``output_scores`` asked for it.
        scores: processed next-token scores per step, each (rows, V), where ``output_scores`` asked for them (RAG-Token).
        logits: marginal log-probabilities per step, each (rows, V), where ``output_logits`` asked for them (RAG-Token).
        log_prob_bounds: (R, 2), between which log p(y|x) lies (RAG-Sequence): both are ``log_probs`` unless
            ``complete=False`` left passages out; then ``log_probs`` is the lower one, and ``posteriors`` leave them out too.
        scored: (R, T'), which of the predicted tokens count: up to the end, and no padding.
        nothing: (R,) p(∅|x), how likely the model would have written nothing, where it has learnt to; all other
            probabilities are then those given that there is an answer, p(y|x,y≠∅).
        beam_indices: (R, T) as transformers' beam search reports them (RAG-Token).
    """

    sequences: Tensor | None = None
    log_probs: Tensor | None = None
    posteriors: Tensor | None = None
    token_posteriors: Tensor | None = None
    token_log_probs: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    log_prob_bounds: Tensor | None = None
    scored: Tensor | None = None
    nothing: Tensor | None = None


def sequence_output(
    prior: Tensor, sequences: Tensor, token_log_probs: Tensor, counts: Tensor, **others: Any
) -> RagGenerateOutput:
    """RAG-Sequence's output.

    Args:
        prior: (R, K), log p(z|x).
        sequences: (R, T).
        token_log_probs: (R, K, T'), log p(y_t|x,z,y_<t), 0 past the end.
        counts: (R, T'), which tokens count.
        others: further fields of the output.
    """
    return RagGenerateOutput(
        sequences=sequences,
        log_probs=sequence_log_likelihood(prior, token_log_probs),
        posteriors=sequence_posterior(prior, token_log_probs),
        token_log_probs=token_log_probs,
        scored=counts,
        **others,
    )


def token_output(
    prior: Tensor, sequences: Tensor, token_log_probs: Tensor, counts: Tensor, **others: Any
) -> RagGenerateOutput:
    """RAG-Token's output; arguments as those of :func:`sequence_output`."""
    posteriors, by_token = mean_token_posterior(prior, token_log_probs, counts)
    return RagGenerateOutput(
        sequences=sequences,
        log_probs=token_log_likelihood(prior, token_log_probs, counts),
        posteriors=posteriors,
        token_posteriors=by_token,
        token_log_probs=token_log_probs,
        scored=counts,
        **others,
    )
