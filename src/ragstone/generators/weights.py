"""What a model computes with, told apart cheaply: its weights, what is in them, and the adapters that are switched on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adapters_of", "samples", "weights_of"]

_SAMPLES = 4
"""Values that are looked at in each weight."""


def weights_of(model: nn.Module) -> tuple[Any, ...]:
    """Something that differs when weights of ``model`` were replaced or written to, through ``.data`` too.

    A write through ``.data`` leaves no trace but in the values, of which a few are looked at: one that changes nothing but
    single rows of a matrix may be overlooked.
    """
    weights = [weight for module in model.modules() for weight in module._parameters.values() if weight is not None]
    versions = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.shape) for w in weights)
    return *versions, samples(weights)


@torch.inference_mode()
def samples(weights: Iterable[Tensor]) -> bytes:
    """A few values of each weight, from its beginning to its end."""
    found: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if type(weight) is nn.Parameter and weight.is_contiguous() and not weight.is_meta:  # others may not be cut so
            size = weight.numel()
            part = weight.as_strided((min(size, _SAMPLES),), (max((size - 1) // (_SAMPLES - 1), 1),))
            found.setdefault(weight.device, []).append(part)
    return b"".join(torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes() for parts in found.values())


def adapters_of(model: nn.Module) -> str:
    """Which of peft's adapters are on in each layer of ``model``, how strongly, and which are in its weights already."""
    layers = (m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property))
    names = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
    return "".join(str([getattr(layer, name, None) for name in names]) for layer in layers)
