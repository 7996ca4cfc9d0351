"""Weights in the layout that the CPU's matrix kernels read fastest, made once for each layer and used without gradient.

A linear layer with few input rows is bound by reading its weights, and oneDNN reorders them at every call. Weights that
are reordered beforehand are read at the memory's own rate: faster at the sizes of a
decoding step. The packed copies cost as much memory as the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragstone.generators.attention import ATTENTION
from ragstone.generators.weights import samples

__all__ = ["accelerated", "can_share", "is_accelerated"]

MAX_PACKED_BYTES = 4 * 2**30
"""Models with more weights than this keep one copy of them."""

_lock = threading.RLock()
_depth: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_packed: WeakKeyDictionary[nn.Linear, tuple[Any, Callable[[Tensor], Tensor]]] = WeakKeyDictionary()


def can_share(model: Any) -> bool:
    """Whether every part of ``model`` calls attention through transformers' table, as ``sdpa``."""
    configs = _configs(model)
    functional = all(part._can_set_attn_implementation() for part in _parts(model))
    return functional and bool(configs) and all(c._attn_implementation in ("sdpa", ATTENTION) for c in configs)


def is_accelerated(model: Any) -> bool:
    """Whether this is the inside of :func:`accelerated`, with effect."""
    return bool(_depth.get(model))


@contextmanager
def accelerated(model: Any, *, learning: bool = False) -> Iterator[None]:
    """Let ``model`` run on Ragstone's attention and on packed weights inside; outside it is as it was.

    May be entered again inside itself, and by several threads. With gradients on, or in training mode, it does nothing,
    unless ``learning`` says that they are meant: then attention alone is Ragstone's.
    """
    if not learning and (torch.is_grad_enabled() or model.training):
        yield
        return
    with _lock:
        depth = _depth[model] = _depth.get(model, 0) + 1
        if depth == 1:
            _switch_on(model, pack=not learning)
    try:
        yield
    finally:
        with _lock:
            _depth[model] -= 1
            if not _depth[model]:
                _switch_off(model)


def _switch_on(model: Any, *, pack: bool) -> None:
    if can_share(model):
        for config in _configs(model):
            config._attn_implementation_internal = ATTENTION
    if pack and _can_pack(model):
        layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        values = samples(layer.weight for layer in layers)
        for layer in layers:
            vars(layer)["forward"] = _packed_forward(layer, values)


def _switch_off(model: Any) -> None:
    for config in _configs(model):
        if config._attn_implementation == ATTENTION:
            config._attn_implementation_internal = "sdpa"
    for module in model.modules():
        if type(module) is nn.Linear and vars(module).get("forward") is _packed.get(module, (None, None))[1]:
            vars(module).pop("forward", None)


def _packed_forward(module: nn.Linear, values: bytes) -> Callable[[Tensor], Tensor]:
    """The layer on its packed weight, which is made anew when the weight, or any of the ``values`` of all, has changed."""
    weight, bias = module.weight, module.bias
    key = (weight.data_ptr(), weight._version, weight.dtype, None if bias is None else bias.data_ptr(), values)
    known = _packed.get(module)
    if known is None or known[0] != key:
        known = _packed[module] = (key, _on_demand(ref(module)))
    return known[1]


def _on_demand(layer: Callable[[], nn.Linear | None]) -> Callable[[Tensor], Tensor]:
    """Packed at the first call, so that layers which are never called cost nothing; the layer itself is not kept alive."""
    packed: list[Tensor] = []

    def forward(values: Tensor) -> Tensor:
        module = layer()
        assert module is not None
        # Another thread may train the same model meanwhile; whether gradients are on is a thread's own.
        if torch.is_grad_enabled() or values.dtype != module.weight.dtype or not values.numel():
            return F.linear(values, module.weight, module.bias)
        if not packed:
            packed.append(torch.ops.mkldnn._reorder_linear_weight(module.weight))
        return torch.ops.mkldnn._linear_pointwise(values, packed[0], module.bias, "none", [], "")

    return forward


def _can_pack(model: Any) -> bool:
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and not weight.is_inference()
        and _packing_works(weight.dtype)
        and sum(p.numel() * p.element_size() for p in model.parameters()) <= MAX_PACKED_BYTES
    )


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, computes with packed weights what it computes without."""
    values, weight = torch.eye(4, 8, dtype=dtype), torch.arange(128.0).view(16, 8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(values, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(found, F.linear(values, weight))


def _parts(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(type(m), "_can_set_attn_implementation")]


def _configs(model: Any) -> list[Any]:
    """Every config that a module of ``model`` reads its attention from, each once."""
    found = (vars(module).get("config") for module in model.modules())
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values())
