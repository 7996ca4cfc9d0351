"""The equations: how a retrieved passage, a latent variable z, is summed out (Lewis et al. 2020, arXiv 2005.11401, §2.1).

Pure functions over tensors. ``B`` questions, ``K`` passages a question, ``T`` target tokens, ``V`` vocabulary; probabilities
are natural logarithms. Half-precision inputs are computed in float32, float64 stays float64. A passage slot that holds
nothing has the score −inf, hence the prior 0 (log −inf): it takes no part in any sum.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

__all__ = [
    "IGNORED",
    "any_answer_nll",
    "label_log_probs",
    "log_prior",
    "log_probs",
    "marginal_next_token",
    "mean_log_probs",
    "mean_token_posterior",
    "scored_tokens",
    "sequence_log_likelihood",
    "sequence_posterior",
    "smoothed_loss",
    "token_log_likelihood",
    "token_posteriors",
]

IGNORED = -100
"""The label that is never scored (PyTorch's and transformers' convention)."""


def log_prior(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log p(z|x) = log_softmax over the real passages of ``scores`` (paper §2.2: p(z|x) ∝ exp(q·d)).

    Args:
        scores: (B, K), the logits s = τ·(q·d).
        mask: (B, K) bool, true where the slot holds a passage; a score of −inf means the same as false.

    Returns:
        (B, K); −inf in empty slots, and in every slot of a row that holds no passage at all.

    >>> log_prior(torch.tensor([[0.0, 0.0, 7.0]]), torch.tensor([[True, True, False]])).exp()
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    scores = _widen(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).log_softmax(dim=-1).masked_fill(torch.isneginf(scores), -torch.inf)


def scored_tokens(labels: Tensor, *, pad_token_id: int | None, eos_token_id: int | Collection[int] | None) -> Tensor:
    """Which labels (B, T) are scored, as (B, T) bool: never −100, never padding.

    The padding token counts as padding only where it is not also an end-of-sequence token: where a tokenizer pads with
    EOS, that token is a real target and the caller marks padding with −100.

    >>> scored_tokens(torch.tensor([[5, 2, 1, -100]]), pad_token_id=1, eos_token_id=2)
    tensor([[ True,  True, False, False]])
    """
    scored = labels != IGNORED
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    if pad_token_id is not None and pad_token_id not in ends:
        scored &= labels != pad_token_id
    return scored


def log_probs(logits: Tensor) -> Tensor:
    """log p(v | ·) of the whole vocabulary: log_softmax over the last dimension; (…, V) -> (…, V)."""
    return _widen(logits).log_softmax(dim=-1)


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(y_t | ·) of the labels alone, without keeping a (…, T, V) log-softmax.

    Args:
        logits: (…, T, V), unnormalised.
        labels: (…, T); negative labels (ignored ones) give the value of token 0, to be masked by the caller.

    Returns:
        (…, T).
    """
    logits = _widen(logits)
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def mean_log_probs(logits: Tensor) -> Tensor:
    """1/V · Σ_v log p(v | ·): the log-probability of a uniform target, for label smoothing; (…, T, V) -> (…, T)."""
    logits = _widen(logits)
    return logits.mean(dim=-1) - logits.logsumexp(dim=-1)


def sequence_log_likelihood(prior: Tensor, token_log_probs: Tensor, scored: Tensor | None = None) -> Tensor:
    """RAG-Sequence: log p(y|x) = logsumexp_k( log p(z_k|x) + Σ_t log p(y_t|x,z_k,y_<t) ) (paper §2.1).

    Args:
        prior: (B, K), log p(z|x).
        token_log_probs: (B, K, T), log p(y_t|x,z_k,y_<t).
        scored: (B, T) bool, the tokens that count (all by default).

    Returns:
        (B,).

    >>> two_passages = torch.tensor([[[0.5, 0.5], [0.25, 1.0]]]).log()
    >>> sequence_log_likelihood(torch.tensor([[0.5, 0.5]]).log(), two_passages).exp()  # ½·¼ + ½·¼
    tensor([0.2500])
    """
    return _logsumexp(_joint(prior, token_log_probs, scored), dim=1)


def token_log_likelihood(prior: Tensor, token_log_probs: Tensor, scored: Tensor | None = None) -> Tensor:
    """RAG-Token: log p(y|x) = Σ_t logsumexp_k( log p(z_k|x) + log p(y_t|x,z_k,y_<t) ) (paper §2.1).

    Shapes as in :func:`sequence_log_likelihood`.

    >>> two_passages = torch.tensor([[[0.5, 0.5], [0.25, 1.0]]]).log()
    >>> token_log_likelihood(torch.tensor([[0.5, 0.5]]).log(), two_passages).exp()  # (½·½ + ½·¼) · (½·½ + ½·1)
    tensor([0.2812])
    """
    marginal = _logsumexp(_widen(prior).unsqueeze(-1) + _widen(token_log_probs), dim=1)
    return (marginal if scored is None else marginal.masked_fill(~scored, 0.0)).sum(dim=-1)


