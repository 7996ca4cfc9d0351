"""RAG-Token decoding: ordinary search over the marginal next-token distribution (paper §2.5).

p(y_t|x,y_<t) = Σ_k p(z_k|x) p(y_t|x,z_k,y_<t) is a language model like any other, so transformers' own generation loop
searches it: greedy, beam, sampling, constraints, processors, stopping criteria, streamers. Plain greedy and beam search take
the quicker loop of :mod:`ragstone.decoding.quick_search`, which finds the same. With K = 1 the same search decodes under one
passage alone, which is how RAG-Sequence uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ragstone.decoding.contexts import Contexts
from ragstone.decoding.options import NEUTRAL_AT_1, as_asked, check_counts, is_neutral, option, permitted
from ragstone.decoding.outputs import RagGenerateOutput, token_output
from ragstone.decoding.quick_search import Found, SearchPlan, quick_search
from ragstone.decoding.scoring import Hypothesis, counted_tokens, hypotheses_of, score_sequences
from ragstone.errors import InputError
from ragstone.generators import DecodingState, EncodedContexts, Generator
from ragstone.marginal import log_probs, marginal_next_token

__all__ = ["marginal_search", "rag_token_generate"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = {
    "output_attentions": "attentions of K passages are not one sequence's",
    "output_hidden_states": "hidden states of K passages are not one sequence's",
    "inputs_embeds": "contexts are given as token ids",
    "encoder_outputs": "contexts are encoded once, here",
    "past_key_values": "keys and values are kept here",
    "assistant_model": "assisted decoding is not supported",
    "encoder_repetition_penalty": "the K contexts differ",
    "encoder_no_repeat_ngram_size": "the K contexts differ",
    "guidance_scale": "classifier-free guidance is not supported",
    "prompt_lookup_num_tokens": "assisted decoding is not supported",
}


def rag_token_generate(contexts: Contexts, log_prior: Tensor, **options: Any) -> RagGenerateOutput:
    """Search the marginal distribution; what is reported of the result is the model's own.

    Args:
        contexts: N = B·K contexts, row b·K + k.
        log_prior: (B, K), log p(z|x).
        options: those of transformers' ``generate``. Where ``num_beams`` is less than ``num_return_sequences`` and nothing
            is drawn, there are as many beams as sequences.

    Returns:
        R = B · ``num_return_sequences`` rows; where fewer strings are allowed, the last is repeated and a warning says so.
        ``log_probs``, ``posteriors`` and ``token_posteriors`` are exact whatever the search was told to do.
    """
    contexts = as_asked(contexts, options)
    generator, passages = contexts.generator, log_prior.shape[1]
    options = _wide_enough(generator, options)
    found = marginal_search(generator, contexts.encode(), log_prior, **options)
    sequences, token_log_probs = found.sequences, found.token_log_probs
    questions = torch.arange(log_prior.shape[0], device=sequences.device)
    questions = questions.repeat_interleave(sequences.shape[0] // len(questions))
    output, repeated = dict(found.output or {}), found.repeated
    if token_log_probs is None:
        rows = _real_strings(generator, sequences, questions.tolist(), options)
        repeated = sum(row != n for n, row in enumerate(rows))
        sequences = sequences[rows]
        for name in ("sequences_scores", "beam_indices"):
            if output.get(name) is not None:
                output[name] = output[name][rows]
        token_log_probs = score_sequences(contexts, questions, sequences, passages)
    if repeated:
        logger.warning("There are too few strings: %d of %d sequences repeat another.", repeated, len(sequences))
    counts = counted_tokens(generator, sequences, found.stopped)
    token_log_probs = token_log_probs.masked_fill(~counts.unsqueeze(1), 0.0)
    prior = log_prior[questions]
    kept = ("sequences_scores", "scores", "logits", "beam_indices")
    return token_output(prior, sequences, token_log_probs, counts, **{name: output.get(name) for name in kept})


def _wide_enough(generator: Generator, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with at least as many beams as sequences, unless they ask for samples."""
    count, beams = check_counts(generator, options)
    if option(generator, options, "do_sample", False):
        return options
    if options.get("streamer") is not None and max(count, beams) > 1:
        raise InputError(
            f"streamer cannot be used with num_beams={beams} and num_return_sequences={count}: several beams settle no "
            "token before their end; set both to 1."
        )
    return {**options, "num_beams": count} if beams < count else options


