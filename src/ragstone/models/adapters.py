"""Checkpoints that hold only what was trained: low-rank adapters (Hu et al. 2021) on the parts of another model.

Such a folder has a ``config.json`` whose ``base_model`` names the model underneath, for each part with an adapter a folder
in peft's own format (``adapters/generator``, ``adapters/question_encoder``), and ``weights.safetensors`` with what else
was trained. Loading adds ΔW = (α/r)·B·A to the weights, so that the model computes, decodes and saves as any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from ragstone._extras import extra
from ragstone.errors import ModelError

__all__ = ["ADAPTERS", "ADAPTER_WEIGHTS", "OTHER_WEIGHTS", "PARTS", "base_of", "load_trained"]

PARTS = ("question_encoder", "generator")
ADAPTERS = "adapters"
OTHER_WEIGHTS = "weights.safetensors"
_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def base_of(folder: Path, base: str) -> str:
    """What the ``base_model`` of the checkpoint ``folder`` means here.

    Raises:
        ModelError: it is a folder that is not there any more, or the checkpoint itself.
    """
    if (folder / base).resolve() == folder.resolve():
        raise ModelError(f"{folder} names itself as the model it was trained on; edit base_model in its config.json.")
    if (folder / base).is_dir():
        return str(folder / base)
    if base.startswith((".", "/")):
        raise ModelError(
            f"{folder} was trained on the model in {base!r}, which is not there; put it back, or edit base_model."
        )
    return base


def load_trained(model: Any, folder: Path) -> None:
    """Bring what ``folder`` holds into the weights of ``model``, the base it was trained on.

    Raises:
        ModelError: a file is missing or damaged, or belongs to another base.
    """
    adapters = [part for part in PARTS if (folder / ADAPTERS / part).is_dir()]
    others = folder / OTHER_WEIGHTS
    if not adapters and not others.is_file():
        raise ModelError(f"{folder} names a base model but holds no {ADAPTERS}/ and no {OTHER_WEIGHTS}; copy it again.")
    for part in adapters:
        _merge(getattr(model, part), folder / ADAPTERS / part)
    if others.is_file():
        weights = _read(others)
        unknown = set(weights) - set(model.state_dict())
        if unknown:
            raise ModelError(
                f"{others} holds {min(unknown)!r}, which its base model does not have; name the right base."
            )
        model.load_state_dict(weights, strict=False)


@torch.no_grad()
def _merge(part: Any, folder: Path) -> None:
    """Add a saved adapter to the weights of ``part``; plain LoRA here, whatever else peft knows by peft itself."""
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter {folder} has no usable {_SETTINGS}: {error}") from error
    plain = settings.get("peft_type") == "LORA" and not any(
        settings.get(name) for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    )
    if not plain:
        _merge_with_peft(part, folder)
        return
    weights = _read(folder / ADAPTER_WEIGHTS)
    modules = dict(part.named_modules())
    scale = settings["lora_alpha"] / settings["r"]
    for name in sorted(name for name in weights if name.endswith(".lora_A.weight")):
        target = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        down, up = weights[name].float(), weights[name.replace(".lora_A.", ".lora_B.")].float()
        module, change = modules.get(target), scale * up @ down
        if isinstance(module, Conv1D):  # GPT-2's linear layer, transposed
            change = change.T
        if module is None or module.weight.shape != change.shape:
            raise ModelError(f"The adapter {folder} changes {target!r}, which its base does not have in that shape.")
        module.weight += change.to(module.weight)


def _merge_with_peft(part: Any, folder: Path) -> None:
    peft = extra("training", "peft", f"The adapter {folder}")
    peft.PeftModel.from_pretrained(part, str(folder)).merge_and_unload()


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read ({error}); copy it again.") from error
