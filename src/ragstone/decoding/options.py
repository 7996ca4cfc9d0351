"""What the caller asked for: the options of transformers' ``generate``, wherever they are written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragstone.decoding.contexts import Contexts
from ragstone.decoding.scoring import Hypothesis, hypotheses_of, predicted_tokens
from ragstone.errors import InputError
from ragstone.generators import Generator

__all__ = ["NEUTRAL_AT_1", "as_asked", "check_counts", "is_neutral", "option", "permitted"]

NEUTRAL_AT_1 = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beam_groups")
_NEVER_NEUTRAL = ("max_time",)
"""Options that mean something with any number: 0 seconds are a limit too."""


def option(generator: Generator, options: dict[str, Any], name: str, default: Any = None) -> Any:
    """What ``generate`` takes for ``name``: the argument, else the generation config given, else the model's own."""
    configs = options.get("generation_config"), generator.model.generation_config
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), default)


def is_neutral(name: str, value: Any) -> bool:
    """Whether an option says what leaving it out says: a penalty of 1, n-grams of 0, nothing."""
    if value is None or value is False:
        return True
    return name not in _NEVER_NEUTRAL and type(value) in (int, float) and value == (name in NEUTRAL_AT_1)


def as_asked(contexts: Contexts, options: dict[str, Any]) -> Contexts:
    """The same contexts for a search whose answers end, and are filled up, with the tokens that the caller names."""
    names = ("eos_token_id", "pad_token_id")
    asked = copy.copy(contexts)
    asked.generator = contexts.generator.with_tokens(**{n: option(contexts.generator, options, n) for n in names})
    return asked


def check_counts(generator: Generator, options: dict[str, Any]) -> tuple[int, int]:
    """``num_return_sequences`` and ``num_beams``.

    Raises:
        InputError: one is no whole number of at least 1, or ``early_stopping`` is none of its three values.
    """
    count, beams = (option(generator, options, name, 1) for name in ("num_return_sequences", "num_beams"))
    if not all(isinstance(value, int) and value >= 1 for value in (count, beams)):
        raise InputError(
            f"num_return_sequences is {count} and num_beams is {beams}; both must be whole numbers of at least 1."
        )
    early = option(generator, options, "early_stopping", False)
    if early not in (True, False, "never"):
        raise InputError(f"early_stopping is {early!r}; choose True, False or 'never'.")
    return count, beams


def permitted(generator: Generator, options: dict[str, Any], questions: Sequence[int], sequences: Tensor) -> list[bool]:
    """Which of R sequences say something, and nothing that the caller's constraint forbids.

    Where there are fewer strings than beams, for a constraint or a limit allows no more, the loop fills up with strings of
    its own. Forced tokens are beyond a constraint.
    """
    constraint = options.get("prefix_allowed_tokens_fn")
    if option(generator, options, "num_beams", 1) == 1:
        return [True] * len(questions)
    if constraint is None:
        return predicted_tokens(generator, sequences)[1].any(dim=1).tolist()
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
