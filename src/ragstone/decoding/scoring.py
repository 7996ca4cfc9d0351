"""Log-probabilities of finished sequences under passages that are encoded already."""

from __future__ import annotations

import torch
from torch import Tensor

from ragstone.generators import EncodedContexts, Generator
from ragstone.marginal import label_log_probs

__all__ = ["Hypothesis", "hypotheses_of", "predicted_tokens", "score_pairs", "score_sequences"]

Hypothesis = tuple[int, ...]
"""Token ids as generated, up to the last one that counts."""

_LOGITS_PER_CALL = 2**26
"""Logits (rows · T · V) that one scoring call may hold: 256 MB in float32."""


def predicted_tokens(generator: Generator, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The labels (R, T) of generated ``sequences`` and which of them count (R, T): up to the first EOS, and no padding."""
    labels = generator.labels_of(sequences)
    ends = torch.zeros_like(labels, dtype=torch.bool)
    for eos in generator.eos_token_ids:
        ends |= labels == eos
    counts = (ends.cumsum(dim=1) - ends.long()) == 0
    if generator.pad_token_id is not None and generator.pad_token_id not in generator.eos_token_ids:
        counts &= labels != generator.pad_token_id
    return labels, counts


def hypotheses_of(generator: Generator, sequences: Tensor) -> list[Hypothesis]:
    """Sequences (R, T) as tuples that end with their last counted token, so that padding makes no difference."""
    counts = predicted_tokens(generator, sequences)[1]
    start = sequences.shape[1] - counts.shape[1]
    last = counts * torch.arange(1, counts.shape[1] + 1, device=counts.device)
    ends = (last.amax(dim=1) + start).tolist() if counts.shape[1] else [start] * len(sequences)
    return [tuple(row[:end]) for row, end in zip(sequences.tolist(), ends, strict=True)]


@torch.no_grad()
def score_pairs(generator: Generator, contexts: EncodedContexts, rows: Tensor, sequences: Tensor) -> Tensor:
    """log p(y_t | context, y_<t) of R pairs of a context and a sequence.

    Args:
        generator: the generator that encoded ``contexts``.
        contexts: N encoded contexts.
        rows: (R,), the context of each pair.
        sequences: (R, T) as generated, start token included.

    Returns:
        (R, T'), 0 for tokens that do not count (:func:`predicted_tokens`).
    """
    labels, counts = predicted_tokens(generator, sequences)
    dtype = torch.promote_types(generator.model.dtype, torch.float32)
    scores = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    if not labels.numel():
        return scores
    vocabulary = int(generator.model.get_output_embeddings().weight.shape[0])
    started = sequences.shape[1] - labels.shape[1]
    # Long ones first: each call is as wide as its own longest sequence, and the first call shows the peak of memory.
    lengths = (counts * torch.arange(1, labels.shape[1] + 1, device=labels.device)).amax(dim=1)
    lengths, order = lengths.sort(descending=True, stable=True)
    first, total = 0, int((lengths > 0).sum())
    while first < total:
        width = int(lengths[first])
        part = order[first : first + max(_LOGITS_PER_CALL // (width * vocabulary), 1)]
        logits = generator.target_logits(contexts, rows[part], sequences[part, : started + width])
        scores[part, :width] = label_log_probs(logits, labels[part, :width])
        first += len(part)
    return scores.masked_fill(~counts, 0.0)


def score_sequences(
    generator: Generator, contexts: EncodedContexts, questions: Tensor, sequences: Tensor, passages: int
) -> Tensor:
    """Score each sequence under all K passages of its question.

    Args:
        generator: the generator that encoded ``contexts``.
        contexts: N = B·K encoded contexts, row b·K + k.
        questions: (R,), the question b of each sequence.
        sequences: (R, T).
        passages: K.

    Returns:
        (R, K, T').
    """
    rows = (questions.unsqueeze(1) * passages + torch.arange(passages, device=questions.device)).flatten()
    scores = score_pairs(generator, contexts, rows, sequences.repeat_interleave(passages, dim=0))
    return scores.view(len(sequences), passages, -1)
