"""RAG-Sequence decoding: thorough, fast (paper §2.5) and ancestral sampling.

p(y|x) = Σ_k p(z_k|x) p(y|x,z_k) does not break into tokens, so hypotheses are searched under each passage alone and then
weighed against each other by the marginal. Most of that weighing can be left out without changing the winner: what a search
computed is not computed again, a hypothesis that can no longer win is dropped, and passages that cannot change the winner
any more are not even read (:mod:`ragstone.decoding.hypotheses` has the bounds).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ragstone.decoding.contexts import Contexts
from ragstone.decoding.hypotheses import HypothesisTable
from ragstone.decoding.marginal_search import marginal_search
from ragstone.decoding.options import as_asked, check_counts, option, permitted
from ragstone.decoding.outputs import RagGenerateOutput, sequence_output
from ragstone.decoding.scoring import counted_tokens, hypotheses_of, score_pairs, score_sequences
from ragstone.errors import InputError
from ragstone.generators import Generator
from ragstone.generators.prompts import pad_rows

__all__ = ["DECODE_MODES", "check_decode", "rag_sequence_generate"]

logger = logging.getLogger(__name__)

DECODE_MODES = ("thorough", "fast")

_FEW_PAIRS = 64
"""So few pairs are scored in one go: pruning between rounds would save less than a round costs."""

_FEW_PASSAGES = 8
"""So few are searched together where all must be read anyway: a step costs about the same for one row as for these."""

_ENDS_EARLY = ("stopping_criteria", "stop_strings", "max_time")
"""Options under which one hypothesis may be the beginning of another."""

Watcher = Callable[[int, tuple[int, ...]], None]


def check_decode(decode: str) -> None:
    """Raise InputError unless ``decode`` is a way of ranking hypotheses."""
    if decode not in DECODE_MODES:
        raise InputError(f"decode is {decode!r}; choose one of {', '.join(DECODE_MODES)}.")


@torch.no_grad()
def rag_sequence_generate(
    contexts: Contexts,
    log_prior: Tensor,
    *,
    decode: Literal["thorough", "fast"] = "thorough",
    num_return_sequences: int | None = None,
    num_beams: int | None = None,
    do_sample: bool | None = None,
    deduplicate: bool = True,
    prune: bool = True,
    early_stop: bool = True,
    complete: bool = True,
    watcher: Watcher | None = None,
    **options: Any,
) -> RagGenerateOutput:
    """Answer B questions with K passages each.

    *Thorough*: every hypothesis found under any passage is ranked by its marginal over all passages. *Fast*: a hypothesis is
    ranked by the passages whose own search found it, all others counting as 0. With ``do_sample`` each sequence is drawn
    ancestrally, z ~ p(z|x) and then y ~ p(y|x,z), from all tokens unless ``top_k`` says otherwise, without deduplication.
    Whatever ranked or drew them, the ``log_probs`` and ``posteriors`` returned are those of the full marginal.

    Args:
        contexts: N = B·K contexts, row b·K + k.
        log_prior: (B, K), log p(z|x).
        decode: how hypotheses are ranked.
        num_return_sequences: rows a question. Where fewer distinct hypotheses are found for a question its search is
            widened once, then the last is repeated and a warning says so.
        num_beams: beams (and hypotheses) of each passage's own search.
        do_sample: draw instead of search.
        deduplicate: keep one of equal hypotheses.
        prune: drop hypotheses that can no longer win (thorough). The result is the same without.
        early_stop: leave passages unread that can no longer change the winner (thorough, one returned sequence). The
            winner is the same without.
        complete: score what is returned under all passages. False leaves the bounds that ranked it.
        watcher: called with a question and its best hypothesis so far, whenever that changes.
        options: those of transformers' ``generate``, for each passage's own search. What is None here and above is
            taken from the generation config.
    """
    given = {"num_return_sequences": num_return_sequences, "num_beams": num_beams, "do_sample": do_sample, **options}
    contexts = as_asked(contexts, options)
    generator = contexts.generator
    check_decode(decode)
    count, beams = check_counts(generator, given)
    if options.get("streamer") is not None:
        raise InputError("RAG-Sequence ranks finished hypotheses, so no token can be streamed; use RAG-Token.")
    if option(generator, given, "do_sample", False):
        return _sample(contexts, log_prior, count, beams, options)
    disjoint = not any(option(generator, options, name) for name in _ENDS_EARLY)
    search = _Search(contexts, log_prior, options, watcher, disjoint=disjoint)
    early_stop = early_stop and count == 1 and not (complete and log_prior.shape[1] <= _FEW_PASSAGES)
    search.run(beams, count, thorough=decode == "thorough", prune=prune, early_stop=early_stop)
    few = [b for b, table in enumerate(search.tables) if search.variety(table, deduplicate) < count]
    if few:
        # Only the questions that lack hypotheses search again, so that an answer does not depend on its batch.
        search.widen(few, max(count, 2 * beams), deduplicate)
        search.score(few, count, thorough=decode == "thorough", prune=prune)
    ranks = [_ranks(table, decode) for table in search.tables]
    chosen = [_best(table, row, count, deduplicate) for table, row in zip(search.tables, ranks, strict=True)]
    if complete:
        search.complete(chosen)
        if decode == "thorough":
            ranks = [_ranks(table, decode) for table in search.tables]
    return _collect(generator, log_prior, search.tables, chosen, ranks)


class _Search:
    """The hypotheses of B questions while they are found and scored, all questions in the same batches."""

    def __init__(
        self,
        contexts: Contexts,
        log_prior: Tensor,
        options: dict[str, Any],
        watcher: Watcher | None,
        *,
        disjoint: bool,
    ) -> None:
        self.contexts, self.log_prior, self.options = contexts, log_prior, options
        self.watcher, self.watched = watcher, {}  # type: ignore[var-annotated]
        self.tables = [HypothesisTable(row, disjoint=disjoint) for row in log_prior]

    def run(self, beams: int, count: int, *, thorough: bool, prune: bool, early_stop: bool) -> None:
        """Search every question's passages, the likely ones first, until nothing can change the best ``count``."""
        going = list(range(len(self.tables)))
        while going:
            chunk = [(b, k) for b in going for k in self.tables[b].next_passages(stop_early=thorough and early_stop)]
            self._find(chunk, beams)
            for b, k in chunk:
                self.tables[b].seen.append(k)
            self.score(going, count, thorough=thorough, prune=prune)
            self._tell(going)
            left = [b for b in going if len(self.tables[b].seen) < len(self.tables[b].order)]
            going = [b for b in left if not self.tables[b].certified()]

    def widen(self, questions: list[int], beams: int, deduplicate: bool) -> None:
        """Search with more beams for questions that lack hypotheses."""
        for b in questions:
            if not deduplicate:
                self.tables[b].found.clear()  # the wider search finds all of these again
        self._find([(b, k) for b in questions for k in self.tables[b].order], beams)

    @staticmethod
    def variety(table: HypothesisTable, deduplicate: bool) -> int:
        """How many sequences can be returned."""
        return len(table.hypotheses) if deduplicate else len(table.found)

    def _find(self, chunk: list[tuple[int, int]], beams: int) -> None:
        """Search under each passage k of question b in ``chunk`` alone."""
        generator, device = self.contexts.generator, self.log_prior.device
        chunk = sorted(chunk)
        rows = torch.tensor([b * self.log_prior.shape[1] + k for b, k in chunk], device=device)
        questions = torch.tensor([b for b, _ in chunk], device=device)
        options = {**self.options, "num_beams": beams, "num_return_sequences": beams, "do_sample": False}
        found = _search_rows(generator, self.contexts.encode(rows), questions, options)
        owners = [pair for pair in chunk for _ in range(beams)]
        fine = permitted(generator, options, [b for b, _ in owners], found.sequences)
        prompt = found.sequences.shape[1] - generator.labels_of(found.sequences).shape[1]
        padding = generator.pad_token_id
        for n, ((b, k), hypothesis) in enumerate(zip(owners, hypotheses_of(generator, found.sequences), strict=True)):
            if not fine[n] and n % beams:  # the best of a passage is always kept
                continue
            if found.stopped is not None:
                hypothesis = hypothesis[: prompt + int(found.stopped[n])]
            table = self.tables[b]
            number = table.add(hypothesis, k)
            if padding not in generator.eos_token_ids and padding in hypothesis[prompt:]:
                table.disjoint = False
            elif found.token_log_probs is not None:
                table.score(number, k, found.token_log_probs[n, 0, : len(hypothesis) - prompt])

    def score(self, questions: list[int], count: int, *, thorough: bool, prune: bool) -> None:
        """Score what may be among the best ``count`` of each question under all passages that have been searched.

        In rounds: each covers half of the pairs that are still unscored, the likely passages first, after which hypotheses
        that can no longer be among the best are dropped. Not ``thorough``: only under the passages that found them.
        """
        if not thorough:
            own = [(b, h, k) for b in questions for h, k in dict.fromkeys(self.tables[b].found)]
            self._score([(b, h, k) for b, h, k in own if (h, k) not in self.tables[b].tokens])
            return
        while True:
            pairs = []
            for b in questions:
                table = self.tables[b]
                numbers = table.candidates(count)
                if prune and len(numbers) <= count and len(table.seen) == len(table.order) and count == 1:
                    continue  # the winner is known
                missing = table.unscored(numbers if prune else table.candidates(len(table.hypotheses)), table.seen)
                if prune and len(missing) > _FEW_PAIRS:
                    missing = missing[: max(len(missing) // 2, _FEW_PAIRS)]
                pairs += [(b, h, k) for h, k in missing]
            if not pairs:
                return
            self._score(pairs)

    def complete(self, chosen: list[list[int]]) -> None:
        """Score the chosen hypotheses under every passage, read or not."""
        self._score(
            [
                (b, h, k)
                for b, numbers in enumerate(chosen)
                for h in dict.fromkeys(numbers)
                for k in self.tables[b].order
                if (h, k) not in self.tables[b].tokens
            ]
        )

    def _score(self, pairs: list[tuple[int, int, int]]) -> None:
        """Score hypotheses h of questions b under passages k."""
        if not pairs:
            return
        device, passages = self.log_prior.device, self.log_prior.shape[1]
        fill = self.contexts.generator.fill_token_id
        hypotheses = [self.tables[b].hypotheses[h] for b, h, _ in pairs]
        sequences = pad_rows(hypotheses, fill=fill)[0].to(device)
        prompt = sequences.shape[1] - self.contexts.generator.labels_of(sequences).shape[1]
        rows = torch.tensor([b * passages + k for b, _, k in pairs], device=device)
        scores = score_pairs(self.contexts, rows, sequences)
        for (b, h, k), hypothesis, row in zip(pairs, hypotheses, scores, strict=True):
            self.tables[b].score(h, k, row[: len(hypothesis) - prompt])

    def _tell(self, questions: list[int]) -> None:
        if self.watcher is None:
            return
        for b in questions:
            table = self.tables[b]
            best = table.hypotheses[int(table.bounds()[0].argmax())]
            if self.watched.get(b) != best:
                self.watched[b] = best
                self.watcher(b, best)


def _search_rows(generator: Generator, contexts: Any, questions: Tensor, options: dict[str, Any]) -> Any:
    """Search every one of N contexts as a question with one passage; ``questions`` (N,) says whose it is."""
    options = dict(options)
    constraint: Callable[[int, Tensor], list[int]] | None = options.get("prefix_allowed_tokens_fn")
    if constraint is not None:
        owner = questions.tolist()
        options["prefix_allowed_tokens_fn"] = lambda row, tokens: constraint(owner[row], tokens)
    if options.get("decoder_input_ids") is not None:
        options["decoder_input_ids"] = options["decoder_input_ids"].to(questions.device)[questions]
    certain = torch.zeros(len(questions), 1, device=questions.device)
    return marginal_search(generator, contexts, certain, **options)


def _sample(
    contexts: Contexts, log_prior: Tensor, samples: int, num_beams: int, options: dict[str, Any]
) -> RagGenerateOutput:
    """Draw a passage by its prior, then a sequence under it: for each question ``samples`` independent sequences."""
    generator, (batch, passages) = contexts.generator, log_prior.shape
    drawn = torch.multinomial(log_prior.exp(), samples, replacement=True)
    rows = (torch.arange(batch, device=drawn.device).unsqueeze(1) * passages + drawn).flatten()
    options = {**options, "num_beams": num_beams, "num_return_sequences": 1, "do_sample": True}
    options["top_k"] = option(generator, options, "top_k", 0)  # transformers would take the 50 likeliest tokens
    questions = rows // passages
    samples_found = _search_rows(generator, contexts.encode().select(rows), questions, options)
    sequences = samples_found.sequences
    counts = counted_tokens(generator, sequences, samples_found.stopped)
    scores = score_sequences(contexts, questions, sequences, passages).masked_fill(~counts.unsqueeze(1), 0.0)
    found = sequence_output(log_prior[questions], sequences, scores, counts)
    found.sequences_scores = found.log_probs
    return found


def _ranks(table: HypothesisTable, decode: str) -> list[float]:
    """What each hypothesis is ranked by: log p(h|x), or its share from the passages whose own search found it."""
    if decode == "thorough":
        return list(table.bounds()[0])
    own = np.full(table.log_probs.shape, -np.inf)
    places = tuple(zip(*table.found, strict=True))
    own[places] = (table.log_probs + table.log_prior)[places]
    return list(np.logaddexp.reduce(own, axis=1))


def _best(table: HypothesisTable, ranks: list[float], count: int, deduplicate: bool) -> list[int]:
    """The best ``count`` hypotheses, best first; the last is repeated where there are fewer."""
    numbers = [number for number, _ in table.found]
    best = sorted(dict.fromkeys(numbers) if deduplicate else numbers, key=lambda n: -ranks[n])[:count]
    if len(best) < count:
        found = len(best)
        logger.warning("Only %d distinct hypotheses were found for %d sequences; the last is repeated.", found, count)
        best += [best[-1]] * (count - found)
    return best


def _collect(
    generator: Generator,
    log_prior: Tensor,
    tables: list[HypothesisTable],
    chosen: list[list[int]],
    ranks: list[list[float]],
) -> RagGenerateOutput:
    """The answers to B questions as one batch, padded to the longest."""
    device, passages = log_prior.device, log_prior.shape[1]
    flat = [(b, number) for b, row in enumerate(chosen) for number in row]
    rows = [tables[b].hypotheses[number] for b, number in flat]
    sequences = pad_rows(rows, fill=generator.fill_token_id)[0].to(device)
    labels = generator.labels_of(sequences)
    prompt = sequences.shape[1] - labels.shape[1]
    wide = torch.promote_types(log_prior.dtype, torch.float32)
    scores = torch.zeros(len(flat), passages, labels.shape[1], dtype=wide, device=device)
    for n, (b, number) in enumerate(flat):
        for k in tables[b].order:
            by_token = tables[b].tokens.get((number, k))
            length = len(rows[n]) - prompt
            scores[n, k, :length] = -torch.inf if by_token is None else by_token
    prior = log_prior[torch.tensor([b for b, _ in flat], device=device)]
    lengths = torch.tensor([len(row) - prompt for row in rows], device=device)
    counts = counted_tokens(generator, sequences, lengths)
    ranked_by = torch.tensor([ranks[b][number] for b, number in flat], dtype=wide, device=device)
    found = sequence_output(prior, sequences, scores, counts, sequences_scores=ranked_by)
    assert found.log_probs is not None
    # Computed apart from log_probs, an upper bound may be below them by rounding; where nothing is unknown it is they.
    highest = [table.bounds()[1] for table in tables]
    high = torch.tensor([highest[b][number] for b, number in flat], dtype=wide, device=device).maximum(found.log_probs)
    known = [all((number, k) in tables[b].tokens for k in tables[b].order) for b, number in flat]
    high = torch.where(torch.tensor(known, device=device), found.log_probs, high)
    found.log_prob_bounds = torch.stack([found.log_probs, high], dim=1)
    return found
