"""The machine and the versions that a figure belongs to."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["describe"]


def describe() -> str:
    """One line: processor, threads, Python and the libraries that matter."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("ragstone", "torch", "transformers", "pylance"))
    return f"{_cpu()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {libraries}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
