"""Files and folders become documents, and documents become passages."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragstone.errors import DocumentError, InputError, MissingExtraError
from ragstone.knowledge.formats import MAX_BYTES, READERS, Section
from ragstone.knowledge.manifest import PASSAGES_FOLDER
from ragstone.knowledge.passages import (
    Passage,
    SplitOptions,
    check_metadata,
    check_text,
    content_hash,
    fits,
    record_fields,
    split_text,
)
from ragstone.knowledge.records import RECORD_READERS, Record

__all__ = [
    "SUFFIXES",
    "Document",
    "Section",
    "Skipped",
    "document_passages",
    "find_files",
    "iter_documents",
    "read_file",
]

SUFFIXES = tuple(sorted([*READERS, *RECORD_READERS]))
"""The file names that are read end in one of these."""

RECORD_SLACK = 1.5
"""A record this many times as long as a passage may be still counts as one passage."""

MAX_FAULTS = 20
"""A file that begins with more unusable records than this is given up: it is no file of records."""


@dataclass(frozen=True, slots=True)
class Document:
    """A file, or one record of a file, that is split into passages.

    A record's id is its own (without one, a hash of its content, so that moved rows are recognised). A file's id is its
    absolute path with forward slashes: it is the same from any working directory, and no two files share it.
    """

    id: str
    title: str = ""
    sections: tuple[Section, ...] = ()
    source: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    is_record: bool = False

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("title", self.title), ("source", self.source or "")):
            check_text(name, value)
        for section in self.sections:
            check_text("text", section.text)
        check_metadata("metadata", self.metadata)

    @property
    def fingerprint(self) -> str:
        """Hash of all that its passages are made of: a document with a known fingerprint need not be encoded again."""
        sections = [(section.text, section.page) for section in self.sections]
        return content_hash(self.id, self.title, self.source, dict(self.metadata), self.is_record, sections)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or one record of it (``line``, from 1), that cannot be read. ``reason`` names the file and the remedy."""

    path: str
    reason: str
    line: int | None = None


def document_passages(document: Document, split: SplitOptions | None) -> list[Passage]:
    """Split a document into passages; ``split=None`` keeps each record and each page whole.

    No passage reaches over a page break, so its page is exact. A record up to half as long again as a passage may be
    stays whole, as it is written. A document of one passage gives it its id; else they are ``id#0``, ``id#1``, ….
    """
    pieces: list[tuple[str, int | None]] = []
    for section in document.sections:
        if split is None or (document.is_record and fits(section.text, int(RECORD_SLACK * split.words))):
            texts = [section.text]
        else:
            texts = split_text(section.text, split)
        pieces += [(text, section.page) for text in texts if text.strip() or document.is_record]
    ids = [document.id] if len(pieces) == 1 else [f"{document.id}#{position}" for position in range(len(pieces))]
    return [
        Passage(id_, document.title, text, document.id, document.source, page, document.metadata)
        for id_, (text, page) in zip(ids, pieces, strict=True)
    ]