def marginal_next_token(prior: Tensor, log_probs: Tensor) -> Tensor:
    """RAG-Token's next-token distribution, log Σ_k p(z_k|x) p(v|x,z_k,y_<t); prior (B, K), log_probs (B, K, V) -> (B, V)."""
    return _logsumexp(_widen(prior).unsqueeze(-1) + _widen(log_probs), dim=1)


def sequence_posterior(prior: Tensor, token_log_probs: Tensor, scored: Tensor | None = None) -> Tensor:
    """p(z_k|x,y) ∝ p(z_k|x) · p(y|x,z_k); shapes as in :func:`sequence_log_likelihood` -> (B, K), rows sum to 1.

    A row is 0 where no passage could have written the target.
    """
    return _normalised(_joint(prior, token_log_probs, scored))


def token_posteriors(prior: Tensor, token_log_probs: Tensor) -> Tensor:
    """p(z_k|x,y_≤t) of each token, the summands of RAG-Token normalised over k; (B, K), (B, K, T) -> (B, K, T)."""
    return _normalised(_widen(prior).unsqueeze(-1) + _widen(token_log_probs))


def mean_token_posterior(prior: Tensor, token_log_probs: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """RAG-Token's posterior of a whole sequence: the mean of its tokens' posteriors.

    Args:
        prior: (B, K).
        token_log_probs: (B, K, T).
        scored: (B, T) bool.

    Returns:
        (B, K), rows sum to 1 (the prior where no token is scored), and the posteriors by token (B, K, T), 0 where a token
        is not scored.
    """
    by_token = token_posteriors(prior, token_log_probs).masked_fill(~scored.unsqueeze(1), 0.0)
    count = scored.sum(dim=1, keepdim=True)
    return torch.where(count > 0, by_token.sum(dim=-1) / count.clamp(min=1), _widen(prior).exp()), by_token


def smoothed_loss(nll: Tensor, uniform_nll: Tensor, epsilon: float) -> Tensor:
    """Label smoothing over the vocabulary, once: (1 − ε)·NLL + ε·NLL of a uniform target.

    The second term is the same marginal with every log p(y_t|·) replaced by 1/V · Σ_v log p(v|·): for RAG-Token of the
    marginal next-token distribution, for RAG-Sequence of each passage's own (:func:`mean_log_probs`).
    """
    return (1.0 - epsilon) * nll + epsilon * uniform_nll


def any_answer_nll(nll: Tensor, groups: Tensor) -> Tensor:
    """−log Σ_a p(a|x): the NLL that any of a question's accepted answers is given.

    Args:
        nll: (R,), −log p(a|x) of R answers.
        groups: (R,), the question 0 … B−1 of each; none is left out.

    Returns:
        (B,).

    >>> any_answer_nll(-torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0, 0, 1])).neg().exp()
    tensor([0.7500, 0.5000])
    """
    rows = torch.full((int(groups.max()) + 1, len(nll)), -torch.inf, dtype=nll.dtype, device=nll.device)
    rows[groups, torch.arange(len(nll), device=nll.device)] = -nll
    return -_logsumexp(rows, dim=1)


def _joint(prior: Tensor, token_log_probs: Tensor, scored: Tensor | None) -> Tensor:
    """log p(z_k|x) + Σ_t log p(y_t|…): (B, K)."""
    token_log_probs = _widen(token_log_probs)
    if scored is not None:
        token_log_probs = token_log_probs.masked_fill(~scored.unsqueeze(1), 0.0)
    return _widen(prior) + token_log_probs.sum(dim=-1)


def _logsumexp(values: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every summand is −inf."""
    impossible = torch.isneginf(values).all(dim=dim, keepdim=True)
    return values.masked_fill(impossible, 0.0).logsumexp(dim=dim).masked_fill(impossible.squeeze(dim), -torch.inf)


def _normalised(joint: Tensor) -> Tensor:
    """softmax over the passages (dim 1), 0 rather than NaN where every summand is −inf."""
    impossible = torch.isneginf(joint).all(dim=1, keepdim=True)
    return joint.masked_fill(impossible, 0.0).softmax(dim=1).masked_fill(impossible, 0.0)


def _widen(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
