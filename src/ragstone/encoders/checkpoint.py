"""Encoder checkpoints: which class loads them, what they declare about their vectors, and their fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import normalizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ragstone import local
from ragstone.errors import InputError, ModelError

__all__ = [
    "SENTENCE_TRANSFORMERS_POOLINGS",
    "EncoderSettings",
    "fingerprint",
    "load_backbone",
    "load_tokenizer",
    "longest_input",
    "quiet",
    "read_encoder_settings",
]

# How sentence-transformers names poolings, as one word or, with a prefix, as one flag each.
_POOLING_FLAG = "pooling_mode_"
_POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last_token",
    "mean": "mean",
    "mean_tokens": "mean",
}
SENTENCE_TRANSFORMERS_POOLINGS = {"cls": "cls", "mean": "mean", "last_token": "lasttoken"}
"""What sentence-transformers calls the poolings that it has too."""
# Models of which transformers has a class for the encoder alone that loads whole checkpoints.
_ENCODER_ONLY = ("mt5", "t5", "t5gemma", "umt5")
_DPR_ENCODERS = ("DPRContextEncoder", "DPRQuestionEncoder")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spm*", "merges.txt")


@dataclass(frozen=True)
class EncoderSettings:
    """How a checkpoint's vectors are made.

    Attributes:
        pooling: one of `ragstone.encoders.POOLINGS`.
        normalize: whether vectors are scaled to length 1.
        template: how a passage becomes text: ``"pair"`` (DPR's (title, text) pair) or ``"title\\ntext"``.
        max_length: number of tokens after which a text is cut; None: as many as tokenizer and model take.
        question_prompt: put before every question.
        passage_prompt: put before every passage.
    """

    pooling: str = "mean"
    normalize: bool = False
    template: str = "title\ntext"
    max_length: int | None = None
    question_prompt: str = ""
    passage_prompt: str = ""


def read_encoder_settings(
    name_or_path: str | Path,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    question_prompt: str | None = None,
    passage_prompt: str | None = None,
    max_length: int | None = None,
) -> EncoderSettings:
    """Return how a checkpoint's vectors are made; what is given wins over what the checkpoint declares.

    The files of sentence-transformers are read where there are any; the vectors are then those of its ``encode``.
    DPR gives its pooled output, unscaled, and takes (title, text) pairs. Of anything else the mean of the token states
    is taken, which needs no part that pretraining did not train (a ``pooler`` often is one), also unscaled: a length is
    information, and whoever trained for cosines said so in the files above.

    Raises:
        ModelError: a file is damaged, or asks for a step that Ragstone does not do.
    """
    name = local.resolve(str(name_or_path), "encoder")
    modules = _read_json(name, "modules.json") or []
    config = {} if modules else _read_json(name, "config.json") or {}
    is_dpr = config.get("model_type") == "dpr"
    kinds = {str(module.get("type", "")).rsplit(".", 1)[-1]: str(module.get("path", "")) for module in modules}
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ModelError(
            f"The encoder {name!r} has a sentence-transformers module {unknown[0]}, which Ragstone does not run; "
            "choose one made of Transformer, Pooling and Normalize."
        )
    if pooling is None and "Pooling" in kinds:
        pooling = _declared_pooling(name, _read_json(name, f"{kinds['Pooling']}/config.json") or {})
    shape = _read_json(name, _join(kinds.get("Transformer", ""), "sentence_bert_config.json")) or {}
    declared = _read_json(name, "config_sentence_transformers.json") or {}
    prompts = declared.get("prompts") or {}
    default = prompts.get(declared.get("default_prompt_name"))

    def prompt(given: str | None, *keys: str) -> str:
        return given if given is not None else next((prompts[key] for key in keys if key in prompts), default) or ""

    return EncoderSettings(
        pooling=pooling or ("pooler" if is_dpr else "mean"),
        normalize="Normalize" in kinds if normalize is None else normalize,
        template="pair" if is_dpr else "title\ntext",
        max_length=shape.get("max_seq_length") if max_length is None else max_length,
        question_prompt=prompt(question_prompt, "query"),
        passage_prompt=prompt(passage_prompt, "document", "passage", "corpus"),
    )


def _declared_pooling(name: str, config: dict[str, Any]) -> str:
    """Return the pooling that sentence-transformers' ``1_Pooling/config.json`` asks for, in its old or new form."""
    modes = config.get("pooling_mode") or [
        key.removeprefix(_POOLING_FLAG) for key, value in config.items() if key.startswith(_POOLING_FLAG) and value
    ]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    prompted = config.get("include_prompt", True)
    if len(modes) > 1 or modes[0] not in _POOLINGS or not prompted:
        raise ModelError(
            f"The encoder {name!r} pools by {' + '.join(modes)}{'' if prompted else ' without its prompt'}, which "
            "Ragstone does not do; pass pooling='mean' or another to use the model all the same."
        )
    return _POOLINGS[modes[0]]


def load_backbone(name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load the raw Hugging Face module of an encoder checkpoint, by the class that fits its weights.

    A DPR encoder is loaded as what it was saved as (``AutoModel`` takes every one for a question encoder), T5 as its
    encoder alone. A pooler that the checkpoint has no weights for is dropped rather than drawn at random.

    Args:
        name_or_path: ``"local"``, a folder, or a name on the hub.
        kwargs: for ``from_pretrained``, such as ``dtype``.

    Raises:
        ModelError: there is no such model, or its weights are damaged, incomplete or those of another model.
        MissingExtraError: ``"local"`` is not installed.
    """
    name, place = _locate(name_or_path)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(name, **place)
        except Exception as error:
            raise ModelError(_missing(name, "config.json")) from error
        model_class = _model_class(name, config)
        try:
            model, report = model_class.from_pretrained(
                name, config=config, output_loading_info=True, **place, **kwargs
            )
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"The weights of the encoder {name!r} cannot be read ({reason}); fetch or save it again."
            ) from error
    missing = set(report["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        missing = {key for key in missing if not key.startswith("pooler.")}
        model.pooler = None
    if missing:
        raise ModelError(
            f"The encoder {name!r} lacks {len(missing)} weights of a {type(model).__name__}, such as {min(missing)!r}, "
            "and these would be random; give a checkpoint that was saved from this class."
        )
    return model


def _model_class(name: str, config: Any) -> Any:
    architecture = (config.architectures or [""])[0]
    if config.model_type == "rag":
        raise ModelError(f"{name!r} is a whole RAG model; give an encoder, such as the one that it was built from.")
    if config.model_type == "dpr" and architecture in _DPR_ENCODERS:
        return getattr(transformers, architecture)
    return transformers.AutoModelForTextEncoding if config.model_type in _ENCODER_ONLY else transformers.AutoModel


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an encoder checkpoint.

    Raises:
        ModelError: there is none.
        MissingExtraError: ``"local"`` is not installed.
    """
    name, place = _locate(name_or_path)
    folder = Path(name, place["subfolder"])
    # Of a folder without its files transformers makes an empty tokenizer, to which every word is unknown.
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer; save the one that the encoder was trained with into it.")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **place)
    except Exception as error:
        raise ModelError(_missing(name, "tokenizer")) from error
    shape = _read_json(name, _join(place["subfolder"], "sentence_bert_config.json")) or {}
    if shape.get("do_lower_case") and tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: int | None = None) -> int:
    """Return the longest input in tokens: what is asked for, else the tokenizer's limit; the model's in any case.

    Raises:
        InputError: less than one token is asked for.
    """
    if asked is not None and asked < 1:
        raise InputError(f"max_length is {asked}; give a number of tokens from 1 up.")
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa's kind counts positions from padding_idx + 1, so that fewer than its table holds can be used.
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1
    limits = [asked or tokenizer.model_max_length, positions]
    # A tokenizer without a limit declares some 10^30, a model without one None or -1.
    return min((limit for limit in limits if limit and 0 < limit < 10**6), default=512)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights.

    Each tensor is hashed as bfloat16, with its shape; the set of these hashes is hashed. The result therefore does not
    depend on where the model lies, the format of its files, the names of its weights, or on whether it was loaded in
    float32 or bfloat16, while training it by one step changes it.
    """
    digests = set()
    for tensor in model.state_dict().values():
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous().reshape(-1)
        digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
        digest.update(rounded.view(torch.uint8).numpy())
        digests.add(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and loading reports; what matters in these is raised as an error instead."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _locate(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub name, and what ``from_pretrained`` must know to find the transformer there."""
    name = local.resolve(str(name_or_path), "encoder")
    # Old sentence-transformers put it into a folder of its own.
    modules = _read_json(name, "modules.json") or []
    paths = [module.get("path", "") for module in modules if str(module.get("type", "")).endswith(".Transformer")]
    offline = not Path(name).is_dir() and not local.hub_is_reachable()
    return name, {"subfolder": paths[0] if paths else "", "local_files_only": offline}


def _missing(name: str, what: str) -> str:
    if Path(name).is_dir():
        return f"The folder {name!r} has no {what} that can be read; save the model and its tokenizer into it."
    return (
        f"The encoder {name!r} is neither a folder nor a model that the hub or its cache holds; check the name, "
        "or use 'local', which needs no hub."
    )


def _join(folder: str, filename: str) -> str:
    return f"{folder}/{filename}" if folder else filename


def _read_json(name: str, filename: str) -> Any:
    """Return the content of a file in a folder or hub repository, or None if there is no such file."""
    path: Path | None = Path(name) / filename
    if not Path(name).is_dir():
        try:
            found = cached_file(
                name,
                filename,
                local_files_only=not local.hub_is_reachable(),
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError:
            found = None
        path = Path(found) if found else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch or save the checkpoint again.") from error
