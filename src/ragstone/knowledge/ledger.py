"""The ledger of checksums: what each file of a Lance dataset was when it was written.

Lance does not notice a changed byte in its own files. They are written once and never changed, so a small file beside
them, ``checksums.tsv``, remembers each one's size, time and CRC-32. Its lines are only appended to; each begins with a
checksum of itself, so that one that was cut short or damaged counts for nothing: its file is unknown then, which is no
fault, and the next writer takes it up. The time is that of the inode's last change, which no program can set back.

    ragstone-checksums-1 <a name of its own>
    <checksum of the rest of the line> <size> <time in ns> <checksum of the file> <name in the dataset's folder>
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge.manifest import check_there, write_file

__all__ = [
    "LEDGER_FILE",
    "VERIFIED_BYTES",
    "Ledger",
    "VersionGuard",
    "crc_of",
    "ledger_of",
    "manifest_name",
    "version_files",
]

LEDGER_FILE = "checksums.tsv"

VERIFIED_BYTES = 128 << 20
"""So many bytes of a version, its smaller files first, are read in full when a process first opens it (some 30 ms);
the larger files only if their size or time is not that of the ledger."""

_MAGIC = b"ragstone-checksums-1 "
_NEWEST = 2**64 - 1  # Lance numbers the manifests of versions downwards from here
_FOLDERS = ("data", "_deletions")  # a transaction is in the manifest of its version too
_SHARE = 50  # looking again whether files are as they were takes at most this part of the time
_LONGEST_PAUSE = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it was written: its size in bytes, the time of its inode's last change in ns, and its CRC-32."""

    size: int
    changed: int
    checksum: int


def manifest_name(version: int) -> str:
    """Return the name of the file that holds the manifest of ``version``, in a dataset's folder."""
    return f"_versions/{_NEWEST - version:020d}.manifest"


