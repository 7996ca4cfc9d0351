"""One version of a knowledge base as it is read: its passages, what describes them, and its encoder, which agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragstone.errors import EncoderMismatchError, KnowledgeBaseError, ModelError
from ragstone.knowledge import encoding
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.leases import Lease, choosing
from ragstone.knowledge.manifest import SAME_ENCODER, Manifest
from ragstone.knowledge.storage import PassageStore

__all__ = ["Snapshot"]


class Snapshot:
    """One version of the base in ``folder``, which stays on disk for as long as somebody has this object.

    Args:
        folder: the base's.
        store: the passages and vectors of the version.
        manifest: the base's; the width and encoder in it give way to those that the version's vectors name themselves.
        encoder: what made the vectors, if it is loaded already.
        question_encoder: what makes those of questions, if that is another and loaded already.
        device: where the encoder runs.
        dtype: what the encoder computes in.
        lease: one that is held, taken over if it is on the same version.
    """

    def __init__(
        self,
        folder: Path,
        store: PassageStore,
        manifest: Manifest,
        encoder: TextEncoder | None = None,
        question_encoder: TextEncoder | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        lease: Lease | None = None,
    ) -> None:
        self.folder = folder
        self.store = store
        self.manifest = manifest.at(store.width, store.encoder)
        self.device, self.dtype = device, dtype
        self._encoder = encoder
        self._question_encoder = question_encoder
        if lease is None or lease.version != store.version:
            lease = Lease(folder, store.version)
        self._lease = lease

    @classmethod
    def open(
        cls,
        folder: Path,
        version: int | str | None,
        encoder: str | Path | TextEncoder | None,
        *,
        device: Any,
        dtype: Any,
    ) -> Snapshot:
        """Open a version or tag, the newest by default, with its ``encoder`` if that is loaded or lies elsewhere now."""
        manifest = Manifest.read(folder)
        with choosing(folder):
            store = PassageStore.open(folder, manifest.width, version)
            snapshot = cls(folder, store, manifest, device=device, dtype=dtype)
        if isinstance(encoder, str | Path):
            encoder = encoding.load(encoder, snapshot.manifest.encoder, device=device, dtype=dtype)
        if encoder is not None:
            snapshot.manifest.check_encoder(encoder.spec.to_dict(), folder)
        snapshot._encoder = encoder
        return snapshot

    def newest(self) -> Snapshot:
        """Return the newest version, with the encoders of this one if they made the newest vectors too."""
        with choosing(self.folder):
            newest = Snapshot(
                self.folder,
                self.store.newest(),
                Manifest.read(self.folder),
                device=self.device,
                dtype=self.dtype,
                lease=self._lease,
            )
        newest._question_encoder = self._question_encoder
        newest._keep_encoder(self._encoder)
        return newest

    def follow(self, encoder: TextEncoder | None = None) -> None:
        """Go on to the version that the store has written since, and to ``encoder`` if that made its vectors.

        For the one who writes: nothing is removed as long as it holds the lock.
        """
        if self._lease.version != self.store.version:
            self._lease = Lease(self.folder, self.store.version)
        self.manifest = Manifest.read(self.folder).at(self.store.width, self.store.encoder)
        if encoder is not None and encoder is not self._encoder:
            self._question_encoder = None
        self._keep_encoder(encoder or self._encoder)

    def _keep_encoder(self, encoder: TextEncoder | None) -> None:
        fits = encoder is not None and self.manifest.difference(encoder.spec.to_dict(), SAME_ENCODER) is None
        self._encoder = encoder if fits else None
        if not fits:
            self._question_encoder = None

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
                raise KnowledgeBaseError(
                    f"{self.folder} was made with encoder=None; give vectors=, (n, {self.width}), or search by words "
                    "(search='keyword', --search keyword)"
                )
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

    @property
    def question_encoder(self) -> TextEncoder:
        """What makes the vectors of questions, loaded at first use: the encoder itself, unless it is one of DPR's two."""
        if self._question_encoder is None:
            place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            spec = self.manifest.question_encoder
            if spec is None:
                found = encoding.question_encoder_of(self.encoder, **place)
            else:
                found = encoding.load(spec["name"], spec, **place)
                if found.spec.to_dict()["fingerprint"] != spec["fingerprint"]:
                    raise EncoderMismatchError(
                        f"{self.folder} was made for questions of the encoder {spec['name']!r}, whose weights have changed "
                        "since; restore them, or pass vectors="
                    )
            if found is None:
                raise KnowledgeBaseError(
                    f"the passages of {self.folder} are encoded by {self.encoder.spec.name!r}, DPR's model for passages, "
                    "which is not the one for questions; make the base with question_encoder=, or pass vectors="
                )
            self._question_encoder = found
        return self._question_encoder
