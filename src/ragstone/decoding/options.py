"""What the caller asked for: the options of transformers' ``generate``, wherever they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragstone.decoding.scoring import Hypothesis, hypotheses_of
from ragstone.generators import Generator

__all__ = ["is_neutral", "option", "permitted"]


def option(generator: Generator, options: dict[str, Any], name: str, default: Any = None) -> Any:
    """What ``generate`` takes for ``name``: the argument, else the generation config given, else the model's own."""
    configs = options.get("generation_config"), generator.model.generation_config
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), default)


def is_neutral(value: Any) -> bool:
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
