"""What is derived is made anew, and an older version becomes the newest. No passage is ever removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge.checking import CheckReport, FaultKind, check_base, leftovers, open_version
from ragstone.knowledge.faults import writing
from ragstone.knowledge.ledger import ledger_of, manifest_name
from ragstone.knowledge.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    PASSAGES_FOLDER,
    STAGING_FOLDER,
    Manifest,
    write_file,
)

__all__ = ["repair_base", "restore_version"]


def repair_base(folder: Path) -> CheckReport:
    """Make anew what can be made anew of the base in ``folder``, and check it again. The caller holds the write lock."""
    report = check_base(folder)
    ledger = ledger_of(folder / PASSAGES_FOLDER)
    faulty: dict[FaultKind, list[str]] = {}
    for fault in report.faults:
        faulty.setdefault(fault.kind, []).append(fault.file)
    done = []
    if "manifest" in faulty and (folder / MANIFEST_COPY).is_file():
        Manifest.read(folder, MANIFEST_COPY)
        write_file(folder / MANIFEST_FILE, (folder / MANIFEST_COPY).read_bytes())
        done.append(f"{MANIFEST_FILE} restored from its copy")
    if "keywords" in faulty and report.version in report.whole_versions:
        store = open_version(folder, report.version)
        store.rebuild_indices()
        done.append(f"keyword index built anew (version {store.version})")
    for name in faulty.get("codes", []):
        (folder / name).unlink(missing_ok=True)
        done.append(f"{name} removed; it is built anew when next needed")
    if "staging" in faulty:
        shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
        done.append(f"{STAGING_FOLDER} removed; the next re-encoding begins anew")
    for file in leftovers(folder):
        file.unlink(missing_ok=True)
        done.append(f"{file.name} removed, left by a write that did not end")
    if ("checksums" in faulty or report.unknown_files) and not faulty.keys() & {"version", "data"}:
        ledger.record()
        done.append(f"checksums taken of {report.unknown_files} files")
    return replace(check_base(folder), repaired=tuple(done))


def restore_version(folder: Path, version: int) -> str:
    """Make ``version`` the newest again, in a commit of its own; return what was done. The caller holds the write lock.

    Newer versions stay as they are; manifests of theirs that are damaged are put aside under another name.
    """
    import lance

    path = folder / PASSAGES_FOLDER
    ledger = ledger_of(path)
    report = check_base(folder)
    if version not in report.whole_versions:
        raise KnowledgeBaseError(
            f"version {version} of {folder} is not whole or not there; whole are {list(report.whole_versions)}"
        )
    for newer in [number for number in ledger.versions() if number > version]:
        if ledger.fault(manifest_name(newer)):
            file = path / manifest_name(newer)
            file.rename(file.with_suffix(".damaged"))
    ledger.record()  # its number may be given again
    for file in folder.glob("codes-*.tvim"):  # they may show a version whose number is given again
        file.unlink(missing_ok=True)
    with writing(path):
        dataset = lance.dataset(path, version=version)
        while True:  # until its number is one that no damaged version had
            dataset.restore()
            newest = lance.dataset(path).version
            if newest > report.version:
                break
            dataset = lance.dataset(path, version=version)
    return f"version {version} is the newest again, as version {newest}"
