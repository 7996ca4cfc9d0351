"""Causal generators: any ``AutoModelForCausalLM``. The context is the whole prompt up to the answer."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor

from ragstone.errors import InputError, ModelError
from ragstone.generators.base import DecodingState, EncodedContexts, Generator, align_padding, select_cache

__all__ = ["CausalGenerator"]


@final
class CausalGenerator(Generator):
    """Keys and values of the prompt are kept; sequences hold new tokens only.

    Contexts may be padded on either side; inside they are padded on the left, so that real tokens lie side by side and
    every answer begins in the same column.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if getattr(model, "_is_stateful", False):
            raise ModelError(
                f"{type(model).__name__} keeps a recurrent state instead of keys and values; use a model with attention."
            )
        self._names = frozenset(inspect.signature(model.forward).parameters)

    @property
    def start_token_id(self) -> None:
        """None: a causal model continues its prompt."""
        return None

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Generator.logits`: prompt and labels in one pass, logits of the label positions only."""
        if decoder_input_ids is not None:
            raise InputError("decoder_input_ids has no meaning for a causal generator; pass labels alone.")
        if not labels.shape[1]:
            return self._no_logits(len(labels))
        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=True)
        inputs = labels.masked_fill(labels < 0, self.fill_token_id)[:, :-1]
        mask = torch.cat([attention_mask, torch.ones_like(inputs)], dim=1)
        return self._forward(torch.cat([input_ids, inputs], dim=1), mask, keep=labels.shape[1]).logits

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> EncodedContexts:
        """One pass over the prompts (N, S), kept as keys, values and the prediction of the first answer token."""
        from transformers.cache_utils import DynamicCache

        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=True)
        cache = DynamicCache(config=self.model.config)
        out = self._forward(input_ids, attention_mask, keep=1, past_key_values=cache)
        return EncodedContexts(attention_mask, cache=out.past_key_values, next_logits=out.logits[:, -1])

    def target_logits(self, contexts: EncodedContexts, rows: Tensor, sequences: Tensor) -> Tensor:
        """Teacher-forced pass over ``sequences`` (R, T) behind their prompts -> (R, T, V)."""
        assert contexts.next_logits is not None
        first = contexts.next_logits[rows].unsqueeze(1)
        if sequences.shape[1] < 2:
            return first[:, : sequences.shape[1]]
        inputs = sequences[:, :-1]
        mask = torch.cat([contexts.attention_mask[rows], torch.ones_like(inputs)], dim=1)
        out = self._forward(inputs, mask, past_key_values=select_cache(contexts.cache, rows))
        return torch.cat([first, out.logits], dim=1)

    def start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[Tensor, DecodingState]:
        """Nothing is computed: the prompt's own prediction is the first step."""
        assert contexts.next_logits is not None
        every_row = torch.arange(contexts.rows, device=contexts.attention_mask.device)
        state = DecodingState(select_cache(contexts.cache, every_row), contexts.attention_mask)
        return (self.step(state, tokens) if tokens.shape[1] else contexts.next_logits), state

    def step(self, state: DecodingState, tokens: Tensor) -> Tensor:
        """One pass over (R, n) new tokens."""
        state.attention_mask = torch.cat([state.attention_mask, torch.ones_like(tokens)], dim=1)
        out = self._forward(tokens, state.attention_mask, keep=1, past_key_values=state.cache)
        state.cache = out.past_key_values
        return out.logits[:, -1]

    def _forward(self, input_ids: Tensor, mask: Tensor, *, keep: int = 0, past_key_values: Any = None) -> Any:
        """The model on the last columns of ``mask``; ``keep`` logits from the end (0: all)."""
        options: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        if "position_ids" in self._names:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if "logits_to_keep" in self._names:
            options["logits_to_keep"] = keep
        out = self.model(input_ids=input_ids, attention_mask=mask, **options)
        if keep and out.logits.shape[1] != keep:
            out.logits = out.logits[:, -keep:]
        return out
