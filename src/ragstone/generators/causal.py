"""Causal generators: any ``AutoModelForCausalLM``. The context is the whole prompt up to the answer."""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ragstone.errors import InputError, ModelError
from ragstone.generators.attention import RowGroups, rows_grouped, share_prompts
from ragstone.generators.base import (
    DecodingState,
    EncodedContexts,
    Generator,
    align_padding,
    select_cache,
    shares_keys,
)
from ragstone.generators.head import head_input
from ragstone.generators.lengths import rows_at_a_time
from ragstone.generators.packing import accelerated, can_share
from ragstone.generators.prompt_store import PromptStore
from ragstone.generators.prompts import pad_rows

__all__ = ["CausalGenerator"]

_MOST_APART = 0.75
"""Above this share of different beginnings, reading them apart from what follows does not pay."""


@final
class CausalGenerator(Generator):
    """Keys and values of the prompt are kept; sequences hold new tokens only.

    Contexts may be padded on either side; inside they are padded on the left, so that real tokens lie side by side and
    every answer begins in the same column.
    """

    def __init__(self, model: Any, *, fast: bool = True, store: PromptStore | None = None) -> None:
        super().__init__(model, fast=fast)
        self.store = store
        if getattr(model, "_is_stateful", False):
            raise ModelError(
                f"{type(model).__name__} keeps a recurrent state instead of keys and values; use a model with attention."
            )
        # An adapter's wrapper passes on what it does not name itself.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._names = frozenset(inspect.signature(inner.forward).parameters)

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

    def shared_label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prompt_lengths: Tensor
    ) -> Tensor | None:
        """See :meth:`Generator.shared_label_hidden`."""
        rows = _real_tokens(input_ids, attention_mask)
        lengths = prompt_lengths.clamp(min=1).tolist()
        found: dict[tuple[int, ...], list[int]] = {}
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            found.setdefault(tuple(row[:length]), []).append(n)
        whole = all(len(row) > length for row, length in zip(rows, lengths, strict=True))
        if not labels.shape[1] or not whole or len(found) > _MOST_APART * len(rows) or not self._shares_learning():
            return None
        heads = sorted(found, key=len)
        costs = [len(head) + sum(len(rows[n]) - len(head) for n in found[head]) for head in heads]
        parts, order = [], []
        for size in rows_at_a_time(costs, input_ids.device.type):
            part, heads = heads[:size], heads[size:]
            own = [n for head in part for n in found[head]]
            context = torch.tensor([c for c, head in enumerate(part) for _ in found[head]], device=labels.device)
            hidden = self._read_behind(part, context, [rows[n][lengths[n] :] for n in own], labels[own])
            if hidden is None:
                return None
            parts.append(hidden)
            order += own
        return torch.cat(parts)[torch.tensor(order, device=labels.device).argsort()]

    def _shares_learning(self) -> bool:
        """Whether rows may share keys and values that have gradients."""
        model = self.model
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if not self.fast or "position_ids" not in self._names or again:
            return False  # what is computed again would be so outside of the attention that knows who shares
        return _is_plain(DynamicCache(config=model.config)) and can_share(model) and shares_keys(self)

    def _read_behind(
        self, heads: list[tuple[int, ...]], context: Tensor, tails: list[list[int]], labels: Tensor
    ) -> Tensor | None:
        """Read N beginnings, then R rows, each behind that of its ``context`` (R,): what predicts labels (R, T)."""
        device, fill = labels.device, self.fill_token_id
        ids, mask = (tensor.to(device) for tensor in pad_rows(heads, fill=fill))
        cache = DynamicCache(config=self.model.config)
        self._call(ids, mask, keep=1, past_key_values=cache)
        answers = labels.masked_fill(labels < 0, fill)[:, :-1].tolist()
        behind = [tail + answer for tail, answer in zip(tails, answers, strict=True)]
        ids, own = (tensor.to(device) for tensor in pad_rows(behind, fill=fill))
        mask = torch.cat([mask[context], own], dim=1)

        def run() -> Tensor:
            shared = share_prompts(cache, len(tails))
            logits: Tensor = self._call(ids, mask, past_key_values=shared).logits
            return logits

        with accelerated(self.model, learning=True), rows_grouped(RowGroups.of(context, len(heads))):
            hidden = head_input(self.model, run)
        if hidden is None:
            return None
        last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        places = last[:, None] + torch.arange(labels.shape[1], device=device)
        return hidden.gather(1, places[..., None].expand(*places.shape, hidden.shape[2]))

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> EncodedContexts:
        """One pass over the prompts (N, S), kept as keys, values and the prediction of the first answer token.

        With ``prompt_lengths`` and a store, beginnings that were read before are not read again.
        """
        cache = DynamicCache(config=self.model.config)
        with self.accelerated():
            if prompt_lengths is not None and self.store is not None and _is_plain(cache) and self._shares():
                # Without header and passage nothing precedes the question; any beginning may be kept, so keep one token.
                prompt_lengths = prompt_lengths.clamp(min=1)
                behind = attention_mask.sum(dim=1) - prompt_lengths
                if bool((behind > 0).all()):
                    return self._encode_behind(input_ids, attention_mask, prompt_lengths.tolist(), self.store)
            input_ids, attention_mask = align_padding(input_ids, attention_mask, left=True)
            out = self._call(input_ids, attention_mask, keep=1, past_key_values=cache)
        return EncodedContexts(attention_mask, out.past_key_values, out.logits[:, -1])

    def _encode_behind(
        self, input_ids: Tensor, attention_mask: Tensor, lengths: list[int], store: PromptStore
    ) -> EncodedContexts:
        """Read what follows the beginnings (N,) of prompts, whose keys and values come from the store."""
        device, fill = input_ids.device, self.fill_token_id
        rows = _real_tokens(input_ids, attention_mask)
        heads = [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
        distinct = list(dict.fromkeys(heads))
        names = dict(zip(distinct, store.names(self.model, distinct), strict=True))
        found = {head: store.get(name) for head, name in names.items()}
        known = {head: states for head, states in found.items() if states is not None}
        missing = sorted((head for head in names if head not in known), key=len)
        for size in rows_at_a_time([len(head) for head in missing], device.type):
            part, missing = missing[:size], missing[size:]
            ids, mask = (tensor.to(device) for tensor in pad_rows(part, fill=fill))
            cache = DynamicCache(config=self.model.config)
            self._call(ids, mask, keep=1, past_key_values=cache)
            for n, head in enumerate(part):
                kept = [torch.stack((c.keys[n], c.values[n]))[:, :, : len(head)] for c in cache.layers]
                known[head] = torch.stack(kept)
                store.put(names[head], known[head].cpu())
        width, tail = max(lengths), max(len(row) - n for row, n in zip(rows, lengths, strict=True))
        # (layers, 2, N, heads, S + tail, ·): the beginnings end side by side, and what follows has its place behind them.
        layers, _, key_heads, _, size = known[heads[0]].shape
        states = torch.zeros(
            layers, 2, len(rows), key_heads, width + tail, size, dtype=known[heads[0]].dtype, device=device
        )
        for n, head in enumerate(heads):
            states[:, :, n, :, width - len(head) : width] = known[head].to(device)
        ids, mask = input_ids.new_full((len(rows), tail), fill), attention_mask.new_zeros(len(rows), width + tail)
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[n, tail - (len(row) - length) :] = torch.tensor(row[length:], device=device)
            mask[n, width - length : width] = 1
            mask[n, width + tail - (len(row) - length) :] = 1
        prompts, whole = (DynamicCache(config=self.model.config) for _ in range(2))
        for n, (keys, values) in enumerate(states):
            _put(prompts, n, keys[:, :, :width], values[:, :, :width])
            _put(whole, n, keys, values)
        with rows_grouped(RowGroups(1)):
            out = self._call(ids, mask, keep=1, past_key_values=share_prompts(prompts, len(rows)))
        for (keys, values), own in zip(states, out.past_key_values.layers, strict=True):
            keys[:, :, width:], values[:, :, width:] = own.keys, own.values
        return EncodedContexts(mask, whole, out.logits[:, -1])

    def _split_start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[bool, Tensor]:
        return True, tokens

    def _begin(self, contexts: EncodedContexts, rows: Tensor, *, share: bool, fresh: bool) -> DecodingState:
        mask = contexts.attention_mask[rows]
        if share and _is_plain(contexts.cache):
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


def _is_plain(cache: Any) -> bool:
    """Whether every layer keeps all keys and values: none of a sliding window."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _real_tokens(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The rows (N, S) without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def _put(cache: DynamicCache, layer: int, keys: Tensor, values: Tensor) -> None:
    """Make ``keys`` and ``values`` (N, heads, S, ·) those of an empty layer, without copying them."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    cache.layers[layer].lazy_initialization(keys, values)
    cache.layers[layer].keys, cache.layers[layer].values = keys, values