def find_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the files that ``paths`` mean, absolute, sorted, each once.

    In folders, however deep, files that end in one of ``SUFFIXES`` are taken; hidden files and folders are not, nor
    knowledge bases. A symbolic link counts as what it points to. A folder that cannot be listed is returned itself, and
    so are broken links, pipes and devices: reading them says so.
    """
    if not isinstance(paths, Iterable | os.PathLike):
        raise InputError(f"paths must be a path or a list of paths, not {paths!r}")
    found: set[Path] = set()
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"a path is a string or a Path, not {path!r}")
        try:
            full = Path(path).expanduser().resolve()
            is_folder, is_file, exists = full.is_dir(), full.is_file(), full.exists()
        except (OSError, RuntimeError, ValueError) as error:
            fault = getattr(error, "strerror", None) or error
            raise InputError(
                f"{str(path)!r} cannot be followed: {fault}; give files or folders that can be read"
            ) from None
        if is_folder:
            found.update(_walk(full))
        elif is_file:
            found.add(full)
        else:
            fault = "is neither a file nor a folder" if exists else "does not exist"
            raise InputError(f"{path} {fault} (looked for {full}); give files or folders that can be read")
    return sorted(found)


def _walk(root: Path) -> Iterator[Path]:
    unlisted: list[OSError] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=unlisted.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or PASSAGES_FOLDER in subfolders:  # a symbolic link back to it, or a knowledge base
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(real, name)
            if not name.startswith(".") and file.suffix.lower() in SUFFIXES:
                yield file.resolve() if os.path.isfile(file) else file
    yield from (Path(error.filename) for error in unlisted)


def read_file(path: Path) -> Iterator[Document | Skipped]:
    """Yield a file's documents: itself, or one a record. A bad record is skipped; a bad file raises DocumentError."""
    suffix = path.suffix.lower()
    try:
        check_text(f"the name of {path}", path.as_posix())
        state = path.stat()
        if stat.S_ISDIR(state.st_mode):
            raise DocumentError(f"{path} cannot be listed; check its permissions")
        if not stat.S_ISREG(state.st_mode):
            raise DocumentError(f"{path} is a pipe, a socket or a device; give files")
        if suffix in RECORD_READERS:
            yield from _read_records(path, RECORD_READERS[suffix](path))
            _check_unchanged(path, state)
        elif suffix in READERS:
            document = _read_whole(path, state.st_size)
            _check_unchanged(path, state)
            yield document
        else:
            raise DocumentError(f"{path} is of a kind that cannot be read; readable are {' '.join(SUFFIXES)}")
    except OSError as error:
        raise DocumentError(f"{path} cannot be opened: {error.strerror or error}") from None
    except UnicodeError as error:
        raise DocumentError(f"{path} is not text: {error}; save it as UTF-8") from None


def _check_unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if any(getattr(after, name) != getattr(before, name) for name in ("st_ino", "st_size", "st_mtime_ns")):
        raise DocumentError(f"{path} changed while it was read, so it may be half old and half new; index it again")


def _read_whole(path: Path, size: int) -> Document:
    if size == 0:
        raise DocumentError(f"{path} is empty")
    if size > MAX_BYTES:
        raise DocumentError(f"{path} has {size:,} bytes; the limit is {MAX_BYTES:,}: split it, or make it JSON lines")
    extract = READERS[path.suffix.lower()](path)
    if not any(section.text.strip() for section in extract.sections):
        raise DocumentError(f"{path} holds no text")
    return Document(path.as_posix(), extract.title or path.stem, extract.sections, path.as_posix())


def _read_records(path: Path, records: Iterator[Record]) -> Iterator[Document | Skipped]:
    good = bad = 0
    for record in records:
        try:
            if record.fault:
                raise InputError(record.fault)
            fields = record_fields(record.fields)
            text = fields.pop("text")
            fields["id"] = fields["id"] or content_hash(fields["title"], text, fields["metadata"])
            document = Document(**fields, sections=(Section(text),), source=path.as_posix(), is_record=True)
        except InputError as error:
            bad += 1
            if bad > MAX_FAULTS and not good:
                raise DocumentError(
                    f"{path} has no usable record in its first {bad}, up to line {record.line}"
                ) from None
            yield Skipped(str(path), f"{path} line {record.line}: {error}", record.line)
        else:
            good += 1
            yield document
    if not good + bad:
        raise DocumentError(f"{path} holds no records")


def iter_documents(paths: str | Path | Iterable[str | Path]) -> Iterator[Document | Skipped]:
    """Yield every document of ``paths`` in the order of ``find_files``, and a Skipped for all that cannot be read."""
    for path in find_files(paths):
        try:
            yield from read_file(path)
        except (InputError, MissingExtraError) as error:
            yield Skipped(_printable(path), _printable(error))
        except Exception as error:  # one file that a reader chokes on shall not end a run of days
            yield Skipped(_printable(path), _printable(f"{path} cannot be read: {type(error).__name__}: {error}"))


def _printable(value: object) -> str:
    """Return ``str(value)`` with escapes for what is not Unicode, as a file name may be."""
    return str(value).encode(errors="backslashreplace").decode()
