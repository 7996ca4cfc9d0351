"""Keys and values of passages that a causal generator has read before, kept for the next question about them.

A causal prompt begins with its passage, tokenised apart from what follows, so the keys and values of that beginning are the
same whatever is asked. They are kept by the model's weights, its adapters and the tokens of the beginning: nothing else can
change them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragstone.errors import InputError
from ragstone.generators.weights import adapters_of, weights_of

__all__ = ["DEFAULT_BYTES", "PromptStore"]

DEFAULT_BYTES = 512 * 2**20
"""Memory for the beginnings of prompts; one passage of SmolLM2-135M takes about 4 MB in bfloat16."""


class PromptStore:
    """A bounded store, in memory and optionally on disk, which drops what was not used for the longest time.

    Args:
        max_bytes: of the memory, and of the files if there is a ``folder``; 0 keeps nothing in memory.
        folder: where to keep the same on disk for later processes; a damaged file there counts as missing.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, folder: str | Path | None = None) -> None:
        if max_bytes < 0:
            raise InputError(f"max_bytes is {max_bytes}; it must not be negative.")
        self.max_bytes, self.folder = max_bytes, None if folder is None else Path(folder)
        self.hits = self.misses = self.bytes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._model: tuple[Any, str] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type[PromptStore], tuple[int, Path | None]]:
        return PromptStore, (self.max_bytes, self.folder)  # a copy begins empty

    def clear(self) -> None:
        """Forget everything that is in memory."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def names(self, model: Any, beginnings: Sequence[Sequence[int]]) -> list[str]:
        """The keys of beginnings under the present weights and adapters of ``model``."""
        version = (weights_of(model), adapters_of(model))
        if self._model is None or self._model[0] != version:
            self.clear()  # of other weights, which are not likely to come back
            self._model = version, self._fingerprint(model) if self.folder else uuid.uuid4().hex
        prefix = self._model[1]
        return [hashlib.sha256(f"{prefix} {list(tokens)}".encode()).hexdigest() for tokens in beginnings]

    @staticmethod
    def _fingerprint(model: Any) -> str:
        described = (type(model).__name__, model.config.to_json_string(), model.dtype, adapters_of(model))
        digest = hashlib.sha256(" ".join(map(str, described)).encode())
        for weight in model.parameters():
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def get(self, name: str) -> Tensor | None:
        """Keys and values (layers, 2, heads, S, ·) of a beginning, or None."""
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
        if found is None and self.folder is not None:
            path = self.folder / f"{name}.safetensors"
            try:
                found = load_file(path)["states"]
                os.utime(path)
            except (OSError, SafetensorError, KeyError):
                found = None
            if found is not None:
                self._keep(name, found)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, name: str, states: Tensor) -> None:
        """Keep ``states``, and drop others where there is no room."""
        self._keep(name, states)
        if self.folder is None:
            return
        temporary = self.folder / f".{name}-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"states": states.contiguous()}, temporary)
            os.replace(temporary, self.folder / f"{name}.safetensors")
            self._tidy()
        except OSError:  # a full or read-only disk only costs the next process some time
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _keep(self, name: str, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        with self._lock:
            if size > self.max_bytes or name in self._kept:
                return
            self._kept[name] = states
            self.bytes += size
            while self.bytes > self.max_bytes:
                dropped = self._kept.popitem(last=False)[1]
                self.bytes -= dropped.numel() * dropped.element_size()

    def _tidy(self) -> None:
        """Remove the files that were not used for the longest time, down to ``max_bytes``."""
        assert self.folder is not None
        files = [(file.stat(), file) for file in self.folder.glob("*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime):
            if total <= self.max_bytes:
                return
            file.unlink(missing_ok=True)
            total -= stat.st_size
