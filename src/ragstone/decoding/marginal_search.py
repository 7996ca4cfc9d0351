"""RAG-Token decoding: ordinary search over the marginal next-token distribution (paper §2.5).

p(y_t|x,y_<t) = Σ_k p(z_k|x) p(y_t|x,z_k,y_<t) is a language model like any other, so transformers' own generation loop
searches it: greedy, beam, sampling, constraints, processors, stopping criteria, streamers. With K = 1 the same search
decodes under one passage alone, which is how RAG-Sequence uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ragstone.decoding.outputs import RagGenerateOutput
from ragstone.decoding.scoring import Hypothesis, hypotheses_of, predicted_tokens, score_sequences
from ragstone.errors import InputError
from ragstone.generators import DecodingState, EncodedContexts, Generator
from ragstone.marginal import log_probs, marginal_next_token, mean_token_posterior, token_log_likelihood

__all__ = ["marginal_search", "option", "permitted", "rag_token_generate"]

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


def rag_token_generate(
    generator: Generator, contexts: EncodedContexts, log_prior: Tensor, **options: Any
) -> RagGenerateOutput:
    """Search the marginal distribution, then score what was found under the model itself.

    Args:
        generator: the adapter that encoded ``contexts``.
        contexts: N = B·K encoded contexts, row b·K + k.
        log_prior: (B, K), log p(z|x).
        options: those of transformers' ``generate``.

    Returns:
        ``log_probs``, ``posteriors`` and ``token_posteriors`` are exact whatever the search was told to do.
    """
    found = marginal_search(generator, contexts, log_prior, **options)
    sequences, passages = found.sequences, log_prior.shape[1]
    questions = torch.arange(log_prior.shape[0], device=sequences.device)
    questions = questions.repeat_interleave(sequences.shape[0] // len(questions))
    sequences = _repeat_permitted(generator, sequences, questions.tolist(), options)
    token_log_probs = score_sequences(generator, contexts, questions, sequences, passages)
    counts = predicted_tokens(generator, sequences)[1]
    prior = log_prior[questions]
    posteriors, by_token = mean_token_posterior(prior, token_log_probs, counts)
    return RagGenerateOutput(
        sequences=sequences,
        log_probs=token_log_likelihood(prior, token_log_probs, counts),
        posteriors=posteriors,
        token_posteriors=by_token,
        token_log_probs=token_log_probs,
        sequences_scores=found.get("sequences_scores"),
        scores=found.get("scores"),
        logits=found.get("logits"),
        beam_indices=found.get("beam_indices"),
    )


def _repeat_permitted(generator: Generator, sequences: Tensor, questions: list[int], options: dict[str, Any]) -> Tensor:
    """Sequences (R, T), best first for each question, the one before in place of one that is not permitted."""
    rows = list(range(len(sequences)))
    for row, fine in enumerate(permitted(generator, options, questions, sequences)):
        if not fine and row and questions[row - 1] == questions[row]:
            rows[row] = rows[row - 1]
    repeated = sum(row != n for n, row in enumerate(rows))
    if repeated:
        logger.warning("The constraint allows too few strings: %d of %d sequences repeat another.", repeated, len(rows))
    return sequences[rows]


@torch.no_grad()
def marginal_search(generator: Generator, contexts: EncodedContexts, log_prior: Tensor, **options: Any) -> ModelOutput:
    """transformers' ``generate`` over the marginal of B questions with K passages: its own output, scores included."""
    for name, reason in _UNSUPPORTED.items():
        if not _is_neutral(option(generator, options, name)):
            raise InputError(f"generate({name}=…) cannot be used here: {reason}; leave it out.")
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


def option(generator: Generator, options: dict[str, Any], name: str, default: Any = None) -> Any:
    """What ``generate`` takes for ``name``: the argument, else the generation config given, else the model's own."""
    configs = options.get("generation_config"), generator.model.generation_config
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), default)


def _is_neutral(value: Any) -> bool:
    """Whether an option says what leaving it out says: a penalty of 1, n-grams of 0, nothing."""
    return value is None or value is False or (type(value) in (int, float) and value in (0, 1))


def permitted(generator: Generator, options: dict[str, Any], questions: Sequence[int], sequences: Tensor) -> list[bool]:
    """Which of R sequences say something, and nothing that the caller's constraint forbids.

    Where a constraint allows fewer strings than there are beams, the loop fills up with strings of its own. Forced tokens
    are beyond a constraint.
    """
    constraint = options.get("prefix_allowed_tokens_fn")
    if constraint is None or option(generator, options, "num_beams", 1) == 1:
        return [True] * len(questions)
    given, start = options.get("decoder_input_ids"), generator.start_token_id
    prompt = 0 if start is None else 1
    if given is not None:  # the loop puts the start token before it where it is missing
        prompt = int(given.shape[1]) + int(bool((given[:, 0] != start).all()))
    forced = {prompt: "forced_bos_token_id", sequences.shape[1] - 1: "forced_eos_token_id"}

    def obeys(question: int, tokens: Hypothesis, t: int) -> bool:
        exempt = option(generator, options, forced[t], ()) if t in forced else ()
        exempt = (exempt,) if isinstance(exempt, int) else exempt
        return tokens[t] in exempt or tokens[t] in constraint(question, torch.tensor(tokens[:t]))

    return [
        len(tokens) > prompt and all(obeys(question, tokens, t) for t in range(prompt, len(tokens)))
        for question, tokens in zip(questions, hypotheses_of(generator, sequences), strict=True)
    ]


class _MarginalState:
    """What the loop passes on from step to step in place of a cache: R·K rows of decoding state and what they have read."""

    is_compileable = False

    def __init__(self, passages: int) -> None:
        self.passages = passages
        self.read = 0
        self.decoding: DecodingState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams (R,) become rows (R·K,): a beam takes all of its passages along."""
        assert self.decoding is not None
        slots = torch.arange(self.passages, device=beam_idx.device)
        self.decoding.reorder((beam_idx.unsqueeze(1) * self.passages + slots).flatten())


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
            # The R rows are still equal within a question: read the start once per passage, then copy.
            copies = input_ids.shape[0] * passages // self.contexts.rows
            start = new_tokens[::copies].repeat_interleave(passages, dim=0)
            logits, decoding = self.generator.start(self.contexts, start)
            next_token = self._marginal(logits, log_prior[::copies]).repeat_interleave(copies, dim=0)
            rows = torch.arange(self.contexts.rows, device=start.device).view(-1, 1, passages)
            state.decoding = decoding.select(rows.expand(-1, copies, -1).flatten()) if copies > 1 else decoding
        else:
            logits = self.generator.step(state.decoding, new_tokens.repeat_interleave(passages, dim=0))
            next_token = self._marginal(logits, log_prior)
        state.read = input_ids.shape[1]
        return _MarginalOutput(logits=next_token.unsqueeze(1), past_key_values=state)

    def _marginal(self, logits: Tensor, log_prior: Tensor) -> Tensor:
        """(R·K, V), (R, K) -> (R, V)."""
        return marginal_next_token(log_prior, log_probs(logits).view(*log_prior.shape, -1))
