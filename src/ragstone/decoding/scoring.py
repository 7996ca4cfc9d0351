"""Log-probabilities of finished sequences under passages that are encoded already."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ragstone.decoding.contexts import Contexts
from ragstone.generators import EncodedContexts, Generator

__all__ = ["Hypothesis", "counted_tokens", "hypotheses_of", "predicted_tokens", "score_pairs", "score_sequences"]

Hypothesis = tuple[int, ...]
"""Token ids as generated, up to the last one that counts."""

TOKENS_PER_CALL = 2048
"""Tokens (rows · T) of one scoring call: its activations stay small, and matrix products are as quick as they get."""


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


def counted_tokens(generator: Generator, sequences: Tensor, lengths: Tensor | None) -> Tensor:
    """Which of the predicted tokens of ``sequences`` (R, T) count (R, T'): at most the first ``lengths`` (R,) of each."""
    counts = predicted_tokens(generator, sequences)[1]
    if lengths is not None:
        counts &= torch.arange(counts.shape[1], device=counts.device) < lengths.unsqueeze(1)
    return counts


def hypotheses_of(generator: Generator, sequences: Tensor) -> list[Hypothesis]:
    """Sequences (R, T) as tuples that end with their last counted token, so that padding makes no difference."""
    counts = predicted_tokens(generator, sequences)[1]
    start = sequences.shape[1] - counts.shape[1]
    last = counts * torch.arange(1, counts.shape[1] + 1, device=counts.device)
    ends = (last.amax(dim=1) + start).tolist() if counts.shape[1] else [start] * len(sequences)
    return [tuple(row[:end]) for row, end in zip(sequences.tolist(), ends, strict=True)]


@torch.no_grad()
def score_pairs(contexts: Contexts, rows: Tensor, sequences: Tensor) -> Tensor:
    """log p(y_t | context, y_<t) of P pairs of a context and a sequence.

    Args:
        contexts: N contexts.
        rows: (P,), the context of each pair.
        sequences: (P, T) as generated, start token included.

    Returns:
        (P, T'), 0 for tokens that do not count (:func:`predicted_tokens`).
    """
    generator = contexts.generator
    labels, counts = predicted_tokens(generator, sequences)
    dtype = torch.promote_types(generator.model.dtype, torch.float32)
    scores = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    if not labels.numel():
        return scores
    started = sequences.shape[1] - labels.shape[1]
    lengths = (counts * torch.arange(1, labels.shape[1] + 1, device=labels.device)).amax(dim=1)
    with generator.accelerated():
        for encoded, which, places in contexts.pairs(rows):
            for part in _batches(lengths[which], places):
                pairs, width = which[part], int(lengths[which[part]].max())
                some, local = _only_used(encoded, places[part])
                scores[pairs, :width] = generator.target_log_probs(
                    some, local, sequences[pairs, : started + width], counts[pairs, :width]
                ).to(dtype)
    return scores


def _batches(lengths: Tensor, places: Tensor) -> Iterator[Tensor]:
    """Pairs of like length and of neighbouring contexts, as many as the budget of tokens allows; the longest first."""
    classes = torch.tensor([_length_class(length) for length in lengths.tolist()], device=lengths.device)
    for width in sorted({c for c in classes.tolist() if c}, reverse=True):
        alike = (classes == width).nonzero().squeeze(1)
        alike = alike[places[alike].argsort(stable=True)]
        yield from alike.split(max(TOKENS_PER_CALL // width, 1))


def _length_class(length: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is not below ``length``: at most a third is padding."""
    width = 1
    while width < length:
        power = width & (width - 1) == 0
        width = width + 1 if width < 4 else width * 3 // 2 if power else width * 4 // 3
    return width if length else 0


def _only_used(encoded: EncodedContexts, places: Tensor) -> tuple[EncodedContexts, Tensor]:
    """The contexts from the first used one to the last, without copying them, and the new ``places`` (P,).

    Where most of those are not used, the used ones are copied.
    """
    first, last = int(places.min()), int(places.max())
    used = torch.unique(places)
    if 2 * len(used) >= last + 1 - first:
        return encoded.select(slice(first, last + 1)), places - first
    return encoded.select(used), torch.searchsorted(used, places)


def score_sequences(contexts: Contexts, questions: Tensor, sequences: Tensor, passages: int) -> Tensor:
    """Score each sequence under all K passages of its question.

    Args:
        contexts: N = B·K contexts, row b·K + k.
        questions: (R,), the question b of each sequence.
        sequences: (R, T).
        passages: K.

    Returns:
        (R, K, T').
    """
    rows = (questions.unsqueeze(1) * passages + torch.arange(passages, device=questions.device)).flatten()
    scores = score_pairs(contexts, rows, sequences.repeat_interleave(passages, dim=0))
    return scores.view(len(sequences), passages, -1)
