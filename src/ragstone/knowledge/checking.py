"""Is a knowledge base sound? Every file against its checksum, every row, what is derived against what it derives from."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import codes
from ragstone.knowledge.faults import reading
from ragstone.knowledge.ledger import Ledger, ledger_of, manifest_name, version_files
from ragstone.knowledge.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    PASSAGES_FOLDER,
    STAGING_FOLDER,
    Manifest,
    partial_manifests,
)
from ragstone.knowledge.storage import PassageStore, passage_table

__all__ = ["CheckReport", "Fault", "FaultKind", "check_base", "leftovers", "open_version"]

FaultKind = Literal["manifest", "checksums", "version", "data", "rows", "keywords", "codes", "staging"]
"""Which part is at fault. All but a version, its data and its rows can be made again from what is there."""

_SAMPLE = 32  # passages by which the keyword index is tried
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a knowledge base.

    Attributes:
        kind: which part of it is at fault.
        file: the file or folder, as seen from the base's folder.
        problem: what is wrong with it.
        remedy: what to do.
        versions: the versions that it spoils; none if it spoils no passage of any.
    """

    kind: FaultKind
    file: str
    problem: str
    remedy: str
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What a check of a knowledge base found.

    Attributes:
        path: its folder.
        version: the newest version.
        passages: how many passages that holds; None if it cannot be read.
        whole_versions: the versions of which nothing is damaged, oldest first.
        files: how many files were compared with their checksums.
        bytes: how much was read for that.
        unknown_files: how many files have no checksum yet: the last writer was killed, or the base is an old one.
        faults: what is wrong, and still is after a repair.
        repaired: what the repair did.
        notes: what is no fault but good to know.
        seconds: how long it took.
    """

    path: str
    version: int
    passages: int | None
    whole_versions: tuple[int, ...]
    files: int
    bytes: int
    unknown_files: int
    faults: tuple[Fault, ...]
    repaired: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def check_base(folder: Path) -> CheckReport:
    """Verify the knowledge base in ``folder``: what `KnowledgeBase.check` does without repairing."""
    started = time.monotonic()
    path = folder / PASSAGES_FOLDER
    if not path.is_dir():
        Manifest.read(folder)
        raise KnowledgeBaseError(f"{path} does not exist: the passages are gone; restore the folder from a backup")
    ledger = ledger_of(path)
    ledger.refresh()
    faults = [*_manifest_faults(folder), *_ledger_faults(ledger)]
    holders, unreadable = _holders(ledger)
    damaged = {name: problem for name in sorted(holders) if (problem := ledger.fault(name)) is not None}
    spoilt = unreadable.keys() | {v for name in damaged if not name.startswith("_indices/") for v in holders[name]}
    versions = sorted({*ledger.versions(), *unreadable})
    newest = versions[-1] if versions else 0
    whole = tuple(version for version in versions if version not in spoilt)
    remedy = _version_remedy(folder, newest, whole)
    faults += [
        Fault("version", f"{PASSAGES_FOLDER}/{manifest_name(version)}", problem, remedy, (version,))
        for version, problem in sorted(unreadable.items())
    ]
    notes = []
    for name, problem in damaged.items():
        concerned, file = tuple(sorted(holders[name])), f"{PASSAGES_FOLDER}/{name}"
        if not name.startswith("_indices/"):
            faults.append(Fault("data", file, problem, remedy, concerned))
        elif newest in concerned:
            faults.append(Fault("keywords", file, problem, _repair_remedy(folder), concerned))
        else:
            notes.append(f"{file} {problem}; the versions {_listed(concerned)}, all old, cannot be searched by words")
    passages = None
    if newest in whole:
        with reading(path):
            store = open_version(folder, newest)
            passages = len(store)
            faults += _row_faults(store)
            if not any(newest in fault.versions for fault in faults):
                faults += _derived_faults(folder, store)
    faults += _staging_faults(folder)
    if stale := leftovers(folder):
        size = sum(file.stat().st_size for file in stale)
        notes.append(f"{len(stale)} files ({size:,} bytes) of writes that did not end; --repair removes them")
    return CheckReport(
        path=str(folder),
        version=newest,
        passages=passages,
        whole_versions=whole,
        files=len(ledger.entries),
        bytes=sum(entry.size for name, entry in ledger.entries.items() if name in holders),
        unknown_files=len(holders.keys() - ledger.entries.keys()),
        faults=tuple(faults),
        repaired=(),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def open_version(folder: Path, version: int) -> PassageStore:
    """Open a version without looking whether its files are as they were written."""
    import lance

    path = folder / PASSAGES_FOLDER
    return PassageStore(path, lance.dataset(path, version=version))


def _holders(ledger: Ledger) -> tuple[dict[str, set[int]], dict[int, str]]:
    """Return the files of all versions with the versions that need each; and the versions that cannot be read."""
    import lance

    holders: dict[str, set[int]] = {}
    unreadable: dict[int, str] = {}
    there = ledger.versions()
    if (newest := ledger.newest()) not in there and newest:
        unreadable[newest] = "is missing"
    for version in there:
        name = manifest_name(version)
        if problem := ledger.fault(name):
            unreadable[version] = problem
            continue
        try:
            with reading(ledger.folder):
                names = ledger.names(version_files(lance.dataset(ledger.folder, version=version)))
        except KnowledgeBaseError as error:
            unreadable[version] = f"cannot be read: {error}"
            continue
        for name in names:
            holders.setdefault(name, set()).add(version)
    return holders, unreadable


def _manifest_faults(folder: Path) -> Iterator[Fault]:
    try:
        Manifest.read(folder)
    except KnowledgeBaseError as error:
        copied = (folder / MANIFEST_COPY).is_file()
        remedy = _repair_remedy(folder) if copied else "restore it from a backup"
        yield Fault("manifest", MANIFEST_FILE, str(error), remedy)


def _ledger_faults(ledger: Ledger) -> Iterator[Fault]:
    if ledger.damaged_lines:
        problem = f"has {ledger.damaged_lines} damaged lines; what they say of files is not known"
        yield Fault("checksums", f"{PASSAGES_FOLDER}/{ledger.path.name}", problem, _repair_remedy(ledger.folder.parent))


def _row_faults(store: PassageStore) -> Iterator[Fault]:
    """Yield what is wrong with the rows of a version."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids, missing, unreadable, infinite = [], 0, 0, 0
    for batch in store.batches(["id", "title", "text", "metadata"]):
        ids.append(batch["id"])
        missing += sum(batch[name].null_count for name in ("id", "title", "text"))
        unreadable += sum(not _is_mapping(value) for value in batch["metadata"].to_pylist())
    for _, vectors in store.vectors():
        infinite += int((~np.isfinite(vectors).all(axis=1)).sum())
    column = pa.chunked_array(ids, pa.string())
    repeated = len(column) - pc.count_distinct(column).as_py()
    for count, problem in (
        (abs(len(store) - len(column)), "rows are counted but not there"),
        (repeated, "rows have the id of another"),
        (missing, "ids, titles or texts are missing"),
        (unreadable, "rows have metadata that is no JSON object"),
        (infinite, "vectors are not finite"),
    ):
        if count:
            remedy = "store these passages again with upsert, or go back to an older version"
            yield Fault("rows", PASSAGES_FOLDER, f"{count:,} {problem}", remedy, (store.version,))


