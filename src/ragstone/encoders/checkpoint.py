"""Encoder checkpoints: which class loads them, what they declare about pooling and prompts, and their fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ragstone import local
from ragstone.errors import ModelError

__all__ = ["EncoderSettings", "fingerprint", "load_backbone", "load_tokenizer", "quiet", "read_encoder_settings"]

# sentence-transformers' names of pooling modes, in its old (one flag each) and new (one name) letters.
_OLD_POOLING_FLAGS = "pooling_mode_"
_POOLING_NAMES = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last_token",
}


@dataclass(frozen=True)
class EncoderSettings:
    """How a checkpoint wants its vectors made.

    Attributes:
        pooling: one of `ragstone.encoders.POOLINGS`.
        normalize: whether vectors are scaled to length 1.
        template: ``"pair"`` (DPR's (title, text) pair) or ``"title\\ntext"``.
        max_length: declared limit in tokens, or None.
        question_prompt: put before every question.
        passage_prompt: put before every passage.
        lowercase: the checkpoint asks for lower-cased text, whatever its tokenizer does.
        subfolder: where in the checkpoint the transformer lies ("" = at the root).
    """

    pooling: str
    normalize: bool
    template: str
    max_length: int | None = None
    question_prompt: str = ""
    passage_prompt: str = ""
    lowercase: bool = False
    subfolder: str = ""


def read_encoder_settings(name_or_path: str | Path) -> EncoderSettings:
    """Read what a checkpoint declares: the files of sentence-transformers if there are any, else what its kind implies."""
    name = local.resolve(str(name_or_path), "encoder")
    modules = _read_json(name, "modules.json")
    if modules is not None:
        return _sentence_transformers_settings(name, modules)
    config = _read_json(name, "config.json") or {}
    if config.get("model_type") == "dpr":
        return EncoderSettings(pooling="pooler", normalize=False, template="pair")
    return EncoderSettings(pooling="mean", normalize=False, template="title\ntext")


def _sentence_transformers_settings(name: str, modules: list[dict[str, Any]]) -> EncoderSettings:
    pooling, normalize, subfolder = "", False, ""
    for module in modules:
        kind, path = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if kind == "Transformer":
            subfolder = path
        elif kind == "Pooling":
            pooling = _sentence_transformers_pooling(name, _read_json(name, f"{path}/config.json") or {})
        elif kind == "Normalize":
            normalize = True
        else:
            raise ModelError(
                f"The encoder {name!r} has a sentence-transformers module {kind!r}, which Ragstone does not run; "
                "choose an encoder made of Transformer, Pooling and Normalize."
            )
    own = _read_json(name, f"{subfolder}/sentence_bert_config.json".lstrip("/")) or {}
    declared = _read_json(name, "config_sentence_transformers.json") or {}
    prompts = {key: value or "" for key, value in (declared.get("prompts") or {}).items()}
    default = prompts.get(declared.get("default_prompt_name") or "", "")
    passage_prompts = [prompts[key] for key in ("document", "passage", "corpus") if key in prompts]
    return EncoderSettings(
        pooling=pooling or "mean",
        normalize=normalize,
        template="title\ntext",
        max_length=own.get("max_seq_length"),
        question_prompt=prompts.get("query", default),
        passage_prompt=passage_prompts[0] if passage_prompts else default,
        lowercase=bool(own.get("do_lower_case", False)),
        subfolder=subfolder,
    )


def _sentence_transformers_pooling(name: str, config: dict[str, Any]) -> str:
    declared = config.get("pooling_mode")
    if declared is None:
        modes = [k.removeprefix(_OLD_POOLING_FLAGS) for k, v in config.items() if k.startswith(_OLD_POOLING_FLAGS) and v]
    else:
        modes = [declared] if isinstance(declared, str) else list(declared)
    modes = modes or ["mean"]
    if len(modes) > 1 or modes[0] not in _POOLING_NAMES:
        raise ModelError(
            f"The encoder {name!r} pools by {' + '.join(modes)}, which Ragstone does not do; pass pooling='mean' or 'cls'."
        )
    return _POOLING_NAMES[modes[0]]


def load_backbone(name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load the raw transformer of any encoder checkpoint with the class it was saved from."""
    name = local.resolve(str(name_or_path), "encoder")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name)
            model_class = _model_class(config)
            model, report = model_class.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    except Exception as error:
        raise ModelError(f"The encoder {name!r} cannot be loaded: {error}") from error
    return model


def _model_class(config: Any) -> Any:
    import transformers

    architecture = (config.architectures or [""])[0]
    if config.model_type == "dpr" and architecture in ("DPRContextEncoder", "DPRQuestionEncoder"):
        return getattr(transformers, architecture)
    if config.model_type in ("t5", "mt5", "umt5"):
        return transformers.AutoModelForTextEncoding
    return AutoModel


def load_tokenizer(name_or_path: str | Path, settings: EncoderSettings) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name_or_path)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights that does not depend on file format, key names or float32 versus bfloat16.

    Each tensor is rounded to bfloat16 and hashed with its shape; the result hashes the set of these hashes.
    """
    digests = set()
    for tensor in model.state_dict().values():
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest = hashlib.sha256(repr(tuple(rounded.shape)).encode())
        digest.update(rounded.view(torch.uint8).numpy() if rounded.ndim else rounded.float().numpy().tobytes())
        digests.add(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and reports: what matters in them is raised as an error instead."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _read_json(name: str, filename: str) -> Any:
    """Return the parsed file of a folder or hub repository, or None if there is no such file."""
    if Path(name).is_dir():
        path: Path | None = Path(name) / filename
    else:
        found = cached_file(
            name,
            filename,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        path = Path(found) if found else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); the checkpoint is damaged, fetch it again.") from error
