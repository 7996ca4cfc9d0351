"""From files to stored passages: read, split, skip what is stored already, encode, commit in chunks.

A document is stored with a hash of its content, and all of its passages are replaced in one commit. So a run that ends
early, however it ends, leaves whole documents only, and the next run goes on with the document it had come to.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ragstone.errors import InputError
from ragstone.knowledge.documents import Document, Skipped, document_passages, find_files
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.passages import Passage, SplitOptions, content_hash
from ragstone.knowledge.storage import PassageStore, StoredDocument, passage_table
from ragstone.knowledge.workers import Workers, encode_chunks, read_documents

__all__ = ["IndexReport", "Pending", "Progress", "Reading", "index_documents"]

Progress = Callable[[int, int, str], None]
"""Called with how much is done, how much there is in all, and the unit: "files" while reading, then "passages"."""

_SPOOL_BYTES = 64 << 20


@dataclass(frozen=True)
class IndexReport:
    """What a run of indexing did.

    Attributes:
        documents: how many documents were read.
        added: how many of them are new in the base.
        updated: how many replaced an older state of themselves.
        unchanged: how many were stored already; nothing of them was encoded.
        removed: how many were taken out of the base because they are gone (``prune``).
        passages: how many passages were encoded and stored.
        skipped: the files and records that were not indexed, and why.
        seconds: how long it took.
        version: the version that the base has now.
    """

    documents: int
    added: int
    updated: int
    unchanged: int
    removed: int
    passages: int
    skipped: tuple[Skipped, ...]
    seconds: float
    version: int


@dataclass(frozen=True)
class Pending:
    """A document that is yet to be stored."""

    id: str
    content_hash: str
    passages: list[Passage]


@dataclass
class Reading:
    """One pass over the files: what they hold, and what of it is not stored as it stands."""

    stored: Mapping[str, StoredDocument]
    split: SplitOptions | None
    seen: dict[str, str | None] = field(default_factory=dict)  # document ids and their files
    passage_ids: dict[str, str] = field(default_factory=dict)  # and documents that are yet to be stored
    skipped: list[Skipped] = field(default_factory=list)
    added: int = 0
    updated: int = 0
    unchanged: int = 0

    def pending(self, files: Sequence[Path], workers: Workers, progress: Progress) -> Iterator[Pending]:
        """Yield the documents of ``files`` that are new or changed."""
        with read_documents(files, workers=workers) as contents:
            for done, (file, documents) in enumerate(zip(files, contents, strict=True), 1):
                try:
                    for document in documents:
                        if isinstance(document, Skipped):
                            self.skipped.append(document)
                        elif (pending := self.examine(document)) is not None:
                            yield pending
                except InputError as error:  # it was there when the folder was listed
                    self.skipped.append(Skipped(str(file), str(error)))
                progress(done, len(files), "files")

    def examine(self, document: Document) -> Pending | None:
        """Return ``document`` with its passages, or None if it is stored as it stands or cannot be."""
        if document.id in self.seen:
            self._skip(document.source, f"the id {document.id!r} was given before, by {self.seen[document.id]}")
            return None
        self.seen[document.id] = document.source
        hashed = content_hash(document.fingerprint, None if self.split is None else asdict(self.split))
        stored = self.stored.get(document.id)
        if stored is not None and stored.content_hash == hashed:
            self.unchanged += 1
            return None
        passages = document_passages(document, self.split)
        ids = {passage.id for passage in passages}
        if taken := ids & self.passage_ids.keys():
            self._skip(document.source, f"its passage {min(taken)!r} has the id of another document's")
            return None
        self.passage_ids |= dict.fromkeys(ids, document.id)
        self.added += stored is None
        self.updated += stored is not None
        return Pending(document.id, hashed, passages)

    def leave_alone(self, owners: Mapping[str, str | None]) -> set[str]:
        """Skip pending documents that would replace passages of others, as ``owners`` of stored ids say; return them.

        A passage of no document, imported or added by hand, gives way; a document that takes its place counts as updated.
        """
        taken = {self.passage_ids[i]: i for i, owner in owners.items() if owner not in (None, self.passage_ids[i])}
        for document_id, passage_id in taken.items():
            reason = f"its passage {passage_id!r} has the id of one of the stored document {owners[passage_id]!r}"
            self._skip(self.seen[document_id], reason)
            self.added -= document_id not in self.stored
            self.updated -= document_id in self.stored
        replacing = {self.passage_ids[i] for i in owners} - taken.keys() - self.stored.keys()
        self.added -= len(replacing)
        self.updated += len(replacing)
        self.passage_ids = {id_: document for id_, document in self.passage_ids.items() if document not in taken}
        return {*taken}

    def _skip(self, source: str | None, reason: str) -> None:
        self.skipped.append(Skipped(source or "", f"{source}: {reason}; give each its own id"))


def index_documents(
    store: PassageStore,
    load_encoder: Callable[[], TextEncoder],
    paths: str | Path | Iterable[str | Path],
    *,
    split: SplitOptions | None,
    prune: bool,
    chunk_passages: int,
    workers: Workers,
    progress: Progress | None,
) -> IndexReport:
    """Bring ``store`` up to date with the documents of ``paths``; see `KnowledgeBase.add_documents`.

    The encoder is loaded only if there is something to encode.
    """
    started = time.monotonic()
    progress = progress or (lambda done, total, unit: None)
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    reading = Reading(store.documents(), split)
    # Everything is read before anything is encoded, so that the total is known from the first passage on. What is to
    # be encoded waits in a temporary file, which is kept in memory while it is small.
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, "w+", encoding="utf-8") as spool:
        for document in reading.pending(find_files(paths), workers, progress):
            spool.write(json.dumps(asdict(document)) + "\n")
        spool.seek(0)
        owners = store.owners(reading.passage_ids)
        left = reading.leave_alone(owners)
        total, done = len(reading.passage_ids), 0

        def encoded(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total, "passages")

        chunks = _chunks((document for document in map(_unspool, spool) if document.id not in left), chunk_passages)
        with encode_chunks(chunks, _passages, load_encoder, workers=workers, encoded=encoded) as made:
            for chunk, vectors in made:
                _store(store, chunk, vectors, reading.stored, owners)
    removed = _gone(reading, paths) if prune else []
    store.delete("document_id", removed)
    store.index_words(all_rows=True)
    return IndexReport(
        documents=len(reading.seen),
        added=reading.added,
        updated=reading.updated,
        unchanged=reading.unchanged,
        removed=len(removed),
        passages=total,
        skipped=tuple(reading.skipped),
        seconds=time.monotonic() - started,
        version=store.version,
    )


def _unspool(line: str) -> Pending:
    values = json.loads(line)
    return Pending(values["id"], values["content_hash"], [Passage(**passage) for passage in values["passages"]])


def _chunks(documents: Iterable[Pending], chunk_passages: int) -> Iterator[list[Pending]]:
    """Yield whole documents in lists of at least ``chunk_passages`` passages; the last list may hold fewer."""
    chunk: list[Pending] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.passages)
        if size >= chunk_passages:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _passages(documents: Sequence[Pending]) -> list[Passage]:
    return [passage for document in documents for passage in document.passages]


def _store(
    store: PassageStore,
    documents: Sequence[Pending],
    vectors: np.ndarray,
    stored: Mapping[str, StoredDocument],
    owners: Mapping[str, str | None],
) -> None:
    """Put ``documents``, whose passages have the ``vectors`` (n, D), in the place of what is stored, in one commit.

    ``stored`` are the documents, and ``owners`` those of passages with ids of these, that there were before the run.
    """
    passages = _passages(documents)
    table = passage_table(
        passages,
        vectors,
        positions=[position for document in documents for position in range(len(document.passages))],
        content_hashes=[document.content_hash for document in documents for _ in document.passages],
    )
    replaced = [document.id for document in documents if document.id in stored]
    if replaced or not owners.keys().isdisjoint(passage.id for passage in passages):
        store.merge(table, replaced)
    else:
        store.append(table)


def _gone(reading: Reading, paths: Iterable[str | Path]) -> list[str]:
    """Return the stored documents that came from ``paths`` and are there no more. An unreadable file is not gone."""
    roots = [Path(path).expanduser().resolve() for path in paths]
    unread = [Path(skipped.path) for skipped in reading.skipped]
    return [
        document_id
        for document_id, document in reading.stored.items()
        if document_id not in reading.seen
        and document.source is not None
        and any(Path(document.source).is_relative_to(root) for root in roots)
        and not any(Path(document.source).is_relative_to(path) for path in unread)
    ]
