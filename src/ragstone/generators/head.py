"""A generator's output layer apart from its body: logits are made where they are wanted, in blocks that are not kept.

A target of T tokens under K passages has K·T·V logits, of which training wants one in V. :func:`score_in_blocks` makes them
for a few positions at a time, and once more for their gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["Score", "head_input", "project", "score_in_blocks", "without_head"]

Score = Callable[..., tuple[Tensor, ...]]
"""Logits (P, K, V) and values (P, …) of as many positions -> tensors (P, …), computed for each position by itself."""

LOGITS_PER_BLOCK = 2**23
"""Logits that exist at a time: 32 MB in float32."""

_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far apart, relative to their norm, logits of the same may be; 0.02 in half precision."""

_separable: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@contextmanager
def without_head(model: Any, keep: Callable[[Tensor], Tensor] = lambda hidden: hidden[:, :0]) -> Iterator[list[Tensor]]:
    """Inside, the output layer gets ``keep`` of its input, by default nothing, and the list the input (N, T, ·) itself.

    This holds for the thread that enters; others go on as ever.
    """
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def intercept(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != owner:
            return None
        seen.append(inputs[0])
        return (keep(inputs[0]), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(intercept)
    try:
        yield seen
    finally:
        hook.remove()


def project(model: Any, hidden: Tensor) -> Tensor:
    """The logits that ``model`` makes of what its output layer is given: (…, ·) -> (…, V)."""
    return _finished(model, model.get_output_embeddings()(hidden))


def _finished(model: Any, logits: Tensor) -> Tensor:
    bias = getattr(model, "final_logits_bias", None)
    return logits if bias is None else logits + bias


def head_input(model: Any, run: Callable[[], Tensor]) -> Tensor | None:
    """What the output layer would be given in ``run()``, which returns logits (N, T, V): (N, T', ·), with its gradient.

    None where ``model`` makes its logits otherwise than :func:`project`, or where nobody can tell. That is found out the
    first time, from one position a row: its hidden state is made large, so that a bounded or rescaled output shows.
    """
    if model not in _separable:
        return _first_head_input(model, run)
    if not _separable[model]:
        return None
    with without_head(model) as seen:
        run()
    return seen[0]


def _first_head_input(model: Any, run: Callable[[], Tensor]) -> Tensor | None:
    head, made, owner = model.get_output_embeddings(), [], threading.get_ident()
    if not isinstance(head, nn.Module):
        _separable[model] = False
        return None

    def listen(module: Any, inputs: Any, logits: Tensor) -> None:
        if threading.get_ident() == owner:
            made.append(logits.detach())

    hook = head.register_forward_hook(listen)
    try:
        with without_head(model, lambda hidden: 100 * hidden[:, -1:].detach()) as seen:
            logits = run().detach()
    finally:
        hook.remove()
    _separable[model] = len(made) == 1 and _equal(logits, _finished(model, made[0]))
    return seen[0] if _separable[model] else None


def _equal(logits: Tensor, expected: Tensor) -> bool:
    if logits.shape != expected.shape:
        return False
    close = min(_CLOSE.get(t.dtype, 0.02) for t in (logits, expected))
    return bool((logits - expected).norm() <= close * expected.norm())


def score_in_blocks(model: Any, score: Score, hidden: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """``score(project(model, hidden), *values)``, block by block, whose logits are computed again for the gradient.

    Args:
        model: the raw Hugging Face model.
        score: see :data:`Score`; it may hold on to no tensor that needs a gradient.
        hidden: (P, K, ·), what the output layer would be given at P positions.
        values: (P, …) each, passed on to ``score``.
    """
    head = model.get_output_embeddings()
    positions = max(LOGITS_PER_BLOCK // (hidden.shape[1] * head.weight.shape[0]), 1)
    if _is_plain(head):
        weight, bias, extra = head.weight, head.bias, getattr(model, "final_logits_bias", None)
        if extra is not None:
            bias = extra.flatten() if bias is None else bias + extra.flatten()
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # here, where the casts have gradients, and not inside
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _LinearBlocks.apply(score, positions, hidden, weight, bias, *values)  # type: ignore[no-untyped-call]

    def scores(hidden: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return score(project(model, hidden), *values)

    blocks = zip(*(torch.split(v, positions) for v in (hidden, *values)), strict=True)
    return _joined(checkpoint(scores, *block, use_reentrant=False) for block in blocks)


def _is_plain(head: Any) -> bool:
    """Whether ``head`` is its weight and bias and nothing else: no adapter, no quantised layer, no hook."""
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    return type(head) is nn.Linear and "forward" not in vars(head) and not any(hooks)


class _LinearBlocks(torch.autograd.Function):
    """Score the logits of a linear layer in blocks. Its weight's gradient is gathered in place, in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, score: Score, positions: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.score, ctx.positions = score, positions
        ctx.save_for_backward(hidden, weight, bias, *values)
        blocks = zip(*(torch.split(v, positions) for v in (hidden, *values)), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            return _joined(score(F.linear(h, weight, bias), *v) for h, *v in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *values = ctx.saved_tensors
        parts = (hidden, weight, bias, *values)
        wanted = ctx.needs_input_grad[2:]
        grads = [torch.zeros_like(part) if w else None for part, w in zip(parts, wanted, strict=True)]
        for start in range(0, len(hidden), ctx.positions):
            block = slice(start, start + ctx.positions)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(hidden[block], weight, bias)
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                logits.requires_grad_()
                chosen = [v[block].detach().requires_grad_(w) for v, w in zip(values, wanted[3:], strict=True)]
                scores = ctx.score(logits, *chosen)
                inputs = [logits, *(v for v in chosen if v.requires_grad)]
                slopes = torch.autograd.grad(scores, inputs, [g[block] for g in gradients], allow_unused=True)
            rest = iter(slopes[1:])
            slope, states = slopes[0].flatten(0, -2), hidden[block].flatten(0, -2)
            if grads[0] is not None:
                grads[0][block] = (slope @ weight).view_as(grads[0][block])
            if grads[1] is not None:
                grads[1].addmm_(slope.t(), states)
            if grads[2] is not None:
                grads[2] += slope.sum(dim=0)
            for grad in grads[3:]:
                if grad is not None and (found := next(rest)) is not None:
                    grad[block] = found
        return None, None, *grads


def _joined(blocks: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))
