"""The manifest of a knowledge base: a small JSON file that says what lies beside it and which encoder made the vectors.

A knowledge base is a folder::

    manifest.json      this file; written last, so a folder without one holds no knowledge base
    .manifest.json.copy   a second one, for when the first is damaged (checking.py)
    passages.lance/    every passage and its vector (storage.py)
    reencode.lance/    vectors of another encoder, while they are being made (reencoding.py)
    codes-*.tvim       quantised vectors: a cache, rebuilt when missing (codes.py)
    axes.npy           the axes along which they are
    write.lock         held by the one process that writes
    leases/            which versions are being read (leases.py)
    removing.json      versions that are being removed (history.py), while they are
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ragstone.errors import EncoderMismatchError, KnowledgeBaseError, LockedError
from ragstone.knowledge.leases import LEASES_FOLDER
from ragstone.knowledge.passages import SplitOptions

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_COPY",
    "MANIFEST_FILE",
    "PASSAGES_FOLDER",
    "SAME_ENCODER",
    "SAME_VECTORS",
    "STAGING_FOLDER",
    "Manifest",
    "check_new",
    "check_there",
    "partial_manifests",
    "write_file",
    "write_lock",
]

FORMAT = "ragstone-knowledge-base"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MANIFEST_COPY = ".manifest.json.copy"
PASSAGES_FOLDER = "passages.lance"
STAGING_FOLDER = "reencode.lance"
LOCK_FILE = "write.lock"

# What decides a passage's vector, and besides that a question's. A different length limit is the caller's choice.
SAME_VECTORS = ("fingerprint", "width", "pooling", "normalize", "template", "passage_prompt")
SAME_ENCODER = (*SAME_VECTORS, "question_prompt")
METRIC = "inner_product"


@dataclass(frozen=True)
class Manifest:
    """What a knowledge base is made of.

    Attributes:
        width: D, the width of its vectors.
        encoder: the fields of the encoder's ``EncoderSpec``, or None where vectors are always given. In the file this is
            the encoder that the base was made with; vectors that another encoder made since name it themselves, see
            `at`.
        question_encoder: the same of what encodes questions, where that is another model.
        split: how documents are split unless told otherwise; None keeps records and pages whole.
        metric: how vectors are compared; the inner product always.
        id: names this base, so that a cache copied from another is not mistaken for its own.
        created: when, in ISO 8601.
    """

    width: int
    encoder: dict[str, Any] | None = None
    question_encoder: dict[str, Any] | None = None
    split: SplitOptions | None = field(default_factory=SplitOptions)
    metric: str = METRIC
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``, whole or not at all."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        content = json.dumps({**values, "checksum": _checksum(values)}, indent=2, ensure_ascii=False).encode()
        for name in (MANIFEST_COPY, MANIFEST_FILE):
            write_file(folder / name, content)

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST_FILE) -> Manifest:
        """Read the manifest of the knowledge base in ``folder``, or its copy."""
        path = folder / name
        if not path.is_file():
            what = "is not a knowledge base: it has no manifest.json" if folder.exists() else "does not exist"
            raise KnowledgeBaseError(f"{folder} {what}; make one with KnowledgeBase.create or `ragstone index`")
        try:
            values = json.loads(path.read_bytes())
            declared, version = values["format"], int(values["format_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        if declared != FORMAT:
            raise KnowledgeBaseError(f"{path} declares the format {declared!r}, not {FORMAT!r}; give another folder")
        if version > FORMAT_VERSION:
            raise KnowledgeBaseError(
                f"{folder} has format version {version}, this Ragstone reads up to {FORMAT_VERSION}; upgrade ragstone"
            )
        if (metric := values.get("metric", METRIC)) != METRIC:
            raise EncoderMismatchError(
                f"{folder} compares vectors by {metric!r}, this Ragstone by {METRIC!r} only; make the base anew (for "
                "cosines with normalize=True), or read it with the version that wrote it"
            )
        try:
            if values.pop("checksum", None) not in (None, _checksum(values)):
                raise ValueError("its checksum differs")
            known = {name: values[name] for name in (f.name for f in fields(cls)) if name in values}
            known["width"] = int(known["width"])
            known["split"] = SplitOptions(**known["split"]) if known.get("split") else None
            return cls(**known)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    def at(self, width: int, encoder: dict[str, Any] | None) -> Manifest:
        """Return what holds for a version with vectors of ``width`` that ``encoder`` made; None: nothing re-encoded it."""
        if encoder is None:
            return self
        return replace(self, width=width, encoder=encoder, question_encoder=None)

    def difference(self, spec: Mapping[str, Any], fields: Iterable[str] = SAME_VECTORS) -> str | None:
        """Return the first of ``fields`` in which an encoder with ``spec`` differs from the base's, or None.

        By default these are what decides a passage's vector.
        """
        expected = {"width": self.width} if self.encoder is None else self.encoder
        return next((name for name in fields if name in expected and spec.get(name) != expected[name]), None)

    def check_encoder(self, spec: dict[str, Any], folder: Path) -> None:
        """Raise EncoderMismatchError unless an encoder with ``spec`` makes the vectors of this base and of its questions."""
        name = self.difference(spec, SAME_ENCODER)
        if name is None:
            return
        made_by = "given vectors" if self.encoder is None else f"the encoder {self.encoder.get('name')!r}"
        expected = self.width if self.encoder is None else self.encoder[name]
        raise EncoderMismatchError(
            f"{folder} holds vectors of {made_by} with {name} {expected!r}, but the encoder {spec.get('name')!r} has "
            f"{name} {spec.get(name)!r}; open the base with the encoder that made it, or move it to the new one with "
            "KnowledgeBase.reencode or `ragstone reindex`"
        )


def check_new(folder: Path) -> None:
    """Raise KnowledgeBaseError unless a base can be made in ``folder``: it is new, empty, or `create` was cut short."""
    if (folder / MANIFEST_FILE).is_file():
        raise KnowledgeBaseError(f"{folder} holds a knowledge base; open it with KnowledgeBase.open")
    if folder.exists() and not folder.is_dir():
        raise KnowledgeBaseError(f"{folder} is a file; give a folder")
    unfinished = {LOCK_FILE, LEASES_FOLDER}
    if not any(folder.glob(f"{PASSAGES_FOLDER}/data/*")):
        unfinished.add(PASSAGES_FOLDER)
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    others = [name for name in names if name not in unfinished and not name.startswith(f".{MANIFEST_FILE}")]
    if others:
        raise KnowledgeBaseError(
            f"{folder} is not empty: it holds {min(others)!r}; give a new folder, or empty this one"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a crash leaves the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_manifests(folder: Path) -> list[Path]:
    """Return what killed processes left of the manifest and its copy in ``folder``; the copy itself is none of it."""
    partial = [*folder.glob(f".{MANIFEST_FILE}.*"), *folder.glob(f".{MANIFEST_COPY}.*")]
    return [path for path in partial if path.name != MANIFEST_COPY]


def check_there(folder: Path) -> None:
    """Raise KnowledgeBaseError if the base in ``folder`` was moved or removed while it was open."""
    if not folder.is_dir():
        raise KnowledgeBaseError(f"{folder} is there no more: it was moved or removed; open the base where it is now")


@contextlib.contextmanager
def write_lock(folder: Path, wait: float) -> Iterator[None]:
    """Hold the right to write to the base in ``folder``, after at most ``wait`` seconds.

    The lock is the operating system's, so it ends with the process that holds it, however that ends.
    """
    from filelock import FileLock, Timeout

    check_there(folder)  # the lock would make it anew
    lock = FileLock(folder / LOCK_FILE, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        waited = f" (after {wait:g} seconds)" if wait else ""
        raise LockedError(
            f"{folder} is being written to by another process or handle{waited}; try again when that is done, or open "
            "the base with wait=SECONDS"
        ) from None
    except OSError as error:
        raise KnowledgeBaseError(f"{folder} cannot be written to: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _checksum(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _damaged(path: Path, error: Exception) -> KnowledgeBaseError:
    return KnowledgeBaseError(
        f"{path} is damaged ({type(error).__name__}: {error}); `ragstone check {path.parent} --repair` restores it from "
        "its copy, if that is whole"
    )
