"""`KnowledgeBase`: passages and their vectors in a folder, searchable by meaning, by words, or by both."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike

from ragstone.errors import EncoderMismatchError, InputError, KnowledgeBaseError
from ragstone.knowledge import encoding
from ragstone.knowledge.additions import PIECE, store_many
from ragstone.knowledge.checking import CheckReport, check_base
from ragstone.knowledge.checks import (
    check_count,
    check_ids,
    check_number,
    check_questions,
    check_split,
    check_vectors,
    check_version,
)
from ragstone.knowledge.codes import move_file
from ragstone.knowledge.compaction import CompactionReport, folder_bytes, remove_versions
from ragstone.knowledge.disk_index import build_disk_index
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.estimate import IndexEstimate, estimate_documents
from ragstone.knowledge.faults import full_disk
from ragstone.knowledge.history import Version
from ragstone.knowledge.indexing import IndexReport, Progress, index_documents
from ragstone.knowledge.info import KnowledgeBaseInfo, describe
from ragstone.knowledge.leases import choosing
from ragstone.knowledge.manifest import MANIFEST_FILE, PASSAGES_FOLDER, STAGING_FOLDER, Manifest, check_new, write_lock
from ragstone.knowledge.memory import parse_memory
from ragstone.knowledge.passages import Passage, SplitOptions, iter_passages
from ragstone.knowledge.reencoding import reencode_passages
from ragstone.knowledge.repairing import repair_base, restore_version
from ragstone.knowledge.search import DenseWay, Hit, Searcher, SearchMethod, SearchOptions
from ragstone.knowledge.selftest import SelfTest
from ragstone.knowledge.snapshot import Snapshot
from ragstone.knowledge.storage import PassageStore, passage_table
from ragstone.knowledge.workers import Workers, check_workers

if TYPE_CHECKING:
    from ragstone.knowledge.exchange.chunks import Source
    from ragstone.knowledge.exchange.exporting import ExportFormat, ExportReport
    from ragstone.knowledge.exchange.importing import ImportReport

__all__ = ["KnowledgeBase"]

PassageLike = Passage | str | Mapping[str, Any]


class KnowledgeBase:
    """Stored passages and their vectors, searchable. `create` makes one, `open` opens one.

    Every write is one commit, whole or not at all, and makes a version. One process writes at a time; any number read,
    and each goes on reading the version it opened until it calls `refresh`.

    >>> import tempfile
    >>> kb = KnowledgeBase.create(tempfile.mkdtemp(), encoder=None, width=2)
    >>> kb.add(["north", "east"], vectors=[[0, 1], [1, 0]])
    2
    >>> [(hit.passage.text, hit.score) for hit in kb.search(vectors=[3, 4])]
    [('north', 4.0), ('east', 3.0)]
    """

    def __init__(
        self, snapshot: Snapshot, *, read_only: bool = False, wait: float = 0.0, memory: int | str | None = None
    ) -> None:
        self.path = snapshot.folder
        self._snapshot = snapshot
        self._read_only = read_only
        self._wait = wait
        self._searcher = Searcher(self.path, snapshot.manifest.id, parse_memory(memory))

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        encoder: str | Path | TextEncoder | None = "local",
        question_encoder: str | Path | TextEncoder | None = None,
        width: int | None = None,
        device: Any = None,
        dtype: Any = None,
        wait: float = 0.0,
        memory: int | str | None = None,
    ) -> KnowledgeBase:
        """Make a knowledge base in the folder ``path``, which is new or empty.

        Args:
            path: the folder.
            encoder: what makes the vectors: "local", the name or folder of an encoder, or an `Encoder`. None: vectors
                are always given.
            question_encoder: what makes the vectors of questions, where that is another model, as for DPR.
            width: D, needed without an encoder.
            device: where the encoder runs.
            dtype: what the encoder computes in.
            wait: seconds that a write waits for another process to finish its own.
            memory: what search structures may use, in bytes or as text such as "2GB"; half of the machine's by default.
        """
        folder = Path(path).absolute()  # it is used again when the process may be elsewhere
        check_new(folder)
        memory = parse_memory(memory)
        if isinstance(encoder, str | Path):
            encoder = encoding.load(encoder, None, device=device, dtype=dtype)
        if isinstance(question_encoder, str | Path):
            question_encoder = encoding.load(question_encoder, None, device=device, dtype=dtype)
        if encoder is None and width is None:
            raise InputError("encoder=None needs the width of the vectors that will be given, for example width=768")
        if encoder is not None and width not in (None, encoder.width):
            raise InputError(f"width={width}, but the encoder's vectors have width {encoder.width}; leave width out")
        if question_encoder is not None and question_encoder.width != (width if encoder is None else encoder.width):
            raise InputError(
                f"question_encoder= has vectors of width {question_encoder.width}, unlike those of passages"
            )
        manifest = Manifest(
            width=check_count("width", width if encoder is None else encoder.width),
            encoder=None if encoder is None else encoder.spec.to_dict(),
            question_encoder=None if question_encoder is None else question_encoder.spec.to_dict(),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with write_lock(folder, wait):
                check_new(folder)
                shutil.rmtree(folder / PASSAGES_FOLDER, ignore_errors=True)
                store = PassageStore.create(folder, manifest.width)
                manifest.write(folder)
        except OSError as error:
            raise KnowledgeBaseError(f"{folder} cannot be made: {error}") from error
        snapshot = Snapshot(folder, store, manifest, encoder, question_encoder, device=device, dtype=dtype)
        return cls(snapshot, wait=wait, memory=memory)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        version: int | str | None = None,
        encoder: str | Path | TextEncoder | None = None,
        device: Any = None,
        dtype: Any = None,
        wait: float = 0.0,
        memory: int | str | None = None,
    ) -> KnowledgeBase:
        """Open the knowledge base in the folder ``path``, at its newest version.

        Args:
            path: the folder.
            version: another version, by number or tag; such a base can only be read.
            encoder: the encoder that made the vectors, if it is loaded already or lies elsewhere now. Without it, the
                one that the manifest names is loaded when first needed.
            device: where the encoder runs.
            dtype: what the encoder computes in.
            wait: seconds that a write waits for another process to finish its own.
            memory: what search structures may use, in bytes or as text such as "2GB"; half of the machine's by default.
        """
        folder = Path(path).absolute()
        check_version(version)
        snapshot = Snapshot.open(folder, version, encoder, device=device, dtype=dtype)
        return cls(snapshot, read_only=version is not None, wait=wait, memory=memory)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Return whether the folder ``path`` holds a knowledge base."""
        return (Path(path) / MANIFEST_FILE).is_file()

    @staticmethod
    def check(path: str | Path, *, repair: bool = False, restore: int | None = None, wait: float = 0.0) -> CheckReport:
        """Verify everything in the folder ``path``: all files of all versions, the newest rows, what is derived of them.

        Args:
            path: the folder.
            repair: make anew what can be made anew: keyword index, codes, checksums, the manifest from its copy. No
                passage is removed.
            restore: first make this version, which must be whole, the newest again.
            wait: seconds that a repair waits for another process to finish writing.
        """
        folder = Path(path)
        if not repair and restore is None:
            return check_base(folder)
        with write_lock(folder, wait), full_disk(folder):
            done = () if restore is None else (restore_version(folder, restore),)
            report = repair_base(folder) if repair else check_base(folder)
        return replace(report, repaired=(*done, *report.repaired))

    def __repr__(self) -> str:
        return f"KnowledgeBase({str(self.path)!r}, version={self.version}, passages={len(self)})"

    def __len__(self) -> int:
        return len(self._store)

    def __bool__(self) -> bool:
        """Return True: an empty base is a base, so that ``if knowledge_base:`` asks whether there is one."""
        return True

    @property
    def version(self) -> int:
        """The version that is read."""
        return self._store.version

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self._snapshot.width

    @property
    def has_encoder(self) -> bool:
        """Whether the base makes its vectors itself; false where they are always given."""
        return self._snapshot.has_encoder

    @property
    def encoder_spec(self) -> dict[str, Any] | None:
        """The fields of the ``EncoderSpec`` of what made the vectors that are read; None where they were given."""
        return self._manifest.encoder

    @property
    def encoder(self) -> TextEncoder:
        """What makes the vectors, loaded at first use."""
        return self._snapshot.encoder

    @property
    def _store(self) -> PassageStore:
        return self._snapshot.store

    @property
    def _manifest(self) -> Manifest:
        return self._snapshot.manifest

    def check_same_encoder(self, other: KnowledgeBase) -> None:
        """Raise EncoderMismatchError unless question vectors for ``other`` find their passages here too.

        Where the vectors of one of the two were given, nothing but their width can be compared.
        """
        spec = other._manifest.encoder
        if spec is None or self._manifest.encoder is None:
            spec = {**(self._manifest.encoder or {}), "name": "the encoder of given vectors", "width": other.width}
        self._manifest.check_encoder(spec, self.path)

    def versions(self) -> list[Version]:
        """Return every version that can be opened, oldest first."""
        with choosing(self.path):  # listing them reads each one's manifest
            return self._store.history.versions()

    def tags(self) -> dict[str, int]:
        """Return the versions that have names, by name."""
        return self._store.history.tags()

    def tag(self, name: str, *, move: bool = False) -> None:
        """Name the version that is read, so that `open` finds it by name and compaction keeps it.

        A name that another version has is refused, unless it is to ``move`` here.
        """
        with write_lock(self.path, self._wait):
            self._store.history.tag(name, self.version, move=move)

    def untag(self, name: str) -> None:
        """Take a name away from its version, which compaction may remove from then on."""
        with write_lock(self.path, self._wait):
            self._store.history.untag(name)

    def refresh(self) -> None:
        """Move on to the newest version, and to its encoder."""
        self._snapshot = self._snapshot.newest()

    def info(self) -> KnowledgeBaseInfo:
        """Return what the base holds, how it was made, and how it is searched, with the self-test (see `prepare`)."""
        return describe(self.path, self._manifest, self._store, self._searcher)

    @property
    def split(self) -> SplitOptions | None:
        """How documents were split last, or will be; None: not at all."""
        return self._manifest.split

    @property
    def dense_search(self) -> DenseWay:
        """What ``search="dense"`` does at this size and memory: "exact", "quantised", "coarse" or "disk"."""
        return self._searcher.dense_way(self._store)

    def prepare(self) -> SelfTest | None:
        """Make what search by vector needs at this size, so that the first question need not, and measure it.

        That is nothing for a small base, the codes, or the index on disk, whose making is a write. What is measured is
        how much of what exact search finds is found; None where search is exact.
        """
        if self._searcher.lacks_disk_index(self._store) and not self._read_only:
            with self._writing() as snapshot:
                build_disk_index(snapshot.store, self._searcher.memory)
            self.refresh()
        return self._searcher.self_test(self._store)

    def add_documents(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        split: SplitOptions | Literal["same"] | None = "same",
        prune: bool = False,
        chunk_passages: int = 2048,
        workers: Workers = 1,
        progress: Progress | None = None,
    ) -> IndexReport:
        """Read files and folders, split them into passages, encode these and store them.

        A document that is stored as it stands is skipped, one that changed is replaced whole. What is committed stays,
        however the run ends, and the next run goes on from there.

        Args:
            paths: files and folders.
            split: how documents are split. "same": as the base's documents were last, at first into 100 words. None:
                not at all.
            prune: take out the documents that came from ``paths`` and are there no more.
            chunk_passages: how many passages are encoded and committed at once (more where a document has more).
            workers: how many processes read and encode, or the devices of each, such as ``["cuda:0", "cuda:1"]``; what
                is stored is the same. Each holds the encoder, which it loads by its name.
            progress: called as ``progress(done, total, unit)``, the unit being "files" and then "passages".
        """
        check_count("chunk_passages", chunk_passages)
        check_split(split)
        check_workers(workers)
        with self._writing() as snapshot:
            if split != "same" and split != snapshot.manifest.split:
                replace(Manifest.read(self.path), split=split).write(self.path)
                snapshot.follow()
            return index_documents(
                snapshot.store,
                lambda: snapshot.encoder,
                paths,
                split=snapshot.manifest.split,
                prune=prune,
                chunk_passages=chunk_passages,
                workers=workers,
                progress=progress,
            )

    def estimate_documents(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        split: SplitOptions | Literal["same"] | None = "same",
        workers: Workers = 1,
    ) -> IndexEstimate:
        """Return what `add_documents` would take in disk, memory and time, from a sample; nothing is written here."""
        check_split(split)
        return estimate_documents(
            paths,
            self.encoder,
            split=self._manifest.split if split == "same" else split,
            stored=self._store.documents(),
            held=len(self),
            workers=workers,
        )

    def add(self, passages: Iterable[PassageLike], vectors: ArrayLike | None = None) -> int:
        """Store new passages with their ``vectors`` (n, D), or encode them; return how many. No id may be in use."""
        return self._put(passages, vectors, replacing=False)

    def upsert(self, passages: Iterable[PassageLike], vectors: ArrayLike | None = None) -> int:
        """Store passages, new or in place of those with their ids; return how many. Of equal ids the last counts."""
        return self._put(passages, vectors, replacing=True)

    def delete(self, ids: str | Iterable[str]) -> int:
        """Remove passages; return how many there were."""
        return self._delete("id", ids)

    def delete_documents(self, document_ids: str | Iterable[str]) -> int:
        """Remove all passages of documents; return how many there were."""
        return self._delete("document_id", document_ids)

    def compact(self, keep: timedelta | None = timedelta(days=7)) -> CompactionReport:
        """Write the passages and indices anew without what was deleted, and remove versions that nobody needs.

        A version stays that was replaced less than ``keep`` ago, that has a tag, or that an open base reads, in whatever
        process. Readers go on meanwhile; they wait only while files are deleted, and only to open or `refresh`.

        Args:
            keep: how long a version stays after it was replaced. None: for ever.
        """
        if keep is not None and not isinstance(keep, timedelta):
            raise InputError(
                f"keep={keep!r} must be a timedelta, such as timedelta(days=7), or None to keep all versions"
            )
        if keep is not None and keep < timedelta():
            raise InputError(f"keep={keep} is negative; give timedelta(0) to keep nothing but what is in use")
        started, before = time.monotonic(), folder_bytes(self.path)
        removed: list[int] = []
        with self._writing() as snapshot:
            rewritten = snapshot.store.version
            snapshot.store.compact()
            self._adopt(snapshot)  # else it would hold back the version before
            if keep is not None:
                move_file(self.path, snapshot.manifest.id, snapshot.store)
                removed = remove_versions(self.path, snapshot.manifest, snapshot.store, rewritten, keep)
        return CompactionReport(
            bytes_before=before,
            bytes_after=folder_bytes(self.path),
            versions_removed=tuple(removed),
            versions_kept=len(self.versions()),
            seconds=time.monotonic() - started,
            version=self.version,
        )

    def reencode(
        self,
        encoder: str | Path | TextEncoder,
        *,
        progress: Progress | None = None,
        chunk: int = 2048,
        workers: Workers = 1,
        resume: bool = True,
    ) -> int:
        """Make the vectors of all passages anew with another encoder; return the version that has them.

        The new vectors, whose width may differ, are kept beside the old ones until all are there; then one commit puts
        them in place. Whoever reads goes on with the old vectors and the old encoder until it calls `refresh`, and an
        older version is always searched with the encoder of its own vectors. Nobody else writes meanwhile. A run that
        ends early, however it ends, changes nothing, and the next one goes on from there. Where the encoder makes the
        vectors that are stored already, only its name is taken over.

        Args:
            encoder: "local", the name or folder of an encoder, or an `Encoder`.
            progress: called as ``progress(done, total, "passages")``.
            chunk: how many passages are encoded and put aside at once.
            workers: as in `add_documents`.
            resume: go on with what an interrupted run with this encoder has put aside; False: start anew.
        """
        check_count("chunk", chunk)
        check_workers(workers)
        if isinstance(encoder, str | Path):
            device, dtype = self._snapshot.device, self._snapshot.dtype
            encoder = encoding.load(encoder, None, device=device, dtype=dtype)
        with self._writing() as snapshot:
            manifest, spec = snapshot.manifest, encoder.spec.to_dict()
            if manifest.encoder is None or manifest.difference(spec):
                reencode_passages(
                    snapshot.store, encoder, chunk=chunk, workers=workers, resume=resume, progress=progress
                )
            elif manifest.encoder != spec:
                snapshot.store.rename_encoder(spec)
            shutil.rmtree(self.path / STAGING_FOLDER, ignore_errors=True)
            snapshot.follow(encoder)
        return self.version

    def import_from(
        self, source: str | Path | Source, *, format: str = "auto", progress: Progress | None = None
    ) -> ImportReport:
        """Store the passages of another tool's collection with its own vectors, or encode them where it has none.

        Committed in chunks: a run that ends early, however it ends, keeps what it committed, and the next one goes on
        from there. The vectors must be of this base's encoder; `import_collection` checks that, and makes new bases.

        Args:
            source: a file or folder, or what `ragstone.knowledge.exchange.open_source` made of it.
            format: "auto", "legacy", "dataset", "parquet", "beir", "dpr" or "pyserini".
            progress: called as ``progress(done, total, "passages")``.
        """
        from ragstone.knowledge.exchange.importing import import_passages
        from ragstone.knowledge.exchange.sources import open_source

        opened = open_source(source, format) if isinstance(source, str | Path) else source
        with self._writing() as snapshot:
            return import_passages(snapshot.store, lambda: snapshot.encoder, opened, progress=progress)

    def export(
        self, path: str | Path, *, format: ExportFormat | None = None, progress: Progress | None = None
    ) -> ExportReport:
        """Write the passages of the version that is read to the new file ``path``, whole or not at all.

        Args:
            path: the file.
            format: "parquet": ``id``, ``title``, ``text``, ``embeddings`` and the rest. "faiss": an ``IndexFlatIP``, and
                beside it the ids of its vectors as a JSON list in ``PATH.ids.json``. "jsonl": without vectors. None: as
                the file's name ends.
            progress: called as ``progress(done, total, "passages")``.
        """
        from ragstone.knowledge.exchange.exporting import export_passages

        return export_passages(self._store, path, format, progress=progress)

    def _put(self, passages: Iterable[PassageLike], vectors: ArrayLike | None, *, replacing: bool) -> int:
        rest = iter_passages(passages)
        given = [*islice(rest, PIECE)]
        following = [*islice(rest, 1)]
        before = self._manifest
        if following:
            with self._writing() as snapshot:
                self._check_encoder_kept(before, snapshot.manifest, given=vectors is not None)
                everything = chain(given, following, rest)
                count = store_many(snapshot.store, everything, vectors, lambda: snapshot.encoder, replacing=replacing)
                snapshot.store.index_words()
            return count
        matrix = None if vectors is None else check_vectors("vectors", vectors, self.width, len(given))
        last = {passage.id: place for place, passage in enumerate(given)}
        if len(last) < len(given):
            if not replacing:
                twice = next(passage.id for place, passage in enumerate(given) if last[passage.id] != place)
                raise InputError(f"the id {twice!r} is given twice; give each passage its own, or use upsert")
            places = [*last.values()]
            given = [given[place] for place in places]
            matrix = None if matrix is None else matrix[places]
        with self._writing() as snapshot:
            store = snapshot.store
            self._check_encoder_kept(before, snapshot.manifest, given=matrix is not None)
            stored = store.find(last)
            if stored and not replacing:
                raise InputError(f"{self.path} has a passage with the id {min(stored)!r}; use upsert to replace it")
            if not given:
                return 0
            if matrix is None:
                matrix = encoding.encode_passages(snapshot.encoder, given)
            table = passage_table(given, matrix)
            if stored:
                store.merge(table)
            else:
                store.append(table)
            store.index_words()
        return len(given)

    def _delete(self, column: str, ids: str | Iterable[str]) -> int:
        wanted = check_ids(ids)
        with self._writing() as snapshot:
            return snapshot.store.delete(column, wanted)

    def _check_encoder_kept(self, before: Manifest, now: Manifest, *, given: bool) -> None:
        """Raise EncoderMismatchError if ``given`` vectors are not of the encoder that the base has by now."""
        if given and now.encoder is not None and now.difference(before.encoder or {}):
            raise EncoderMismatchError(
                f"{self.path} was re-encoded after this handle was opened; give vectors of its new encoder, or none"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Snapshot]:
        """Yield the newest version, to be written on; other threads read the one that was open until all is written."""
        if self._read_only:
            raise KnowledgeBaseError(
                f"{self.path} is open at version {self.version}, for reading only; open it without version= to write"
            )
        with write_lock(self.path, self._wait), full_disk(self.path):
            snapshot = self._snapshot.newest()
            try:
                snapshot.store.settle()
                yield snapshot
            finally:
                self._adopt(snapshot)

    def _adopt(self, snapshot: Snapshot) -> None:
        snapshot.follow()
        self._snapshot = snapshot

    def known(self, ids: str | Iterable[str]) -> set[str]:
        """Return those of ``ids`` that are ids of passages here."""
        return set(self._store.find(check_ids(ids)))

    def get(self, ids: str | Iterable[str]) -> list[Passage]:
        """Return the passages ``ids``, in that order."""
        return self._fetch(ids)[0]

    def vectors(self, ids: str | Iterable[str]) -> np.ndarray:
        """Return the vectors (n, D) float32 of the passages ``ids``, in that order."""
        return self._fetch(ids)[1]

    def _fetch(self, ids: str | Iterable[str]) -> tuple[list[Passage], np.ndarray]:
        wanted = check_ids(ids)
        self._store.verify()
        found = self._store.find(wanted)
        missing = [passage_id for passage_id in wanted if passage_id not in found]
        if missing:
            raise InputError(f"{self.path} has no passage with the id {missing[0]!r} ({len(missing)} are missing)")
        return self._store.fetch_passages(np.array([found[passage_id] for passage_id in wanted], np.uint64))

    @overload
    def search(
        self,
        questions: str,
        *,
        vectors: ArrayLike | None = None,
        k: int = 5,
        search: SearchMethod = "dense",
        where: str | None = None,
        min_score: float | None = None,
        per_document: int | None = None,
    ) -> list[Hit]: ...

    @overload
    def search(
        self,
        questions: list[str] | tuple[str, ...],
        *,
        vectors: ArrayLike | None = None,
        k: int = 5,
        search: SearchMethod = "dense",
        where: str | None = None,
        min_score: float | None = None,
        per_document: int | None = None,
    ) -> list[list[Hit]]: ...

    @overload
    def search(
        self,
        questions: None = None,
        *,
        vectors: ArrayLike,
        k: int = 5,
        search: SearchMethod = "dense",
        where: str | None = None,
        min_score: float | None = None,
        per_document: int | None = None,
    ) -> Any: ...

    def search(
        self,
        questions: str | Sequence[str] | None = None,
        *,
        vectors: ArrayLike | None = None,
        k: int = 5,
        search: SearchMethod = "dense",
        where: str | None = None,
        min_score: float | None = None,
        per_document: int | None = None,
    ) -> Any:
        """Return the ``k`` best passages, best first, equal scores by id. There are fewer if no more are found.

        Args:
            questions: a question, for a list of hits, or a list of B questions, for B lists.
            vectors: the vectors of the questions, (D,) or (B, D), so that they need not be encoded. Keyword search
                goes by the words.
            k: how many.
            search: "dense": by inner product q·d; with many passages, candidates are found by 4- or 2-bit codes and rescored
                exactly. "exact": the same by comparing all vectors. "keyword": by BM25 of title and text. "hybrid": by
                reciprocal rank fusion of dense and keyword, see `fuse`. The score is that of the way of searching.
            where: an SQL predicate that passages must fulfil, such as ``"source LIKE '%.pdf' AND page < 10"`` or
                ``"json_get_int(metadata, 'year') > 1990"``.
            min_score: leave out passages with a lower score.
            per_document: take at most so many passages of one document, the best ones; the others make room for those
                of other documents among the first 10,000.
        """
        k = check_count("k", k)
        if per_document is not None:
            per_document = check_count("per_document", per_document)
        if min_score is not None:
            min_score = check_number("min_score", min_score)
        if search not in get_args(SearchMethod):
            raise InputError(f"search={search!r} is none of {', '.join(get_args(SearchMethod))}")
        if questions is None and (vectors is None or search in ("keyword", "hybrid")):
            raise InputError(f"search={search!r} needs questions" if vectors is not None else "questions are missing")
        texts = None if questions is None else check_questions(questions)
        snapshot = self._snapshot  # another thread may call `refresh` meanwhile
        matrix = None
        if vectors is not None:
            matrix = check_vectors("vectors", vectors, snapshot.width, None if texts is None else len(texts))
        snapshot.store.verify()
        snapshot.store.check_where(where)
        if texts is not None and matrix is None and search != "keyword":
            encoded = snapshot.question_encoder.encode_questions(texts)
            matrix = check_vectors("question vectors", encoded, snapshot.width, len(texts))
        options = SearchOptions(min(k, max(1, len(snapshot.store))), search, where, min_score, per_document)
        hits = self._searcher.search(snapshot.store, texts, matrix, options)
        single = isinstance(questions, str) or (questions is None and np.ndim(vectors) == 1)  # type: ignore[arg-type]
        return hits[0] if single else hits
