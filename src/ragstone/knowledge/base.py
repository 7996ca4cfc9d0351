"""`KnowledgeBase`: passages and their vectors in a folder, searchable by meaning, by words, or by both."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike

from ragstone.errors import EncoderMismatchError, InputError, KnowledgeBaseError
from ragstone.knowledge import encoding
from ragstone.knowledge.checks import check_count, check_ids, check_questions, check_vectors
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.estimate import IndexEstimate, estimate_documents
from ragstone.knowledge.indexing import IndexReport, Progress, index_documents
from ragstone.knowledge.info import KnowledgeBaseInfo, describe
from ragstone.knowledge.manifest import MANIFEST_FILE, PASSAGES_FOLDER, STAGING_FOLDER, Manifest, check_new, write_lock
from ragstone.knowledge.passages import Passage, SplitOptions, as_passages
from ragstone.knowledge.reencoding import reencode_passages
from ragstone.knowledge.search import Hit, Searcher, SearchMethod
from ragstone.knowledge.snapshot import Snapshot
from ragstone.knowledge.storage import PassageStore, Version, passage_table
from ragstone.knowledge.workers import Workers, check_workers

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

    def __init__(self, snapshot: Snapshot, *, read_only: bool = False, wait: float = 0.0) -> None:
        self.path = snapshot.folder
        self._snapshot = snapshot
        self._read_only = read_only
        self._wait = wait
        self._searcher = Searcher(self.path, snapshot.manifest.id)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        encoder: str | Path | TextEncoder | None = "local",
        width: int | None = None,
        device: Any = None,
        dtype: Any = None,
        wait: float = 0.0,
    ) -> KnowledgeBase:
        """Make a knowledge base in the folder ``path``, which is new or empty.

        Args:
            path: the folder.
            encoder: what makes the vectors: "local", the name or folder of an encoder, or an `Encoder`. None: vectors
                are always given.
            width: D, needed without an encoder.
            device: where the encoder runs.
            dtype: what the encoder computes in.
            wait: seconds that a write waits for another process to finish its own.
        """
        folder = Path(path)
        check_new(folder)
        if isinstance(encoder, str | Path):
            encoder = encoding.load(encoder, None, device=device, dtype=dtype)
        if encoder is None and width is None:
            raise InputError("encoder=None needs the width of the vectors that will be given, for example width=768")
        if encoder is not None and width not in (None, encoder.width):
            raise InputError(f"width={width}, but the encoder's vectors have width {encoder.width}; leave width out")
        manifest = Manifest(
            width=check_count("width", width if encoder is None else encoder.width),
            encoder=None if encoder is None else encoder.spec.to_dict(),
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
        return cls(Snapshot(folder, store, manifest, encoder, device=device, dtype=dtype), wait=wait)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        version: int | None = None,
        encoder: str | Path | TextEncoder | None = None,
        device: Any = None,
        dtype: Any = None,
        wait: float = 0.0,
    ) -> KnowledgeBase:
        """Open the knowledge base in the folder ``path``, at its newest version.

        Args:
            path: the folder.
            version: another version; such a base can only be read.
            encoder: the encoder that made the vectors, if it is loaded already or lies elsewhere now. Without it, the
                one that the manifest names is loaded when first needed.
            device: where the encoder runs.
            dtype: what the encoder computes in.
            wait: seconds that a write waits for another process to finish its own.
        """
        folder = Path(path)
        snapshot = Snapshot.open(folder, version, encoder, device=device, dtype=dtype)
        return cls(snapshot, read_only=version is not None, wait=wait)

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Return whether the folder ``path`` holds a knowledge base."""
        return (Path(path) / MANIFEST_FILE).is_file()

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

    def versions(self) -> list[Version]:
        """Return every version that can be opened, oldest first."""
        return self._store.versions()

    def refresh(self) -> None:
        """Move on to the newest version, and to its encoder."""
        self._snapshot = self._snapshot.newest()

    def info(self) -> KnowledgeBaseInfo:
        """Return what the base holds and how it was made."""
        return describe(self.path, self._manifest, self._store, self._searcher.dense_method(self._store))

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
        check_workers(workers)
        with self._writing():
            if split != "same" and split != self._manifest.split:
                replace(Manifest.read(self.path), split=split).write(self.path)
                self.refresh()
            return index_documents(
                self._store,
                lambda: self.encoder,
                paths,
                split=self._manifest.split,
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
        with self._writing():
            return self._store.delete("id", check_ids(ids))

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
        with self._writing():
            if self._manifest.encoder is None or self._manifest.difference(encoder.spec.to_dict()):
                reencode_passages(self._store, encoder, chunk=chunk, workers=workers, resume=resume, progress=progress)
            elif self._manifest.encoder != encoder.spec.to_dict():
                self._store.rename_encoder(encoder.spec.to_dict())
            shutil.rmtree(self.path / STAGING_FOLDER, ignore_errors=True)
            self._snapshot = self._snapshot.newest(encoder)
        return self.version

    def _put(self, passages: Iterable[PassageLike], vectors: ArrayLike | None, *, replacing: bool) -> int:
        given = as_passages(passages)
        matrix = None if vectors is None else check_vectors("vectors", vectors, self.width, len(given))
        last = {passage.id: place for place, passage in enumerate(given)}
        if len(last) < len(given):
            if not replacing:
                twice = next(passage.id for place, passage in enumerate(given) if last[passage.id] != place)
                raise InputError(f"the id {twice!r} is given twice; give each passage its own, or use upsert")
            places = [*last.values()]
            given = [given[place] for place in places]
            matrix = None if matrix is None else matrix[places]
        before = self._manifest
        with self._writing():
            now = self._manifest
            if matrix is not None and now.encoder is not None and now.difference(before.encoder or {}):
                raise EncoderMismatchError(
                    f"{self.path} was re-encoded after this handle was opened; give vectors of its new encoder, or none"
                )
            stored = self._store.find(last)
            if stored and not replacing:
                raise InputError(f"{self.path} has a passage with the id {min(stored)!r}; use upsert to replace it")
            if not given:
                return 0
            if matrix is None:
                matrix = encoding.encode_passages(self.encoder, given)
            table = passage_table(given, matrix)
            if stored:
                self._store.merge(table)
            else:
                self._store.append(table)
            self._store.index_words()
        return len(given)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._read_only:
            raise KnowledgeBaseError(
                f"{self.path} is open at version {self.version}, for reading only; open it without version= to write"
            )
        with write_lock(self.path, self._wait):
            self.refresh()
            self._store.settle()
            yield

    def get(self, ids: str | Iterable[str]) -> list[Passage]:
        """Return the passages ``ids``, in that order."""
        return self._fetch(ids)[0]

    def vectors(self, ids: str | Iterable[str]) -> np.ndarray:
        """Return the vectors (n, D) float32 of the passages ``ids``, in that order."""
        return self._fetch(ids)[1]

    def _fetch(self, ids: str | Iterable[str]) -> tuple[list[Passage], np.ndarray]:
        wanted = check_ids(ids)
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
    ) -> Any: ...

    def search(
        self,
        questions: str | Sequence[str] | None = None,
        *,
        vectors: ArrayLike | None = None,
        k: int = 5,
        search: SearchMethod = "dense",
        where: str | None = None,
    ) -> Any:
        """Return the ``k`` best passages, best first, equal scores by id. There are fewer if no more are found.

        Args:
            questions: a question, for a list of hits, or a list of B questions, for B lists.
            vectors: the vectors of the questions, (D,) or (B, D), so that they need not be encoded. Keyword search
                goes by the words.
            k: how many.
            search: "dense": by inner product q·d; with many passages, candidates are found by 4-bit codes and rescored
                exactly. "exact": the same by comparing all vectors. "keyword": by BM25 of title and text. "hybrid": by
                reciprocal rank fusion of dense and keyword, see `fuse`. The score is that of the way of searching.
            where: an SQL predicate that passages must fulfil, such as ``"source LIKE '%.pdf' AND page < 10"`` or
                ``"json_get_int(metadata, 'year') > 1990"``.
        """
        k = check_count("k", k)
        if search not in get_args(SearchMethod):
            raise InputError(f"search={search!r} is none of {', '.join(get_args(SearchMethod))}")
        if questions is None and (vectors is None or search in ("keyword", "hybrid")):
            raise InputError(f"search={search!r} needs questions" if vectors is not None else "questions are missing")
        texts = None if questions is None else check_questions(questions)
        snapshot = self._snapshot  # another thread may call `refresh` meanwhile
        matrix = None
        if vectors is not None:
            matrix = check_vectors("vectors", vectors, snapshot.width, None if texts is None else len(texts))
        snapshot.store.check_where(where)
        if texts is not None and matrix is None and search != "keyword":
            encoded = snapshot.encoder.encode_questions(texts)
            matrix = check_vectors("question vectors", encoded, snapshot.width, len(texts))
        hits = self._searcher.search(snapshot.store, texts, matrix, k, search, where)
        single = isinstance(questions, str) or (questions is None and np.ndim(vectors) == 1)  # type: ignore[arg-type]
        return hits[0] if single else hits
