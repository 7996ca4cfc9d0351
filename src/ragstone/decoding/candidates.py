"""Given answers instead of searched ones: classification by the probability of each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragstone.decoding.contexts import Contexts
from ragstone.decoding.outputs import RagGenerateOutput, sequence_output, token_output
from ragstone.decoding.scoring import counted_tokens, score_sequences
from ragstone.generators.prompts import pad_rows

__all__ = ["score_candidates"]


@torch.no_grad()
def score_candidates(
    contexts: Contexts,
    log_prior: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    method: str,
) -> RagGenerateOutput:
    """Score the same C candidates for each of B questions.

    Args:
        contexts: N = B·K contexts, row b·K + k.
        log_prior: (B, K), log p(z|x).
        candidates: C targets as token ids, without a start token.
        method: "token" or "sequence", how passages are summed out. For candidates of one token both ways are the same.

    Returns:
        B·C rows in the order given, candidate c of question b in row b·C + c.
    """
    generator, (batch, passages) = contexts.generator, log_prior.shape
    start = () if generator.start_token_id is None else (generator.start_token_id,)
    rows = pad_rows([(*start, *candidate) for candidate in candidates], fill=generator.fill_token_id)[0]
    sequences = rows.to(log_prior.device).repeat(batch, 1)
    questions = torch.arange(batch, device=log_prior.device).repeat_interleave(len(candidates))
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=log_prior.device).repeat(batch)
    prior, counts = log_prior[questions], counted_tokens(generator, sequences, lengths)
    scores = score_sequences(contexts, questions, sequences, passages)
    scores = scores.masked_fill(~counts.unsqueeze(1), 0.0)
    nothing = contexts.nothing_by_row(len(sequences))
    if method == "sequence":
        return sequence_output(prior, sequences, scores, counts, nothing=nothing)
    return token_output(prior, sequences, scores, counts, nothing=nothing)
