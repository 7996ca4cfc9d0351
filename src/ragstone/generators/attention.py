"""Attention for decoding: rows that read the same context share its keys and values, and small queries on a CPU are quick.

transformers' models call attention through a table of functions (``AttentionInterface``). The one registered here computes
what ``sdpa`` computes, with two additions. Queries may have more rows than keys: the rows of one context are then folded
into the query axis, so that neither beams nor hypotheses copy its keys. And keys may come in two parts
(:class:`SharedKeys`): those of a prompt, one row a context, and those of the tokens behind it, one row a query row. On a
CPU two batched matrix products with a softmax between them take the place of the fused kernel wherever they are quicker:
in half precision, and for few queries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

__all__ = ["ATTENTION", "RowGroups", "SharedKeys", "rows_grouped", "select_shared", "share_contexts", "share_prompts"]

ATTENTION = "ragstone"
"""The name under which the function is registered."""

_SCORES_PER_BLOCK = 2**21
"""Attention scores computed at a time: 8 MB in float32, which stays in a CPU's cache."""

_FEW_QUERIES = 32
"""Below this many queries a key head, two matrix products are quicker than the fused kernel in float32 too."""


@dataclass(frozen=True)
class RowGroups:
    """Which context each of R rows reads.

    ``slots`` (N, G) holds the rows of each of the N contexts, filled up with row 0, and ``places`` (R,) where each row
    stands in it, counted n·G + g. Both are None where every context has its G rows side by side (``copies`` = G).
    """

    copies: int
    slots: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, contexts: Tensor, count: int) -> RowGroups:
        """The groups of R rows, given the context (R,) of each out of ``count``."""
        sizes = torch.bincount(contexts, minlength=count)
        copies = int(sizes.max())
        order = contexts.argsort(stable=True)
        if bool((sizes == copies).all()) and bool((order.diff() == 1).all()):
            return cls(copies)
        first = sizes.cumsum(dim=0) - sizes
        within = torch.empty_like(order)
        within[order] = torch.arange(len(order), device=order.device) - first[contexts[order]]
        places = contexts * copies + within
        slots = torch.zeros(count * copies, dtype=torch.long, device=order.device)
        slots[places] = torch.arange(len(places), device=order.device)
        return cls(copies, slots.view(count, copies), places)

    def contexts(self, rows: int, device: torch.device) -> Tensor:
        """The context (R,) of each of R rows."""
        places = torch.arange(rows, device=device) if self.places is None else self.places
        return places // self.copies

    def spread(self, rows: Tensor) -> Tensor:
        """(R, …) -> (N·G, …), the rows of each context side by side."""
        return rows if self.slots is None else rows[self.slots.flatten()]

    def gather(self, rows: Tensor) -> Tensor:
        """The reverse of :meth:`spread`: (N·G, …) -> (R, …)."""
        return rows if self.places is None else rows[self.places]


