"""Causal generators: any ``AutoModelForCausalLM``. The context is the whole prompt up to the answer."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ragstone.errors import InputError, ModelError
from ragstone.generators.attention import RowGroups, share_prompts
from ragstone.generators.base import DecodingState, EncodedContexts, Generator, align_padding, select_cache

__all__ = ["CausalGenerator"]


@final
class CausalGenerator(Generator):
    """Keys and values of the prompt are kept; sequences hold new tokens only.

    Contexts may be padded on either side; inside they are padded on the left, so that real tokens lie side by side and
    every answer begins in the same column.
    """

    def __init__(self, model: Any, *, fast: bool = True) -> None:
        super().__init__(model, fast=fast)
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
        return self._call(torch.cat([input_ids, inputs], dim=1), mask, keep=labels.shape[1]).logits

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> EncodedContexts:
        """One pass over the prompts (N, S), kept as keys, values and the prediction of the first answer token."""
        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=True)
        cache = DynamicCache(config=self.model.config)
        with self.accelerated():
            out = self._call(input_ids, attention_mask, keep=1, past_key_values=cache)
        return EncodedContexts(attention_mask, out.past_key_values, out.logits[:, -1])

    def _split_start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[bool, Tensor]:
        return True, tokens

    def _begin(self, contexts: EncodedContexts, rows: Tensor, *, share: bool, fresh: bool) -> DecodingState:
        mask = contexts.attention_mask[rows]
        if share and all(type(layer) is DynamicLayer for layer in contexts.cache.layers):
            groups = RowGroups.of(rows, contexts.rows)
            return DecodingState(share_prompts(contexts.cache, len(rows)), mask, groups=groups)
        return DecodingState(select_cache(contexts.cache, rows), mask)

    def _forward(self, state: DecodingState, tokens: Tensor, *, keep: int) -> Tensor:
        state.attention_mask = torch.cat([state.attention_mask, torch.ones_like(tokens)], dim=1)
        out = self._call(tokens, state.attention_mask, keep=keep, past_key_values=state.cache)
        state.cache = out.past_key_values
        return out.logits

    def _call(self, input_ids: Tensor, mask: Tensor, *, keep: int = 0, past_key_values: Any = None) -> Any:
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
