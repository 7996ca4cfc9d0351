"""From a transformer's token states to one vector a text: pure functions, differentiable."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ragstone.errors import InputError, ModelError

__all__ = ["POOLINGS", "embed", "pool"]

POOLINGS = ("cls", "last_token", "mean", "pooler")


def pool(
    last_hidden_state: Tensor | None, attention_mask: Tensor, pooling: str, pooler_output: Tensor | None = None
) -> Tensor:
    """Reduce token states to one vector a row.

    ``cls`` is the state of the first real token and ``last_token`` that of the last, so padding may be on either side;
    ``mean`` is the mean over the real tokens; ``pooler`` is the model's own ``pooler_output``. A row without a real
    token gives zeros. Half-precision states are averaged, and returned, in float32.

    Args:
        last_hidden_state: (B, S, D); may be None for ``pooler``.
        attention_mask: (B, S), nonzero at real tokens.
        pooling: one of `POOLINGS`.
        pooler_output: (B, D), needed by ``pooler`` only.

    Returns:
        Vectors (B, D), float32 or wider.

    Raises:
        InputError: ``pooling`` is none of `POOLINGS`.
        ModelError: the model gave nothing that ``pooling`` could use.
    """
    if pooling not in POOLINGS:
        raise InputError(f"Pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}.")
    states = pooler_output if pooling == "pooler" else last_hidden_state
    if states is None:
        other = "'mean' or 'cls'" if pooling == "pooler" else "'pooler'"
        raise ModelError(f"This encoder gives no output for pooling {pooling!r}; choose {other}.")
    if states.dtype in (torch.float16, torch.bfloat16):
        states = states.float()
    real = attention_mask.to(torch.bool)  # (B, S)
    if pooling == "mean":
        # masked_fill rather than a product: a padded position may hold NaN, and 0 * NaN is NaN.
        total = states.masked_fill(~real.unsqueeze(-1), 0.0).sum(dim=1)
        return total / real.sum(dim=1, keepdim=True).clamp(min=1)
    if pooling != "pooler":
        rows = torch.arange(real.shape[0], device=real.device)
        positions = torch.arange(real.shape[1], device=real.device)
        # argmax gives the first of equal values: the first real token, or the real token of the largest position.
        index = real.int().argmax(dim=1) if pooling == "cls" else (positions * real).argmax(dim=1)
        states = states[rows, index]
    return states.masked_fill(~real.any(dim=1, keepdim=True), 0.0)


def embed(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str,
    normalize: bool,
    token_type_ids: Tensor | None = None,
) -> Tensor:
    """Run a raw Hugging Face module and pool its output; gradient flows where the caller lets it.

    Of an encoder-decoder model only the encoder runs.

    Args:
        model: a `PreTrainedModel` that gives token states, or vectors itself, as DPR does.
        input_ids: (B, S).
        attention_mask: (B, S); None says that every token is real, which is quicker than a mask of ones.
        pooling: one of `POOLINGS`.
        normalize: scale each vector to length 1.
        token_type_ids: (B, S); left out if the model takes none.

    Returns:
        Vectors (B, D), float32 or wider.

    Raises:
        InputError: ``pooling`` is none of `POOLINGS`.
        ModelError: the model has no output that ``pooling`` could use.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        model = model.get_encoder()  # type: ignore[operator]
    inputs: dict[str, Any] = {"attention_mask": attention_mask, "return_dict": True}
    taken = inspect.signature(model.forward).parameters
    if token_type_ids is not None and "token_type_ids" in taken:
        inputs["token_type_ids"] = token_type_ids
    if "use_cache" in taken:  # a causal model would otherwise keep keys and values that nobody reads
        inputs["use_cache"] = False
    output = model(input_ids=input_ids, **inputs)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    vectors = pool(output.get("last_hidden_state"), mask, pooling, output.get("pooler_output"))
    return F.normalize(vectors, dim=-1) if normalize else vectors
