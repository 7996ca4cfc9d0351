"""Collections into knowledge bases, a chunk a commit.

A run that ends early, however it ends, leaves whole chunks. The next run reads the source again, passes over what is
stored as it stands (nothing of it is encoded again) and goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragstone.errors import EncoderMismatchError, InputError
from ragstone.knowledge import encoding
from ragstone.knowledge.documents import MAX_FAULTS, Skipped
from ragstone.knowledge.encoding import TextEncoder, encode_passages
from ragstone.knowledge.exchange.chunks import Source
from ragstone.knowledge.exchange.sources import open_source
from ragstone.knowledge.indexing import Progress
from ragstone.knowledge.manifest import Manifest
from ragstone.knowledge.passages import Passage
from ragstone.knowledge.storage import PassageStore, passage_table

if TYPE_CHECKING:
    from ragstone.knowledge.base import KnowledgeBase

__all__ = ["ImportReport", "import_collection", "import_passages"]

_VECTOR_ROWS, _ENCODED_ROWS = 16_384, 2048
_SAME = 0.9  # cosine between a given vector and one of the encoder that is said to have made it; other precisions: 0.99
_SAMPLE = 8


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        source: what was imported.
        format: its format.
        passages: how many passages were stored.
        unchanged: how many were stored already, by a run before.
        encoded: whether vectors were made; otherwise those of the source were kept.
        skipped: the rows that hold no passage, and why.
        notes: what else there is to know.
        seconds: how long it took.
        version: the version that the base has now.
    """

    source: str
    format: str
    passages: int
    unchanged: int
    encoded: bool
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    seconds: float
    version: int


def import_collection(
    source: str | Path | Source,
    folder: str | Path,
    *,
    format: str = "auto",
    index: str | Path | None = None,
    encoder: str | Path | TextEncoder | None = None,
    question_encoder: str | Path | TextEncoder | None = None,
    device: Any = None,
    dtype: Any = None,
    wait: float = 0.0,
    progress: Progress | None = None,
) -> ImportReport:
    """Import a collection into the knowledge base in ``folder``, which is made if it does not exist.

    Args:
        source: its file or folder, or what `open_source` made of it.
        folder: the base's.
        format: one of `FORMATS`.
        index: see `open_source`.
        encoder: where the source has vectors, what made them: a few are checked, and the manifest names it; None: nobody
            says. Where it has none, what makes them, None being "local". A base that exists has this one already.
        question_encoder: what encodes questions, where that is another model, as for DPR, or where ``encoder`` is not
            at hand; without either, searches bring vectors.
        device: where the encoder runs.
        dtype: what the encoder computes in.
        wait: seconds to wait for another process that writes.
        progress: called as ``progress(done, total, "passages")``.
    """
    from ragstone.knowledge.base import KnowledgeBase

    opened = source if isinstance(source, Source) else open_source(source, format, index=index)
    folder = Path(folder)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "wait": wait}
    if isinstance(encoder, str | Path):
        encoder = encoding.load(encoder, None, device=device, dtype=dtype)
    if encoder is not None and opened.width is not None:
        _check_origin(opened, encoder)
    if isinstance(question_encoder, str | Path):
        question_encoder = encoding.load(question_encoder, None, device=device, dtype=dtype)
    if KnowledgeBase.exists(folder):
        _check_base(KnowledgeBase.open(folder), opened, encoder, question_encoder)
        base = KnowledgeBase.open(folder, encoder=encoder, **options)
    else:
        given = opened.width is not None and encoder is None
        base = KnowledgeBase.create(
            folder,
            encoder=None if given else encoder or "local",
            question_encoder=question_encoder,
            width=opened.width,
            **options,
        )
    return base.import_from(opened, progress=progress)


