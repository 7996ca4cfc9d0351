"""One version of a knowledge base as it is read: its passages, what describes them, and its encoder, which agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragstone.errors import KnowledgeBaseError, ModelError
from ragstone.knowledge import encoding
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.manifest import SAME_ENCODER, Manifest
from ragstone.knowledge.storage import PassageStore

__all__ = ["Snapshot"]


class Snapshot:
    """One version of the base in ``folder``.

    Args:
        folder: the base's.
        store: the passages and vectors of the version.
        manifest: the base's; the width and encoder in it give way to those that the version's vectors name themselves.
        encoder: what made the vectors, if it is loaded already.
        device: where the encoder runs.
        dtype: what the encoder computes in.
    """

    def __init__(
        self,
        folder: Path,
        store: PassageStore,
        manifest: Manifest,
        encoder: TextEncoder | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.folder = folder
        self.store = store
        self.manifest = manifest.at(store.width, store.encoder)
        self.device, self.dtype = device, dtype
        self._encoder = encoder

    @classmethod
    def open(
        cls, folder: Path, version: int | None, encoder: str | Path | TextEncoder | None, *, device: Any, dtype: Any
    ) -> Snapshot:
        """Open a version, the newest one by default, with its ``encoder`` if that is loaded or lies elsewhere now."""
        manifest = Manifest.read(folder)
        snapshot = cls(folder, PassageStore.open(folder, manifest.width, version), manifest, device=device, dtype=dtype)
        if isinstance(encoder, str | Path):
            encoder = encoding.load(encoder, snapshot.manifest.encoder, device=device, dtype=dtype)
        if encoder is not None:
            snapshot.manifest.check_encoder(encoder.spec.to_dict(), folder)
        snapshot._encoder = encoder
        return snapshot

    def newest(self, encoder: TextEncoder | None = None) -> Snapshot:
        """Return the newest version, with ``encoder`` or that of this version if it made the newest vectors too."""
        held = encoder or self._encoder
        newest = Snapshot(
            self.folder, self.store.newest(), Manifest.read(self.folder), device=self.device, dtype=self.dtype
        )
        if held is not None and newest.manifest.difference(held.spec.to_dict(), SAME_ENCODER) is None:
            newest._encoder = held
        return newest

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.manifest.width

    @property
    def has_encoder(self) -> bool:
        """Whether the vectors can be made here; false where they are always given."""
        return self._encoder is not None or self.manifest.encoder is not None

    @property
    def encoder(self) -> TextEncoder:
        """What made the vectors, loaded at first use."""
        if self._encoder is None:
            spec = self.manifest.encoder
            if spec is None:
                raise KnowledgeBaseError(f"{self.folder} was made with encoder=None; give vectors=, (n, {self.width})")
            try:
                encoder = encoding.load(spec["name"], spec, device=self.device, dtype=self.dtype)
            except ModelError as error:
                raise ModelError(
                    f"{self.folder} needs the encoder {spec['name']!r}: {error} If it lies elsewhere now, open the base "
                    "with encoder=FOLDER."
                ) from error
            self.manifest.check_encoder(encoder.spec.to_dict(), self.folder)
            self._encoder = encoder
        return self._encoder