def crc_of(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


@functools.lru_cache(maxsize=64)
def ledger_of(folder: Path) -> Ledger:
    """Return the one ledger that this process keeps of the dataset in ``folder``."""
    return Ledger(folder)


class Ledger:
    """The ledger of the Lance dataset in ``folder``. One process at a time may `record`, any number verify."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._forget(b"")

    def _forget(self, head: bytes) -> None:
        self.entries: dict[str, Entry] = {}
        self.damaged_lines = 0
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._head = head
        self._offset = len(head)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        return self  # a process keeps one of each folder

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return self.folder / LEDGER_FILE

    def refresh(self) -> None:
        """Read what was appended since the last time, or all of it if the file is another one."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    head = file.readline(100)
                    if head != self._head or os.fstat(file.fileno()).st_size < self._offset:
                        self._forget(head)
                        self.damaged_lines += not head.startswith(_MAGIC)
                    file.seek(self._offset)
                    content = file.read()
            except FileNotFoundError:
                self._forget(b"")
                return
            content = content[: content.rfind(b"\n") + 1]  # the rest is still being written
            self._offset += len(content)
            for line in content.split(b"\n"):
                if line:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            checksum, rest = line.split(b"\t", 1)
            if int(checksum, 16) != zlib.crc32(rest):
                raise ValueError
            size, changed, content, name = rest.decode().split("\t")
            self.entries[name] = Entry(int(size), int(changed), int(content, 16))
        except ValueError:
            self.damaged_lines += 1

    def record(self) -> None:
        """Take up the files that are new, drop those that are gone. Only who holds the write lock may call it."""
        with self._lock:
            self.refresh()
            present = set(self.files())
            new = {}
            for name in sorted(present - self.entries.keys()):
                path = self.folder / name
                state = path.stat()
                new[name] = Entry(state.st_size, state.st_ctime_ns, crc_of(path))
                self._verified[name] = _seen(state)
            if self._head.startswith(_MAGIC) and self.entries.keys() <= present and not self.damaged_lines:
                self._append(new)
                return
            entries = {name: entry for name, entry in self.entries.items() if name in present} | new
            write_file(self.path, _MAGIC + uuid.uuid4().hex.encode() + b"\n" + _lines(entries))
            self.refresh()

    def _append(self, entries: dict[str, Entry]) -> None:
        """Append lines, in one write so that several processes may; what was cut short before them ends first."""
        if entries:
            with self.path.open("ab") as file:
                file.write(b"\n" + _lines(entries))

    def files(self) -> Iterator[str]:
        """Yield the names of the files that are there, of all versions."""
        for name in _FOLDERS:
            yield from (f"{name}/{entry.name}" for entry in _scan(self.folder / name) if entry.is_file())
        for entry in _scan(self.folder / "_versions"):
            if entry.name.endswith(".manifest"):
                yield f"_versions/{entry.name}"
        for index in _scan(self.folder / "_indices"):
            yield from (f"_indices/{index.name}/{entry.name}" for entry in _scan(index.path) if entry.is_file())

    def names(self, wanted: Iterable[str]) -> list[str]:
        """Return ``wanted`` with the files that are known of a folder in the place of the folder, "FOLDER/"."""
        folders = {name for name in wanted if name.endswith("/")}
        inside = [name for name in self.entries if name[: name.rfind("/") + 1] in folders]
        return [name for name in wanted if name not in folders] + inside

    def fault(self, name: str, *, thorough: bool = True) -> str | None:
        """Return what is wrong with a file, or None; unless ``thorough`` it is read only if it may have changed."""
        entry, path = self.entries.get(name), self.folder / name
        try:
            state = path.stat()
            if entry is None:
                return None
            if state.st_size != entry.size:
                return f"has {state.st_size:,} bytes, not the {entry.size:,} that were written"
            if not thorough and (self._verified.get(name) == _seen(state) or state.st_ctime_ns == entry.changed):
                return None
            if crc_of(path) != entry.checksum:
                return "is not as it was written: its checksum differs"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        with self._lock:
            self._verified[name] = _seen(state)
            if state.st_ctime_ns != entry.changed:  # it was copied, and need not be read again next time
                self.entries[name] = Entry(entry.size, state.st_ctime_ns, entry.checksum)
                with contextlib.suppress(OSError):
                    self._append({name: self.entries[name]})
        return None

    def verify(self, names: Iterable[str], *, unread: int = 0) -> None:
        """Raise KnowledgeBaseError if one of the files ``names`` is missing or known to have changed.

        ``unread`` bytes of those that this process has not read in full yet are read now, smaller files first.
        """
        known = sorted(names, key=lambda name: self.entries[name].size if name in self.entries else 0)
        for name in known:
            entry = self.entries.get(name)
            thorough = entry is not None and name not in self._verified and entry.size <= unread
            unread -= entry.size if thorough and entry is not None else 0
            if problem := self.fault(name, thorough=thorough):
                check_there(self.folder.parent)
                raise KnowledgeBaseError(f"{self.folder} cannot be read: {name} {problem}; {self.remedy(name)}")

    def verify_manifest(self, version: int | None) -> None:
        """Raise KnowledgeBaseError if the manifest of ``version``, of the newest by default, is known to be damaged.

        Lance panics at some damaged manifests and believes others, so this comes before it reads one. It goes on with
        the version before where the newest manifest is missing; this does not.
        """
        self.refresh()
        name = manifest_name(self.newest() if version is None else version)
        if name in self.entries and (version is None or version in self.versions()):
            self.verify([name], unread=self.entries[name].size)

    def versions(self) -> list[int]:
        """Return the versions whose manifests are there, oldest first."""
        return sorted({_version(f"_versions/{entry.name}") for entry in _scan(self.folder / "_versions")} - {0})

    def newest(self) -> int:
        """Return the newest version, even if its manifest is missing; 0 if there is none."""
        return max([*self.versions(), *map(_version, self.entries)], default=0)

    def damaged(self) -> str | None:
        """Say which file is not as it was written, if there is one."""
        self.refresh()
        faults = ((name, self.fault(name)) for name in sorted(self.entries) if (self.folder / name).exists())
        return next((f"{name} {problem}; {self.remedy(name)}" for name, problem in faults if problem), None)

    def remedy(self, name: str) -> str:
        """Return what to do about a damaged file."""
        base = self.folder.parent
        if name.startswith("_indices/"):
            return f"`ragstone check {base} --repair` builds the keyword index anew"
        return (
            f"open an older version (version=NUMBER), restore the folder from a backup or index the documents again; "
            f"`ragstone check {base}` says which versions are whole"
        )


class VersionGuard:
    """Watches over the files of one version after another of the Lance dataset in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._ledger = ledger_of(folder)
        self._version = 0
        self._names: list[str] = []
        self._next = 0.0

    def check(self, dataset: Any) -> None:
        """Raise KnowledgeBaseError if a file of the version that ``dataset`` shows is missing or has changed.

        After the first time at most 1/50 of the time is spent on it.
        """
        start, version = time.perf_counter(), int(dataset.version)
        if self._version == version and start < self._next:
            return
        if self._version != version:
            self._ledger.refresh()
            self._names = self._ledger.names(version_files(dataset))
            self._ledger.verify(self._names, unread=VERIFIED_BYTES)
            self._version, self._next = version, start
            return
        self._ledger.verify(self._names)
        now = time.perf_counter()
        self._next = now + min(_SHARE * (now - start), _LONGEST_PAUSE)


def version_files(dataset: Any) -> list[str]:
    """Return the names of the files of the version that a Lance ``dataset`` shows; of an index, its folder with "/"."""
    names = [manifest_name(dataset.version)]
    for fragment in dataset.get_fragments():
        names += [f"data/{file.path}" for file in fragment.data_files()]
        if (deletions := fragment.deletion_file()) is not None:
            names.append(deletions)
    return names + [f"_indices/{index['uuid']}/" for index in dataset.list_indices()]


def _version(name: str) -> int:
    """Return the version whose manifest a file is, or 0."""
    number = name.removeprefix("_versions/").removesuffix(".manifest")
    return _NEWEST - int(number) if number.isdigit() else 0


def _seen(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_size, state.st_ctime_ns, state.st_ino


def _lines(entries: dict[str, Entry]) -> bytes:
    rests = (f"{e.size}\t{e.changed}\t{e.checksum:08x}\t{name}".encode() for name, e in entries.items())
    return b"".join(b"%08x\t%b\n" % (zlib.crc32(rest), rest) for rest in rests)


def _scan(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries
