"""Greedy and beam search over the marginal distribution, without what transformers' loop does for its other options.

It finds what that loop finds (``tests/decoding/test_quick_search.py``). It is quicker because probabilities are summed over
passages without a logarithm of each, because questions that are done leave the batch, and because the log-probabilities of
the chosen tokens under each passage are kept, so that nothing found needs to be scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from ragstone.decoding.options import is_neutral, option
from ragstone.generators import EncodedContexts, Generator

__all__ = ["Found", "SearchPlan", "quick_search"]

Constraint = Callable[[int, Tensor], Iterable[int]]
"""transformers' ``prefix_allowed_tokens_fn``: a question's place in the batch and the tokens so far -> what may follow."""

DEFAULT_NEW_TOKENS = 20
"""What transformers generates where nobody says how much."""

_NEVER = -1.0e9
"""The score of what must not be chosen, as in transformers' beam search."""

_HANDLED = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "num_beams",
        "num_return_sequences",
        "length_penalty",
        "early_stopping",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "no_repeat_ngram_size",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "use_cache",
        "return_dict_in_generate",
    }
)
_ARGUMENTS = {*signature(GenerationMixin.generate).parameters, "decoder_input_ids", "past_key_values", "inputs_embeds"}
"""What transformers' ``generate`` takes beside a generation config's fields."""

_ONLY_FOR_SAMPLING = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
    }
)
_ONLY_FOR_ASSISTANTS = frozenset(
    {
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
    }
)


@dataclass(frozen=True)
class Found:
    """What a search found: R = B·n sequences (R, T), best first within a question, and what the search ranked them by.

    ``token_log_probs`` (R, K, T') are log p(y_t|x,z,y_<t) of all predicted tokens, padding included; None where the search
    did not keep them. ``output`` is that of transformers' loop, where that did the search. ``repeated`` sequences stand in
    for others that do not exist. ``stopped`` (R,) is how many tokens of each were written before a criterion of the caller's
    ended it; None where there is none.
    """

    sequences: Tensor
    scores: Tensor | None = None
    token_log_probs: Tensor | None = None
    output: Any = None
    repeated: int = 0
    stopped: Tensor | None = None


