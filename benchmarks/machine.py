"""The machine and the versions that a figure belongs to."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

import ragstone

__all__ = ["describe"]


def describe() -> str:
    """One line: processor, GPU, threads, Python and the libraries that matter."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pylance"))
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    return f"{gpu}{_cpu()}, {threads}, ragstone {ragstone.__version__}, {libraries}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
