"""RAG-Sequence decoding: thorough, fast (paper §2.5) and ancestral sampling.

p(y|x) = Σ_k p(z_k|x) p(y|x,z_k) does not break into tokens, so hypotheses are searched under each passage alone and then
weighed against each other by the marginal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ragstone.decoding.marginal_search import marginal_search, option, permitted
from ragstone.decoding.outputs import RagGenerateOutput
from ragstone.decoding.scoring import Hypothesis, hypotheses_of, score_pairs, score_sequences
from ragstone.errors import InputError
from ragstone.generators import EncodedContexts, Generator
from ragstone.generators.prompts import pad_rows
from ragstone.marginal import sequence_log_likelihood, sequence_posterior

__all__ = ["DECODE_MODES", "rag_sequence_generate"]

logger = logging.getLogger(__name__)

DECODE_MODES = ("thorough", "fast")


@dataclass(frozen=True)
class _Ranked:
    """At most n sequences (n, T) of one question, best first, what ranked them (n,), and their scores (n, K, T')."""

    sequences: Tensor
    ranks: Tensor
    token_log_probs: Tensor


@torch.no_grad()
def rag_sequence_generate(
    generator: Generator,
    contexts: EncodedContexts,
    log_prior: Tensor,
    *,
    decode: Literal["thorough", "fast"] = "thorough",
    num_return_sequences: int | None = None,
    num_beams: int | None = None,
    do_sample: bool | None = None,
    deduplicate: bool = True,
    **options: Any,
) -> RagGenerateOutput:
    """Answer B questions with K passages each.

    *Thorough*: every hypothesis found under any passage is scored under every passage and ranked by the marginal. *Fast*: a
    hypothesis is ranked by the passages whose own search found it, all others counting as 0. With ``do_sample`` each
    sequence is drawn ancestrally, z ~ p(z|x) and then y ~ p(y|x,z), without deduplication. Whatever ranked or drew them,
    the ``log_probs`` and ``posteriors`` returned are those of the full marginal.

    Args:
        generator: the adapter that encoded ``contexts``.
        contexts: N = B·K encoded contexts, row b·K + k.
        log_prior: (B, K), log p(z|x).
        decode: how hypotheses are ranked.
        num_return_sequences: rows a question. Where fewer distinct hypotheses are found for a question its search is
            widened once, then the last is repeated and a warning says so.
        num_beams: beams (and hypotheses) of each passage's own search.
        do_sample: draw instead of search.
        deduplicate: keep one of equal hypotheses.
        options: those of transformers' ``generate``, for each passage's own search. What is None here and above is
            taken from the generation config.
    """
    if decode not in DECODE_MODES:
        raise InputError(f"decode is {decode!r}; choose one of {', '.join(DECODE_MODES)}.")
    given = {"num_return_sequences": num_return_sequences, "num_beams": num_beams, "do_sample": do_sample, **options}
    num_return_sequences, num_beams = (option(generator, given, n, 1) for n in ("num_return_sequences", "num_beams"))
    if num_return_sequences < 1 or num_beams < 1:
        raise InputError(
            f"num_return_sequences is {num_return_sequences} and num_beams is {num_beams}; both must be at least 1."
        )
    if options.get("streamer") is not None:
        raise InputError("RAG-Sequence ranks finished hypotheses, so no token can be streamed; use RAG-Token.")
    if option(generator, given, "do_sample", False):
        return _collect(
            generator, log_prior, _sample(generator, contexts, log_prior, num_return_sequences, num_beams, options)
        )

    def hypotheses(pairs: list[tuple[Hypothesis, int]]) -> list[Hypothesis]:
        return list(dict.fromkeys(h for h, _ in pairs)) if deduplicate else [h for h, _ in pairs]

    everyone = list(range(log_prior.shape[0]))
    found = _search(generator, contexts, log_prior, everyone, num_beams, options)
    # Only the questions that lack hypotheses search again, so that an answer does not depend on its batch.
    few = [question for question in everyone if len(hypotheses(found[question])) < num_return_sequences]
    if few:
        wide = _search(generator, contexts, log_prior, few, max(num_return_sequences, 2 * num_beams), options)
        for question in few:
            found[question] = found[question] + wide[question] if deduplicate else wide[question]
    candidates = [hypotheses(found[question]) for question in everyone]
    if decode == "thorough":
        ranked = _rank_thorough(generator, contexts, log_prior, candidates, num_return_sequences)
    else:
        ranked = _rank_fast(generator, contexts, log_prior, candidates, found, num_return_sequences)
    return _collect(generator, log_prior, [_fill(r, num_return_sequences) for r in ranked])


def _search(
    generator: Generator,
    contexts: EncodedContexts,
    log_prior: Tensor,
    questions: list[int],
    num_beams: int,
    options: dict[str, Any],
) -> dict[int, list[tuple[Hypothesis, int]]]:
    """Search under each real passage of ``questions`` alone: for each its (hypothesis, passage k) pairs, in order of k."""
    passages = log_prior.shape[1]
    wanted = torch.zeros_like(log_prior, dtype=torch.bool)
    wanted[questions] = ~torch.isneginf(log_prior[questions])
    rows = wanted.flatten().nonzero().squeeze(1)
    options = {**options, "num_beams": num_beams, "num_return_sequences": num_beams, "do_sample": False}
    part = contexts if len(rows) == contexts.rows else contexts.select(rows)
    sequences = _search_rows(generator, part, rows // passages, options)
    found: dict[int, list[tuple[Hypothesis, int]]] = {question: [] for question in questions}
    owners = rows.repeat_interleave(num_beams).tolist()
    fine = permitted(generator, options, [row // passages for row in owners], sequences)
    for n, (row, hypothesis) in enumerate(zip(owners, hypotheses_of(generator, sequences), strict=True)):
        if fine[n] or n % num_beams == 0:  # the best of a passage is always kept
            found[row // passages].append((hypothesis, row % passages))
    return found


def _sample(
    generator: Generator,
    contexts: EncodedContexts,
    log_prior: Tensor,
    samples: int,
    num_beams: int,
    options: dict[str, Any],
) -> list[_Ranked]:
    """Draw a passage by its prior, then a sequence under it: for each question ``samples`` independent sequences."""
    batch, passages = log_prior.shape
    drawn = torch.multinomial(log_prior.exp(), samples, replacement=True)
    rows = (torch.arange(batch, device=drawn.device).unsqueeze(1) * passages + drawn).flatten()
    options = {**options, "num_beams": num_beams, "num_return_sequences": 1, "do_sample": True}
    questions = rows // passages
    sequences = _search_rows(generator, contexts.select(rows), questions, options)
    scores = score_sequences(generator, contexts, questions, sequences, passages)
    ranks = sequence_log_likelihood(log_prior[questions], scores)
    return [
        _Ranked(*parts) for parts in zip(*(torch.split(t, samples) for t in (sequences, ranks, scores)), strict=True)
    ]


def _search_rows(generator: Generator, contexts: EncodedContexts, questions: Tensor, options: dict[str, Any]) -> Tensor:
    """Search every one of N contexts as a question with one passage; ``questions`` (N,) says whose it is."""
    options = dict(options)
    constraint: Callable[[int, Tensor], list[int]] | None = options.get("prefix_allowed_tokens_fn")
    if constraint is not None:
        owner = questions.tolist()
        options["prefix_allowed_tokens_fn"] = lambda row, tokens: constraint(owner[row], tokens)
    if options.get("decoder_input_ids") is not None:
        options["decoder_input_ids"] = options["decoder_input_ids"].to(questions.device)[questions]
    certain = torch.zeros(len(questions), 1, device=questions.device)
    return marginal_search(generator, contexts, certain, **options).sequences


def _rank_thorough(
    generator: Generator,
    contexts: EncodedContexts,
    log_prior: Tensor,
    candidates: list[list[Hypothesis]],
    n: int,
) -> list[_Ranked]:
    """The best n of each question's ``candidates`` by log p(y|x), every one scored under every passage, in one batch."""
    sequences, questions = _batch(generator, candidates, log_prior)
    scores = score_sequences(generator, contexts, questions, sequences, log_prior.shape[1])
    ranks = sequence_log_likelihood(log_prior[questions], scores)
    best = _best(ranks, candidates, n)
    return [_Ranked(sequences[rows], ranks[rows], scores[rows]) for rows in best]


def _rank_fast(
    generator: Generator,
    contexts: EncodedContexts,
    log_prior: Tensor,
    candidates: list[list[Hypothesis]],
    found: dict[int, list[tuple[Hypothesis, int]]],
    n: int,
) -> list[_Ranked]:
    """The best n by the sum over the passages whose own search produced them; only those n are then scored in full."""
    passages = log_prior.shape[1]
    sequences, questions = _batch(generator, candidates, log_prior)
    keys = [(question, h) for question, row in enumerate(candidates) for h in row]
    place: dict[tuple[int, Hypothesis], int] = {}
    for row_number, key in enumerate(keys):  # without deduplication equal ones share the first one's scores
        place.setdefault(key, row_number)
    produced = dict.fromkeys((question, h, k) for question, pairs in found.items() for h, k in pairs)
    pairs = torch.tensor([(place[question, h], k) for question, h, k in produced], device=log_prior.device)
    which, passage = pairs.unbind(dim=1)
    token_scores = score_pairs(generator, contexts, questions[which] * passages + passage, sequences[which])
    joint = log_prior.new_full((len(sequences), passages), -torch.inf)
    joint[which, passage] = (log_prior[questions[which], passage] + token_scores.sum(dim=1)).to(joint.dtype)
    ranks = joint.logsumexp(dim=1)[[place[key] for key in keys]]
    best = _best(ranks, candidates, n)
    chosen = torch.cat(best)
    scores = score_sequences(generator, contexts, questions[chosen], sequences[chosen], passages)
    parts = torch.split(scores, [len(rows) for rows in best])
    return [_Ranked(sequences[rows], ranks[rows], part) for rows, part in zip(best, parts, strict=True)]


def _batch(generator: Generator, candidates: list[list[Hypothesis]], log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """All questions' hypotheses as one padded batch (R, T), and the question (R,) of each."""
    sequences = pad_rows([h for row in candidates for h in row], fill=generator.fill_token_id)[0]
    questions = [question for question, row in enumerate(candidates) for _ in row]
    return sequences.to(log_prior.device), torch.tensor(questions, device=log_prior.device)


def _best(ranks: Tensor, candidates: list[list[Hypothesis]], n: int) -> list[Tensor]:
    """For each question the rows of its best n candidates, best first, of all rows' ``ranks`` (R,)."""
    best, start = [], 0
    for row in candidates:
        best.append(ranks[start : start + len(row)].argsort(descending=True, stable=True)[:n] + start)
        start += len(row)
    return best


def _fill(ranked: _Ranked, n: int) -> _Ranked:
    """Exactly n sequences, the last one repeated where the search found fewer."""
    missing = n - len(ranked.ranks)
    if missing <= 0:
        return ranked
    logger.warning("Only %d distinct hypotheses were found for %d sequences; the last is repeated.", n - missing, n)
    again = torch.tensor([*range(n - missing), *[n - missing - 1] * missing], device=ranked.ranks.device)
    return _Ranked(ranked.sequences[again], ranked.ranks[again], ranked.token_log_probs[again])


def _collect(generator: Generator, log_prior: Tensor, ranked: list[_Ranked]) -> RagGenerateOutput:
    """The answers to B questions as one batch, padded to the longest."""
    sequences = torch.cat(_pad_last([r.sequences for r in ranked], generator.fill_token_id))
    token_log_probs = torch.cat(_pad_last([r.token_log_probs for r in ranked], 0.0))
    prior = log_prior.repeat_interleave(len(sequences) // len(log_prior), dim=0)
    return RagGenerateOutput(
        sequences=sequences,
        log_probs=sequence_log_likelihood(prior, token_log_probs),
        posteriors=sequence_posterior(prior, token_log_probs),
        token_log_probs=token_log_probs,
        sequences_scores=torch.cat([r.ranks for r in ranked]),
    )


def _pad_last(tensors: list[Tensor], value: float) -> list[Tensor]:
    width = max(t.shape[-1] for t in tensors)
    return [torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=value) for t in tensors]