@dataclass(frozen=True)
class SharedKeys:
    """Keys (or values): ``prompt`` (N, heads, S, ·), which rows share, and ``own`` (R, heads, t, ·), which they do not.

    Cross-attention has no ``own``. A model passes them on to attention as it would a tensor.
    """

    prompt: Tensor
    own: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, heads, S + t, ·)."""
        rows, heads, length, width = self.prompt.shape
        return rows, heads, length + (0 if self.own is None else self.own.shape[2]), width

    def numel(self) -> int:
        """Of the prompts."""
        return self.prompt.numel()

    def copied(self, groups: RowGroups) -> Tensor:
        """(R, heads, S + t, ·): to each row its prompt."""
        assert self.own is not None
        return torch.cat([self.prompt[groups.contexts(len(self.own), self.own.device)], self.own], dim=2)


class _SharedLayer(DynamicLayer):
    """Keys and values of N prompts, to which R rows add theirs; only the rows' own are ever copied or reordered."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = keys, values
        self.lazy_initialization(keys, values)
        self.keys = keys.new_empty(rows, keys.shape[1], 0, keys.shape[3])
        self.values = values.new_empty(rows, values.shape[1], 0, values.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        return SharedKeys(self.prompt_keys, keys), SharedKeys(self.prompt_values, values)

    def get_seq_length(self) -> int:
        return int(self.prompt_keys.shape[2] + self.keys.shape[2])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


class _SharedCrossLayer(DynamicLayer):
    """Keys and values of N contexts, which R rows read."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = keys, values
        self.lazy_initialization(keys, values)
        self.keys, self.values = SharedKeys(keys), SharedKeys(values)


def share_prompts(cache: Any, rows: int) -> Cache:
    """A cache for R rows that read the N prompts of ``cache``, and never copy them."""
    return Cache(layers=[_SharedLayer(layer.keys, layer.values, rows) for layer in cache.layers])


def share_contexts(cache: Any) -> Cache:
    """The cross-attention cache of N contexts for any number of rows."""
    return Cache(layers=[_SharedCrossLayer(layer.keys, layer.values) for layer in cache.layers])


def select_shared(cache: Any, rows: Tensor, contexts: Tensor) -> Any:
    """What ``rows`` (R',) of a shared cache own, with ``contexts`` (N',) of what they share; the old one stays as it is."""
    layers = []
    for layer in cache.layers:
        keys, values = layer.prompt_keys[contexts], layer.prompt_values[contexts]
        if isinstance(layer, _SharedCrossLayer):
            layers.append(_SharedCrossLayer(keys, values))
            continue
        layers.append(_SharedLayer(keys, values, len(rows)))
        layers[-1].keys, layers[-1].values = layer.keys[rows], layer.values[rows]
    return Cache(layers=layers)


_local = threading.local()


@contextmanager
def rows_grouped(groups: RowGroups) -> Iterator[None]:
    """Say which context each row of the forward pass inside reads."""
    before = getattr(_local, "groups", None)
    _local.groups = groups
    try:
        yield
    finally:
        _local.groups = before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor | SharedKeys,
    value: Tensor | SharedKeys,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (R, heads, T, ·) -> (R, T, heads, ·); keys and values (R or N, key heads, S, ·) or in two parts."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, SharedKeys) and isinstance(value, SharedKeys) and _copying_pays(query, key, softcap):
        key, value = key.copied(_local.groups), value.copied(_local.groups)
    if isinstance(key, SharedKeys) and isinstance(value, SharedKeys):
        shared = _folded if key.own is None else _two_parts
        out = shared(query, key, value, attention_mask, scaling, position_bias, softcap, dropout)
    else:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        groups = query.shape[1] // key.shape[1]
        half = query.dtype in (torch.bfloat16, torch.float16)
        small = half or query.shape[2] * groups < _FEW_QUERIES
        quick = small and query.device.type == "cpu" and attention_mask is not None and not torch.is_grad_enabled()
        if not quick and softcap is None:
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout,
                scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **kwargs,
            )
        out = _weighted(query, key, value, _added(attention_mask, position_bias), scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _copying_pays(query: Tensor, key: SharedKeys, softcap: float | None) -> bool:
    """Whether rows had better copy the keys of their prompt: a GPU's fused kernel keeps no weights for the gradient."""
    return query.device.type != "cpu" and torch.is_grad_enabled() and key.own is not None and softcap is None


def _weighted(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """softmax(q·k + bias)·v in blocks of rows; query (N, heads, T, ·), bias broadcast to (N, heads, T, S)."""
    rows, heads, length, width = query.shape
    out = query.new_empty(rows, heads, length, value.shape[-1])
    block = max(_SCORES_PER_BLOCK // (heads * length * key.shape[2]), 1)
    grouped = (key.shape[1], heads // key.shape[1] * length)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        q = (query[part] * scaling).reshape(-1, *grouped, width)
        scores = torch.matmul(q, key[part].transpose(2, 3))
        if softcap is not None:
            scores = (scores / softcap).tanh_().mul_(softcap)
        if bias is not None:
            wide = scores.view(-1, heads, length, scores.shape[-1])
            wide.add_(bias if bias.shape[0] == 1 else bias[part])
        weights = scores.softmax(dim=-1)
        out[part] = torch.matmul(weights, value[part]).view(-1, heads, length, out.shape[-1])
    return out


def _folded(
    query: Tensor,
    key: SharedKeys,
    value: SharedKeys,
    mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Cross-attention of R rows to the keys of N contexts: the rows of a context become queries side by side.

    What a query may see of its context does not depend on where it stands, so its mask is the context's (N, 1, 1, S).
    """
    groups: RowGroups = _local.groups
    if dropout or (position_bias is not None and bool(position_bias.any())):
        raise NotImplementedError("shared cross-attention with dropout or a position bias")
    contexts, heads, length, width = key.shape[0], query.shape[1], query.shape[2], query.shape[3]
    spread = groups.spread(query).view(contexts, -1, heads, length, width).transpose(1, 2)
    bias = None if mask is None else mask[:, :, :1]
    folded = spread.reshape(contexts, heads, -1, width)
    out = _weighted(folded, key.prompt, value.prompt, bias, scaling, softcap)
    out = out.view(contexts, heads, -1, length, out.shape[-1]).transpose(1, 2)
    return groups.gather(out.reshape(-1, heads, length, out.shape[-1]))


def _two_parts(
    query: Tensor,
    key: SharedKeys,
    value: SharedKeys,
    mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of R rows to N prompts and to their own tokens, one softmax over both."""
    groups: RowGroups = _local.groups
    if mask is None or position_bias is not None or key.own is None or value.own is None:
        raise NotImplementedError("shared prompts need a mask, and know no position bias")
    contexts, heads = key.prompt.shape[:2]
    copies, seen = groups.copies, key.prompt.shape[2]
    length, width, repeats = query.shape[2], query.shape[3], query.shape[1] // heads
    rows = groups.spread(query * scaling).reshape(-1, heads, repeats * length, width)
    own_keys, own_values, mask = groups.spread(key.own), groups.spread(value.own), groups.spread(mask)

    def fold(by_row: Tensor) -> Tensor:  # (N·G, heads, M, ·) -> (N, heads, G·M, ·)
        if copies == 1:
            return by_row
        by_row = by_row.view(contexts, copies, *by_row.shape[1:]).transpose(1, 2)
        return by_row.reshape(contexts, heads, -1, by_row.shape[-1])

    def unfold(by_context: Tensor) -> Tensor:  # the reverse
        if copies == 1:
            return by_context
        by_context = by_context.view(contexts, heads, copies, -1, by_context.shape[-1]).transpose(1, 2)
        return by_context.reshape(contexts * copies, heads, -1, by_context.shape[-1])

    before = torch.matmul(fold(rows), key.prompt.transpose(2, 3))
    after = torch.matmul(rows, own_keys.transpose(2, 3))
    if softcap is not None:
        before, after = ((scores / softcap).tanh() * softcap for scores in (before, after))
    before += mask[::copies, :, :1, :seen]
    after.view(len(rows), heads, repeats, length, -1).add_(mask[:, :, None, :, seen:])
    weights = F.dropout(torch.cat([before, fold(after)], dim=-1).softmax(dim=-1), dropout)
    out = unfold(torch.matmul(weights[..., :seen], value.prompt))
    out = out + torch.matmul(unfold(weights[..., seen:]), own_values)
    return groups.gather(out.reshape(len(rows), heads * repeats, length, -1))


def _added(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    return mask + position_bias


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