def _is_mapping(value: str | None) -> bool:
    try:
        return value is None or isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _derived_faults(folder: Path, store: PassageStore) -> Iterator[Fault]:
    remedy = _repair_remedy(folder)
    try:
        agrees = _keywords_agree(store)
    except KnowledgeBaseError as error:
        yield Fault("keywords", f"{PASSAGES_FOLDER}/_indices", str(error), remedy, (store.version,))
    else:
        if not agrees:
            problem = "finds other passages by words than have them"
            yield Fault("keywords", f"{PASSAGES_FOLDER}/_indices", problem, remedy, (store.version,))
    for file, problem in codes.code_faults(folder, store):
        yield Fault("codes", file.name, problem, f"it is built anew when next needed, or now: {remedy}")


def _keywords_agree(store: PassageStore) -> bool:
    """Return whether the keyword index finds, in a sample, what an index made of that sample alone finds."""
    row_ids = store.row_ids()
    chosen = np.random.default_rng(0).choice(row_ids, min(_SAMPLE, len(row_ids)), replace=False)
    if not len(chosen):
        return True
    passages, _ = store.fetch_passages(chosen)
    passages = list({passage.id: passage for passage in passages}.values())
    with tempfile.TemporaryDirectory() as other:
        reference = PassageStore.create(Path(other), 1)
        reference.append(passage_table(passages, np.zeros((len(passages), 1), np.float32)))
        ids = [passage.id for passage in passages]
        for passage in passages:
            question = " ".join(f"{passage.title} {passage.text[:2000]}".split()[:20])
            found = store.search_words_among(question, ids)
            if question and set(found) != set(reference.search_words_among(question, ids)):
                return False
    return True


def _staging_faults(folder: Path) -> Iterator[Fault]:
    staging = folder / STAGING_FOLDER
    if staging.exists():
        ledger = ledger_of(staging)
        ledger.refresh()
        for name in sorted(ledger.entries):
            if problem := ledger.fault(name):
                remedy = f"the next `ragstone reindex` begins anew, or: {_repair_remedy(folder)}"
                yield Fault("staging", f"{STAGING_FOLDER}/{name}", problem, remedy)


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files of writes that were killed at least an hour ago."""
    hidden = [*folder.glob(".codes.*"), *partial_manifests(folder), *folder.glob(f"{PASSAGES_FOLDER}/.*")]
    latest = time.time() - _STALE_SECONDS
    return [file for file in hidden if file.is_file() and file.stat().st_mtime < latest]


def _repair_remedy(folder: Path) -> str:
    return f"`ragstone check {folder} --repair` makes it anew"


def _version_remedy(folder: Path, newest: int, whole: Iterable[int]) -> str:
    if not (older := [version for version in whole if version < newest]):
        return "no older version is whole: restore the folder from a backup or index the documents again"
    if newest in whole:
        return "the newest version is whole; restore the folder from a backup if you need the old one"
    return (
        f"version {older[-1]} is whole: open it with version={older[-1]}, or make it the newest again with `ragstone "
        f"check {folder} --restore {older[-1]}`"
    )


def _listed(versions: Iterable[int]) -> str:
    numbers = list(versions)
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else " and ".join(map(str, numbers))
