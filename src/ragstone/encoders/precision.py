"""Which dtype an encoder computes in: measured on the machine at hand, never assumed."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ragstone import local
from ragstone.errors import InputError

__all__ = ["PROBE_TEXTS", "choose_dtype", "parse_device", "parse_dtype", "probe"]

# bfloat16 must be this many times as quick as float32, and its vectors this close to those of float32 (cosine).
MIN_SPEEDUP = 1.3
MIN_COSINE = 0.999
MOST_CORES_TAKEN = 0.2
"""Share of the cores that other processes may have had meanwhile, for what was measured to be kept."""
# What the probe runs on: as long as usual passages, and equally long, so that nothing is padded.
PROBE_TEXTS = [
    "The city lies where two rivers meet, and its oldest bridge was built in 1327 by masons from the coast. Trade in "
    "wool, salt and glass made it rich; a fire in 1642 destroyed most of the wooden houses, after which only stone was "
    "allowed. Its university, founded by a mathematician, taught astronomy before it taught law. Today about 240,000 "
    "people live there, most of them employed in shipping, medicine and the making of small electric motors."
] * 4
_ROUNDS = 3
_STAT = Path("/proc/stat")
_PATIENCE = 2.0  # seconds after which no further round starts


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of ``"float32"``, ``"bfloat16"`` or ``"float16"``, and None for None or ``"auto"``.

    Raises:
        InputError: it is none of these.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"The dtype {dtype!r} is unknown; choose 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a device by its name; by default CUDA if there is a device, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"The device {str(device)!r} cannot be used here ({reason}); 'cpu' always can.") from None
    return found


def choose_dtype(
    model: PreTrainedModel, run: Callable[[PreTrainedModel], Tensor], fingerprint: str, device: torch.device
) -> torch.dtype:
    """Return bfloat16 where it pays for this model on ``device``, else float32.

    A CUDA device that supports bfloat16 takes it. On a CPU `probe` decides, once for each model and machine: the answer
    is kept in the cache folder, so that later processes start without it, unless other work disturbed the measurement.

    Args:
        model: the model in float32, on the CPU.
        run: gives the vectors (B, D) of a small batch.
        fingerprint: of the model's weights.
        device: where the model is going to run.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    key = "\n".join((fingerprint, torch.__version__, str(torch.get_num_threads()), _processor()))
    note = local.cache_folder() / "precision" / hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        kept = note.read_text()
    except OSError:
        kept = ""
    if kept in ("bfloat16", "float32"):
        return torch.bfloat16 if kept == "bfloat16" else torch.float32
    before = _work_of_others()
    started = time.perf_counter()
    speedup, cosine = probe(model, run)
    taken = (_work_of_others() - before) / max(time.perf_counter() - started, 0.5)  # counted in 1/100 s
    chosen = torch.bfloat16 if speedup >= MIN_SPEEDUP and cosine > MIN_COSINE else torch.float32
    if taken < MOST_CORES_TAKEN * (os.cpu_count() or 1):
        _write(note, str(chosen).removeprefix("torch."))
    return chosen


@torch.inference_mode()
def probe(model: PreTrainedModel, run: Callable[[PreTrainedModel], Tensor]) -> tuple[float, float]:
    """Return how many times as quick bfloat16 is as float32, and the least cosine between their vectors.

    The two run in turn and the best time of each counts, which other work on the machine disturbs least.
    """
    half = copy.deepcopy(model).to(torch.bfloat16)
    seconds = {False: float("inf"), True: float("inf")}
    vectors: dict[bool, Tensor] = {}
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        for is_half, candidate in ((False, model), (True, half)):
            start = time.perf_counter()
            vectors[is_half] = run(candidate)
            seconds[is_half] = min(seconds[is_half], time.perf_counter() - start)
        if time.perf_counter() - started > _PATIENCE:
            break
    cosine = F.cosine_similarity(vectors[False], vectors[True], dim=-1).min().item()
    return seconds[False] / seconds[True], cosine


def _work_of_others() -> float:
    """Return the seconds that all cores together have worked for other processes; 0 where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split("\n")[0].split()[1:])
        own = os.times()
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system
    except (OSError, ValueError, AttributeError):
        return 0.0


def _processor() -> str:
    """Return a description of the CPU that tells models with and without quick bfloat16 apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(next(line for line in lines if line.startswith(key)) for key in ("model name", "flags"))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _write(note: Path, text: str) -> None:
    """Write ``text`` in one step; a cache folder that cannot be written only costs the next process a probe."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, note)
    except OSError:
        pass
