"""What learns: parts frozen or trained, adapters, τ; and how the result is written."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ragstone._extras import extra
from ragstone.errors import InputError, ModelError
from ragstone.models import RagForGeneration, RagTokenizer
from ragstone.models.adapters import ADAPTER_WEIGHTS, ADAPTERS, OTHER_WEIGHTS, PARTS
from ragstone.training.options import TrainingOptions

__all__ = ["check_finite", "fields_set", "frozen_parts", "make_trainable", "save_trained", "trained_weights"]

_SCALE = "rag.log_score_scale"


def make_trainable(model: RagForGeneration, options: TrainingOptions) -> dict[str, Any]:
    """Freeze, adapt and free the parts of ``model`` as ``options`` say; return peft's models of those with an adapter.

    The parts stay what they are: peft puts its layers into them, and its own models are only kept to save and merge.
    """
    learns = {"question_encoder": options.train_question_encoder, "generator": options.train_generator}
    ranks = {"question_encoder": options.question_encoder_lora_rank, "generator": options.lora_rank}
    adapted = {}
    if options.adapters is not None:
        _check_adapters(Path(options.adapters))
    for name in PARTS:
        part = getattr(model, name)
        part.requires_grad_(learns[name])
        if learns[name] and part.dtype != torch.float32 and not ranks[name]:
            raise InputError(
                f"The {name} is in {part.dtype}; load it with dtype='float32' to train it, and pass bf16=True."
            )
        if learns[name] and ranks[name]:
            before = None if options.adapters is None else Path(options.adapters) / ADAPTERS / name
            before = before if before is not None and before.is_dir() else None  # else it begins anew
            adapted[name] = _adapt(part, ranks[name], options, before)
            if before is not None:
                _begin_with(adapted[name], before)
    if (
        options.train_question_encoder
        and model.config.pooling != "pooler"
        and getattr(model.question_encoder, "pooler", None)
    ):
        model.question_encoder.pooler.requires_grad_(False)  # it takes no part in the vectors
    if options.learn_score_scale:
        tau = torch.tensor(math.log(model.config.tau), device=model.question_encoder.device)
        model.rag.log_score_scale = nn.Parameter(tau)
    return adapted


def _check_adapters(folder: Path) -> None:
    if not (folder / ADAPTERS).is_dir():
        raise InputError(f"{folder} holds no {ADAPTERS}/; name a checkpoint that was trained with adapters.")
    if (folder / OTHER_WEIGHTS).exists():
        raise InputError(
            f"{folder} holds more than adapters ({OTHER_WEIGHTS}), which would be lost; name it as the model to start from "
            "instead: its adapters become part of that, and new ones are trained on top."
        )


def _adapt(part: Any, rank: int, options: TrainingOptions, before: Path | None) -> Any:
    """Put an adapter on ``part``, scaled as the one in the folder ``before`` is."""
    peft = extra("training", "peft", "An adapter")
    alpha = options.lora_alpha or 2 * rank
    if before is not None:
        saved = peft.LoraConfig.from_pretrained(str(before)).lora_alpha
        if options.lora_alpha not in (None, saved):
            raise InputError(f"lora_alpha is {alpha}, but {before} was trained with {saved}; leave it out.")
        alpha = saved
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        exclude_modules=["pooler.dense"] if getattr(part, "pooler", None) is not None else None,
    )
    return peft.get_peft_model(part, settings)


def _begin_with(adapted: Any, folder: Path) -> None:
    """Give an adapter the weights of a saved one."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
        if set(weights) != set(get_peft_model_state_dict(adapted)):
            raise RuntimeError("it changes other layers than those that this model has")
        set_peft_model_state_dict(adapted, weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{file} cannot be gone on with ({error}); use the rank and the base that it was made with."
        ) from error


def frozen_parts(model: RagForGeneration) -> list[nn.Module]:
    """The parts of which no weight learns."""
    parts = [getattr(model, name) for name in PARTS]
    return [part for part in parts if not any(p.requires_grad for p in part.parameters())]


def trained_weights(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that learn, by name; out of ``state`` where the model's own are in shards."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    state = dict(model.named_parameters()) if state is None else state
    return {name: state[name].detach().contiguous() for name in names}


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise ModelError if any of ``weights`` holds what is no number."""
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken is not None:
        raise ModelError(
            f"The weights {broken!r} hold NaN or infinity: the training has diverged, and nothing is written; lower the "
            "learning rate and go on from an earlier checkpoint."
        )


def save_trained(
    model: RagForGeneration,
    tokenizer: RagTokenizer,
    folder: Path,
    *,
    adapted: dict[str, Any],
    base_model: str | None,
    passage_encoder: str | None = None,
    passage_fingerprint: str | None = None,
) -> None:
    """Write a checkpoint that ``from_pretrained`` loads: adapters beside the name of their base, or everything.

    Args:
        model, tokenizer: what was trained.
        folder: where to.
        adapted: peft's models, as :func:`make_trainable` returned them.
        base_model: name or folder that the model was loaded from. None: adapters are merged and the whole is written.
        passage_encoder: name or folder of the encoder that passages keep while the question encoder moves on.
        passage_fingerprint: of its weights, if the question encoder learned with them.
    """
    if adapted and base_model is not None and Path(base_model).resolve() == folder.resolve():
        raise InputError(
            f"The adapters cannot be written into {folder}, for they need the model in it; name another folder."
        )
    check_finite(trained_weights(model))
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run left would be loaded with the new weights.
    shutil.rmtree(folder / ADAPTERS, ignore_errors=True)
    (folder / OTHER_WEIGHTS).unlink(missing_ok=True)
    rag, fields = model.rag, dict[str, Any]()
    if passage_encoder is not None:
        fields["passage_encoder"] = _seen_from(folder, passage_encoder)
        fields["passage_fingerprint"] = passage_fingerprint
    if rag.log_score_scale is not None:
        fields["score_scale"] = float(rag.log_score_scale.detach().exp())
    if not adapted or base_model is None:
        for part in adapted.values():
            part.merge_and_unload()
        scale, rag.log_score_scale = rag.log_score_scale, None
        with fields_set(model.config, **fields):
            model.save_pretrained(folder)
        rag.log_score_scale = scale
        tokenizer.save_pretrained(folder)
        return
    for name, part in adapted.items():
        part.active_peft_config.base_model_name_or_path = None  # a path of this machine; base_model says it
        part.save_pretrained(str(folder / ADAPTERS / name))
        (folder / ADAPTERS / name / "README.md").unlink(missing_ok=True)
    prefixes = tuple(f"rag.{name}." for name in adapted)
    others = {name: w for name, w in trained_weights(model).items() if not name.startswith(prefixes) and name != _SCALE}
    if others:
        save_file(others, folder / OTHER_WEIGHTS)
    fields |= {"base_model": _seen_from(folder, base_model), "architectures": [type(model).__name__]}
    with fields_set(model.config, **fields):
        model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


@contextmanager
def fields_set(config: Any, **fields: Any) -> Iterator[None]:
    """Let ``fields`` of a config have these values inside."""
    before = {name: getattr(config, name) for name in fields}
    vars(config).update(fields)
    try:
        yield
    finally:
        vars(config).update(before)


def _seen_from(folder: Path, name: str) -> str:
    """A name as it is, a folder relative to ``folder``, so that both can be moved together."""
    return os.path.relpath(name, folder) if Path(name).is_dir() else name