def import_passages(
    store: PassageStore, load_encoder: Callable[[], TextEncoder], source: Source, *, progress: Progress | None
) -> ImportReport:
    """Bring what ``source`` holds into ``store``; see `KnowledgeBase.import_from`."""
    started = time.monotonic()
    progress = progress or (lambda done, total, unit: None)
    if source.width not in (None, store.width):
        raise InputError(
            f"{source.path} has vectors of width {source.width}, the base's have {store.width}; import into a new base"
        )
    held = len(store) > 0
    seen: set[str] = set()
    skipped: list[Skipped] = []
    stored = done = 0
    for chunk in source.chunks(_ENCODED_ROWS if source.width is None else _VECTOR_ROWS):
        skipped += chunk.skipped
        if len(skipped) > MAX_FAULTS and not seen and not chunk.passages:
            break
        _check_ids(source, chunk.passages, seen)
        passages, vectors = chunk.passages, chunk.vectors
        if held:
            passages, vectors = _not_stored(store, source, passages, vectors)
        if passages:
            if vectors is None:
                vectors = encode_passages(load_encoder(), passages)
            store.append(passage_table(passages, vectors))
        stored += len(passages)
        done += len(chunk.passages) + len(chunk.skipped)
        progress(done, max(done, source.count), "passages")
    if not seen:
        why = f": {skipped[0].reason}" if skipped else ""
        raise InputError(f"{source.path} holds no passage that can be imported{why}")
    store.index_words()  # once: each time rewrites what is there, and until then these rows are found without it
    progress(done, done, "passages")
    return ImportReport(
        source=str(source.path),
        format=source.kind,
        passages=stored,
        unchanged=len(seen) - stored,
        encoded=source.width is None,
        skipped=tuple(skipped),
        notes=source.notes,
        seconds=time.monotonic() - started,
        version=store.version,
    )


def _check_ids(source: Source, passages: Sequence[Passage], seen: set[str]) -> None:
    """Add the ids of ``passages`` to those that were ``seen``; raise InputError at one that is there already."""
    for passage in passages:
        if passage.id in seen:
            raise InputError(f"{source.path} gives the id {passage.id!r} twice; give each passage its own")
        seen.add(passage.id)


def _not_stored(
    store: PassageStore, source: Source, passages: Sequence[Passage], vectors: np.ndarray | None
) -> tuple[Sequence[Passage], np.ndarray | None]:
    """Return those of ``passages`` that are not in ``store``; raise InputError where something else has their id."""
    found = store.find(passage.id for passage in passages)
    places = [place for place, passage in enumerate(passages) if passage.id in found]
    if not places:
        return passages, vectors
    before, their_vectors = store.fetch_passages(np.array([found[passages[i].id] for i in places], np.uint64))
    for n, place in enumerate(places):
        same = before[n] == passages[place]
        if not same or (vectors is not None and not np.array_equal(their_vectors[n], vectors[place])):
            raise InputError(
                f"the base holds another passage with the id {passages[place].id!r} than {source.path}; import it into a "
                "new base, or delete that one"
            )
    left = np.setdiff1d(np.arange(len(passages)), places)
    return [passages[i] for i in left.tolist()], None if vectors is None else vectors[left]


def _check_base(
    base: KnowledgeBase, source: Source, encoder: TextEncoder | None, question_encoder: TextEncoder | None
) -> None:
    """Raise unless ``base`` can take ``source`` with the encoders that were named for it."""
    if source.width is not None and (encoder is not None) != base.has_encoder:
        remedy = "name the encoder (--encoder) if it made both" if encoder is None else "name none"
        whose = "of an encoder" if encoder is None else "of which nobody said what made them"
        raise InputError(
            f"{base.path} holds vectors {whose}, {source.path} brings others; {remedy}, or import into a new base"
        )
    if question_encoder is not None:
        held = Manifest.read(base.path).question_encoder or {}
        if held.get("fingerprint") != question_encoder.spec.to_dict()["fingerprint"]:
            raise EncoderMismatchError(
                f"{base.path} has another encoder for questions than {question_encoder.spec.name!r}, or none; leave it out"
            )


def _check_origin(source: Source, encoder: TextEncoder) -> None:
    """Raise EncoderMismatchError unless ``encoder`` makes the vectors of the first passages of ``source``."""
    name = encoder.spec.to_dict().get("name")
    if encoder.width != source.width:
        raise EncoderMismatchError(
            f"{source.path} has vectors of width {source.width}, those of the encoder {name!r} have {encoder.width}; "
            "name the encoder that made them, or none"
        )
    chunk = next((chunk for chunk in source.chunks(_SAMPLE) if chunk.passages), None)
    if chunk is None or chunk.vectors is None:
        return
    made = encode_passages(encoder, chunk.passages)
    lengths = np.linalg.norm(made, axis=1) * np.linalg.norm(chunk.vectors, axis=1)
    cosine = float(np.median(np.einsum("nd,nd->n", made, chunk.vectors) / np.maximum(lengths, 1e-12)))
    if cosine < _SAME:
        raise EncoderMismatchError(
            f"the encoder {name!r} did not make the vectors of {source.path}: of the first {len(made)} passages it makes "
            f"others (cosine {cosine:.2f}); name the one that made them, or none"
        )