def _real_strings(generator: Generator, sequences: Tensor, questions: list[int], options: dict[str, Any]) -> list[int]:
    """The row of the loop's sequences (R, T), best first for each question, that goes into each row of the result.

    One that is not permitted, or equals an earlier one though nothing was drawn, only fills up: the one before takes its
    place.
    """
    rows = list(range(len(sequences)))
    sampled = option(generator, options, "do_sample", False)
    fine, hypotheses = permitted(generator, options, questions, sequences), hypotheses_of(generator, sequences)
    known: set[tuple[int, Hypothesis]] = set()
    for row, string in enumerate(zip(questions, hypotheses, strict=True)):
        twice = string in known and not sampled
        if (twice or not fine[row]) and row and questions[row - 1] == questions[row]:
            rows[row] = rows[row - 1]
        known.add(string)
    return rows


@torch.no_grad()
def marginal_search(generator: Generator, contexts: EncodedContexts, log_prior: Tensor, **options: Any) -> Found:
    """Search the marginal of B questions with K passages (N = B·K contexts) with the options of ``generate``."""
    for name, reason in _UNSUPPORTED.items():
        if not is_neutral(name, option(generator, options, name)):
            raise InputError(
                f"generate({name}=…) cannot be used here: {reason}; leave it out, or set it to "
                f"{int(name in NEUTRAL_AT_1)} where the generation config has it."
            )
    plan = SearchPlan.of(generator, options, log_prior.device) if generator.fast else None
    if plan is not None:
        return quick_search(generator, contexts, log_prior, plan)
    stops = None
    if options.get("stopping_criteria") and option(generator, options, "num_beams", 1) == 1:
        stops = _Stops(options["stopping_criteria"])
        options = {**options, "stopping_criteria": [stops]}
    with generator.accelerated():
        output = _transformers_search(generator, contexts, log_prior, options)
    stopped = None if stops is None else stops.lengths(generator.labels_of(output.sequences))
    return Found(output.sequences, output.get("sequences_scores"), output=output, stopped=stopped)