@dataclass(frozen=True)
class SearchPlan:
    """What to search for: everything that this loop knows of a generation config."""

    new_tokens: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    processors: LogitsProcessorList
    constraint: Constraint | None = None

    @classmethod
    def of(cls, generator: Generator, options: dict[str, Any], device: torch.device) -> SearchPlan | None:
        """The plan that ``options`` amount to; None where they ask for what only transformers' loop knows."""

        def get(name: str, default: Any = None) -> Any:
            return option(generator, options, name, default)

        known = vars(GenerationConfig())
        extra = set(options) - set(known) - {"generation_config", "attention_mask", "prefix_allowed_tokens_fn"}
        if extra - _ARGUMENTS or any(options[name] is not None and options[name] != [] for name in extra):
            return None  # a misspelt one is an error there
        ignored = _HANDLED | _ONLY_FOR_SAMPLING | _ONLY_FOR_ASSISTANTS | {"transformers_version", "_from_model_config"}
        if not all(is_neutral(name, get(name)) for name in known if name not in ignored):
            return None
        eos = get("eos_token_id")
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        tokens = eos, get("pad_token_id"), get("decoder_start_token_id", generator.start_token_id)
        prompt = 0 if generator.start_token_id is None else 1
        if tokens != (tuple(generator.eos_token_ids), generator.pad_token_id, generator.start_token_id):
            return None
        longest = get("max_length", DEFAULT_NEW_TOKENS + prompt)
        plan = cls(
            new_tokens=get("max_new_tokens", longest - prompt),
            num_beams=get("num_beams", 1),
            num_return_sequences=get("num_return_sequences", 1),
            length_penalty=get("length_penalty", 1.0),
            early_stopping=get("early_stopping", False),
            processors=LogitsProcessorList(),
            constraint=options.get("prefix_allowed_tokens_fn"),
        )
        if plan.new_tokens < 1 or not 1 <= plan.num_return_sequences <= plan.num_beams:
            return None
        shortest = get("min_new_tokens", 0) + prompt if get("min_new_tokens") else get("min_length", 0)
        bos, last = get("forced_bos_token_id"), get("forced_eos_token_id")
        if get("no_repeat_ngram_size"):
            plan.processors.append(NoRepeatNGramLogitsProcessor(get("no_repeat_ngram_size")))
        if shortest and eos:
            plan.processors.append(MinLengthLogitsProcessor(shortest, list(eos), device=str(device)))
        if bos is not None:
            plan.processors.append(ForcedBOSTokenLogitsProcessor(bos))
        if last is not None:
            plan.processors.append(ForcedEOSTokenLogitsProcessor(plan.new_tokens + prompt, last, device=str(device)))
        return plan

    def process(self, questions: Tensor, past: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities (B·G, V) behind ``past`` (B·G, t) of ``questions`` (B,), of what may come next."""
        if (constraint := self.constraint) is not None:  # asked by question, for those that are done have left

            def allowed(row: int, tokens: Tensor) -> list[int]:
                return list(constraint(int(questions[row]), tokens))

            beams = len(past) // len(questions)
            scores = PrefixConstrainedLogitsProcessor(allowed, beams)(past, scores)
        return self.processors(past, scores)


@torch.no_grad()
def quick_search(generator: Generator, contexts: EncodedContexts, log_prior: Tensor, plan: SearchPlan) -> Found:
    """Search the marginal of B questions with K passages: N = B·K contexts, log p(z|x) (B, K)."""
    with generator.accelerated():
        if plan.num_beams == 1:
            return _greedy(generator, contexts, log_prior, plan)
        return _Beams(generator, contexts, log_prior, plan).run()


class _Marginal:
    """Rows of K passages and G beams for each of B questions, row (b·K + k)·G + g, and what they predict next."""

    def __init__(self, generator: Generator, contexts: EncodedContexts, log_prior: Tensor, copies: int) -> None:
        self.generator, self.copies = generator, copies
        self.prior = log_prior.exp()
        start = generator.start_token_id
        tokens = contexts.attention_mask.new_full((contexts.rows, 0 if start is None else 1), start or 0)
        logits, self.state = generator.start(contexts, tokens, copies)
        self.logits = logits.view(*log_prior.shape, 1, -1)  # (B, K, 1, V): all beams are equal so far

    def step(self, tokens: Tensor) -> None:
        """Append ``tokens`` (B, G) under every passage."""
        rows = tokens.unsqueeze(1).expand(-1, self.prior.shape[1], -1).reshape(-1, 1)
        logits = self.generator.step(self.state, rows)
        self.logits = logits.view(*self.prior.shape, self.copies, -1)

    def predict(self) -> Tensor:
        """log Σ_k p(z_k|x) p(v|x,z_k,y_<t) of every beam: (B, G, V)."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        logits = self.logits.to(wide)
        self.total = logits.logsumexp(dim=-1, keepdim=True)  # (B, K, G, 1)
        if self.prior.shape[1] == 1:
            return (logits - self.total).squeeze(1)
        odds = torch.sub(logits, self.total).exp_()
        batch, passages, beams, vocabulary = odds.shape
        summed = torch.bmm(self.prior.to(wide).unsqueeze(1), odds.view(batch, passages, -1))
        return summed.view(batch, beams, vocabulary).log_()

    def log_probs_of(self, beams: Tensor, tokens: Tensor) -> Tensor:
        """log p(token | x, z, y_<t) of ``tokens`` (B, C) behind ``beams`` (B, C) under each passage: (B, C, K)."""
        batch = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        beams = beams.clamp(max=self.logits.shape[2] - 1)
        return self.logits[batch, :, beams, tokens].to(self.total.dtype) - self.total[batch, :, beams, 0]

    def reorder(self, beams: Tensor) -> None:
        """Go on from these ``beams`` (B, G)."""
        batch, passages = self.prior.shape
        first = torch.arange(batch * passages, device=beams.device).view(batch, passages, 1) * self.copies
        self.state.reorder((first + beams.unsqueeze(1)).flatten())

    def keep(self, questions: Tensor) -> None:
        """Let all other questions leave."""
        every = torch.arange(self.prior.numel() * self.copies, device=questions.device)
        self.state = self.state.select(every.view(len(self.prior), -1)[questions].flatten())
        self.prior = self.prior[questions]


def _is_end(generator: Generator, tokens: Tensor) -> Tensor:
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for eos in generator.eos_token_ids:
        ends |= tokens == eos
    return ends


def _worth_leaving(active: Tensor) -> bool:
    """Whether so many have finished that dropping them is worth copying the others."""
    return 0 < int(active.sum()) <= 0.75 * len(active)


def _greedy(generator: Generator, contexts: EncodedContexts, log_prior: Tensor, plan: SearchPlan) -> Found:
    device, batch = log_prior.device, len(log_prior)
    rows = _Marginal(generator, contexts, log_prior, 1)
    start, fill = generator.start_token_id, generator.fill_token_id
    prompt = 0 if start is None else 1
    sequences = torch.full((batch, prompt + plan.new_tokens), fill, device=device)
    sequences[:, :prompt] = start or 0
    wide = torch.promote_types(rows.logits.dtype, torch.float32)
    trace = torch.zeros(*log_prior.shape, plan.new_tokens, dtype=wide, device=device)
    here = torch.arange(batch, device=device)  # which question each row still in the batch belongs to
    active = torch.ones(batch, dtype=torch.bool, device=device)
    beam = torch.zeros(batch, 1, dtype=torch.long, device=device)
    for t in range(plan.new_tokens):
        scores = plan.process(here, sequences[here, : prompt + t], rows.predict().squeeze(1))
        tokens = scores.argmax(dim=-1)
        trace[here, :, t] = rows.log_probs_of(beam[: len(here)], tokens[:, None])[:, 0] * active[:, None]
        tokens = tokens.masked_fill(~active, fill)
        sequences[here, prompt + t] = tokens
        active = active & ~_is_end(generator, tokens)
        if not active.any() or t + 1 == plan.new_tokens:
            break
        if _worth_leaving(active):
            rows.keep(active.nonzero().squeeze(1))
            here, tokens = here[active], tokens[active]
            active = torch.ones_like(here, dtype=torch.bool)
        rows.step(tokens.unsqueeze(1))
    return Found(sequences[:, : prompt + t + 1], None, trace[..., : t + 1])


@dataclass
class _Hypotheses:
    """C hypotheses of each of B questions.

    ``tokens`` (B, C, T), ``scores`` (B, C), ``trace`` (B, C, K, T') log-probabilities by passage, and ``lengths`` (B, C) in
    new tokens, 0 while a hypothesis is open.
    """

    tokens: Tensor
    scores: Tensor
    trace: Tensor
    lengths: Tensor

    def take(self, places: Tensor) -> _Hypotheses:
        """Those at ``places`` (B, C')."""
        batch = torch.arange(len(places), device=places.device).unsqueeze(1)
        return _Hypotheses(*(part[batch, places] for part in self._parts()))

    def best(self, count: int, scores: Tensor | None = None) -> _Hypotheses:
        """The ``count`` best, best first, by ``scores`` (B, C) if they are given."""
        return self.take((self.scores if scores is None else scores).topk(count, dim=1).indices)

    def of(self, questions: Tensor) -> _Hypotheses:
        """Those of some questions."""
        return _Hypotheses(*(part[questions] for part in self._parts()))

    def put(self, questions: Tensor, others: _Hypotheses) -> None:
        """Write ``others`` in place of those of ``questions``."""
        for mine, theirs in zip(self._parts(), others._parts(), strict=True):
            mine[questions] = theirs

    def merge(self, others: _Hypotheses) -> _Hypotheses:
        """Both, side by side."""
        pairs = zip(self._parts(), others._parts(), strict=True)
        return _Hypotheses(*(torch.cat(pair, dim=1) for pair in pairs))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.scores, self.trace, self.lengths


class _Beams:
    """Beam search with the rules of transformers' own: 2 to 1 + |EOS| times G candidates a step, of which G stay open."""

    def __init__(self, generator: Generator, contexts: EncodedContexts, log_prior: Tensor, plan: SearchPlan) -> None:
        self.generator, self.plan = generator, plan
        self.rows = _Marginal(generator, contexts, log_prior, plan.num_beams)
        self.prompt = 0 if generator.start_token_id is None else 1
        eos, pad = tuple(generator.eos_token_ids), generator.pad_token_id
        self.fill = (pad or eos[0]) if eos else -1
        self.candidates = max(2, 1 + len(eos)) * plan.num_beams
        device, (batch, passages) = log_prior.device, log_prior.shape
        wide = torch.promote_types(self.rows.logits.dtype, torch.float32)
        tokens = torch.full((batch, plan.num_beams, self.prompt + plan.new_tokens), self.fill, device=device)
        tokens[..., : self.prompt] = generator.start_token_id or 0
        trace = torch.zeros(batch, plan.num_beams, passages, plan.new_tokens, dtype=wide, device=device)
        never = torch.full((batch, plan.num_beams), _NEVER, dtype=wide, device=device)
        lengths = torch.zeros_like(never, dtype=torch.long)
        self.open = _Hypotheses(tokens, never.clone(), trace, lengths)
        self.open.scores[:, 0] = 0.0  # all beams are equal at first, and one of them is enough
        self.closed = _Hypotheses(tokens.clone(), never, trace.clone(), lengths.clone())

    def run(self) -> Found:
        """Search until no question can improve."""
        plan, device = self.plan, self.open.scores.device
        here = torch.arange(len(self.open.scores), device=device)
        open_, closed = self.open, self.closed
        improvable = torch.ones_like(here, dtype=torch.bool)
        for t in range(plan.new_tokens):
            found, parents = self._continue(here, open_, t)
            hits = _is_end(self.generator, found.tokens[..., self.prompt + t])
            hits |= t + 1 == plan.new_tokens
            following = (found.scores + hits * _NEVER).topk(plan.num_beams, dim=1).indices
            closed = self._close(closed, found, hits, improvable, t + 1)
            open_ = found.take(following)
            open_.scores = open_.scores + hits.gather(1, following) * _NEVER
            improvable = improvable & self._can_improve(open_, closed, t + 1)
            going = improvable & ~hits.all(dim=1)
            if plan.early_stopping is True:
                going &= ~(closed.lengths > 0).all(dim=1)
            if not going.any() or t + 1 == plan.new_tokens:
                break
            self.rows.reorder(parents.gather(1, following))
            if _worth_leaving(going):
                self.closed.put(here, closed)
                stay = going.nonzero().squeeze(1)
                self.rows.keep(stay)
                here, improvable = here[stay], improvable[stay]
                open_, closed = open_.of(stay), closed.of(stay)
            self.rows.step(open_.tokens[..., self.prompt + t])
        self.closed.put(here, closed)
        return self._result()

    def _continue(self, questions: Tensor, open_: _Hypotheses, t: int) -> tuple[_Hypotheses, Tensor]:
        """The best continuations of open hypotheses by one token, and the beam (B, C) that each continues."""
        batch, beams = open_.scores.shape
        next_token = self.rows.predict().expand(-1, beams, -1)
        if self.plan.processors or self.plan.constraint:
            past = open_.tokens[..., : self.prompt + t].reshape(batch * beams, -1)
            next_token = self.plan.process(questions, past, next_token.reshape(batch * beams, -1))
            next_token = next_token.view(batch, beams, -1)
        vocabulary = next_token.shape[-1]
        total = (next_token + open_.scores.unsqueeze(-1)).view(batch, -1)
        scores, places = total.topk(self.candidates, dim=1)
        parents, tokens = places // vocabulary, places % vocabulary
        found = open_.take(parents)
        found.scores = scores
        found.tokens[..., self.prompt + t] = tokens
        found.trace[..., t] = self.rows.log_probs_of(parents, tokens)
        return found, parents

    def _close(
        self, closed: _Hypotheses, found: _Hypotheses, hits: Tensor, improvable: Tensor, length: int
    ) -> _Hypotheses:
        """The best closed hypotheses once those of ``found`` (B, C) that have come to an end are among them."""
        ends = hits.clone()
        ends[:, self.plan.num_beams :] = False  # the others only make sure that enough stay open
        ends &= found.scores > _NEVER / 2  # and some only fill up where there are fewer strings than beams
        full = (closed.lengths > 0).all(dim=1) & (self.plan.early_stopping is True)
        scores = found.scores / length**self.plan.length_penalty
        scores = scores + (full.unsqueeze(1) * _NEVER) + (~improvable).unsqueeze(1) * _NEVER + ~ends * _NEVER
        both = closed.merge(_Hypotheses(found.tokens, scores, found.trace, ends * length))
        return both.best(self.plan.num_beams)

    def _can_improve(self, open_: _Hypotheses, closed: _Hypotheses, length: int) -> Tensor:
        """Whether an open hypothesis can still beat the worst closed one (B,), by transformers' heuristic."""
        penalty = self.plan.length_penalty
        if self.plan.early_stopping == "never" and penalty > 0.0:
            length = self.plan.new_tokens
        best = open_.scores[:, 0] / length**penalty
        worst = closed.scores.amin(dim=1, keepdim=True).where(closed.lengths > 0, _NEVER)
        return (best.unsqueeze(1) > worst).any(dim=1)

    def _result(self) -> Found:
        """The best of each question; where there are fewer strings than asked for, the last is repeated."""
        count = self.plan.num_return_sequences
        real = (self.closed.lengths[:, :count] > 0).sum(dim=1, keepdim=True)
        places = torch.arange(count, device=real.device).expand(len(real), -1)
        best = self.closed.take(places.minimum((real - 1).clamp(min=0)))
        width = int(best.lengths.max())
        return Found(
            best.tokens[..., : self.prompt + width].flatten(0, 1),
            best.scores.flatten(),
            best.trace[..., :width].flatten(0, 1),
            repeated=int((count - real).sum()),
        )