class _Stops(StoppingCriteria):
    """The caller's criteria, and how long each row was when the first of them was met: behind that is padding."""

    def __init__(self, criteria: Iterable[Any]) -> None:
        self.criteria = StoppingCriteriaList(criteria)
        self.left: Tensor | None = None
        """(R,), the tokens that were in the row then; -1 where no criterion was met."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        met = self.criteria(input_ids, scores, **options)
        if self.left is None:
            self.left = torch.full((len(input_ids),), -1, device=input_ids.device)
        self.left = self.left.where((self.left >= 0) | ~met, input_ids.shape[1])
        self.width = input_ids.shape[1]
        return met

    def lengths(self, labels: Tensor) -> Tensor:
        """How many of ``labels`` (R, T') were written: (R,)."""
        assert self.left is not None
        return (self.left - (self.width - labels.shape[1])).where(self.left >= 0, labels.shape[1])


def _transformers_search(
    generator: Generator, contexts: EncodedContexts, log_prior: Tensor, options: dict[str, Any]
) -> ModelOutput:
    """transformers' ``generate`` over the marginal: its own output, scores included."""
    # The loop needs no attention mask, caching is always on, and the dictionary is unpacked by the caller.
    options = {k: v for k, v in options.items() if k not in ("attention_mask", "use_cache", "return_dict_in_generate")}
    empty = torch.zeros(log_prior.shape[0], 0, 1, device=log_prior.device)
    if generator.start_token_id is None:
        # An empty prompt embedding is transformers' own way to say that nothing precedes the new tokens.
        options["inputs_embeds"] = empty
    else:
        options["encoder_outputs"] = BaseModelOutput(last_hidden_state=empty)
        options.setdefault("decoder_start_token_id", generator.start_token_id)
    constraint, copies = options.get("prefix_allowed_tokens_fn"), option(generator, options, "num_return_sequences", 1)
    if constraint is not None and copies > 1 and option(generator, options, "num_beams", 1) == 1:
        # Samples of one question are rows of their own to the loop, which hands their number to the constraint.
        options["prefix_allowed_tokens_fn"] = lambda row, tokens: constraint(row // copies, tokens)
    search = _MarginalModel(generator, contexts)
    try:
        return search.generate(
            log_prior=log_prior,
            past_key_values=_MarginalState(log_prior.shape[1]),
            use_cache=True,
            return_dict_in_generate=True,
            **options,
        )
    except ValueError as error:
        if "not used by the model" in str(error):
            raise TypeError(f"generate() got an unknown option: {error}") from error
        raise


class _MarginalState:
    """What the loop passes on from step to step in place of a cache: R·K rows of decoding state and what they have read."""

    is_compileable = False

    def __init__(self, passages: int) -> None:
        self.passages = passages
        self.read = 0
        self.copies = 1
        self.decoding: DecodingState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams (R,) become rows (R·K,): a beam takes all of its passages along."""
        assert self.decoding is not None
        self.decoding.reorder(_under_every_passage(beam_idx, self.copies, self.passages))


@dataclass
class _MarginalOutput(ModelOutput):
    logits: Tensor | None = None
    past_key_values: Any = None


class _MarginalModel(GenerationMixin):
    """The marginal distribution as a model that transformers' loop can search. It owns no weights."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, generator: Generator, contexts: EncodedContexts) -> None:
        self.generator = generator
        self.contexts = contexts
        self.config = generator.model.config
        self.generation_config = generator.model.generation_config
        self.device = contexts.attention_mask.device
        self.dtype = generator.model.dtype

    def __call__(self, **inputs: Any) -> _MarginalOutput:
        return self.forward(**inputs)

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def _prepare_special_tokens(self, generation_config: Any, has_mask: bool | None = None, **options: Any) -> None:
        # There is no prompt to mask; told otherwise, the loop warns of padding that is EOS.
        super()._prepare_special_tokens(generation_config, True, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: _MarginalState | None = None,
        log_prior: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool = True,
        is_first_iteration: bool = False,
        tokenizer: Any = None,
    ) -> dict[str, Any]:
        """Name every argument: transformers then rejects misspelt options."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, "log_prior": log_prior}

    def forward(
        self, input_ids: Tensor, past_key_values: _MarginalState, log_prior: Tensor, return_dict: bool = True
    ) -> _MarginalOutput:
        """Tokens so far (R, t), log p(z|x) (R, K) -> log-probabilities (R, 1, V) of the next token."""
        state, passages = past_key_values, log_prior.shape[1]
        new_tokens = input_ids[:, state.read :]
        if state.decoding is None:
            # The R rows are still equal within a question: read the start once per passage.
            state.copies = copies = input_ids.shape[0] * passages // self.contexts.rows
            start = new_tokens[::copies].repeat_interleave(passages, dim=0)
            logits, state.decoding = self.generator.start(self.contexts, start, copies)
            logits = logits.view(-1, passages, 1, logits.shape[-1]).expand(-1, -1, copies, -1)
        else:
            batch = new_tokens.view(-1, 1, state.copies, new_tokens.shape[1])
            rows = batch.expand(-1, passages, -1, -1).reshape(-1, new_tokens.shape[1])
            logits = self.generator.step(state.decoding, rows)
            logits = logits.view(-1, passages, state.copies, logits.shape[-1])
        # (B, K, G, V), the G rows of a question side by side under each passage -> (R, K, V)
        by_row = log_probs(logits).transpose(1, 2).flatten(0, 1)
        state.read = input_ids.shape[1]
        return _MarginalOutput(marginal_next_token(log_prior, by_row).unsqueeze(1), state)


def _under_every_passage(rows: Tensor, copies: int, passages: int) -> Tensor:
    """Rows b·G + g (R,) as rows (b·K + k)·G + g (R·K,) of the decoding state, whose own order is that of the result."""
    question, copy = rows.view(-1, 1, copies) // copies, rows.view(-1, 1, copies) % copies
    slots = torch.arange(passages, device=rows.device).view(1, -1, 1)
    return ((question * passages + slots) * copies + copy).flatten()
