"""Compaction: rows and indices written anew without what was deleted, and versions removed that nobody needs.

The rows keep their ids, so what is named by them holds on. A version goes if what replaced it is older than the time to
keep, if it has no tag, and if nobody reads it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ragstone.knowledge.codes import drop_stale_files
from ragstone.knowledge.history import Version
from ragstone.knowledge.leases import leased, removing
from ragstone.knowledge.manifest import STAGING_FOLDER, Manifest, partial_manifests
from ragstone.knowledge.storage import PassageStore

__all__ = ["CompactionReport", "folder_bytes", "outdated", "remove_versions"]


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did.

    Attributes:
        bytes_before: size of the folder on disk.
        bytes_after: the same afterwards.
        versions_removed: the numbers of the versions that can be opened no more.
        versions_kept: how many can be.
        seconds: how long it took.
        version: the version that the base has now.
    """

    bytes_before: int
    bytes_after: int
    versions_removed: tuple[int, ...]
    versions_kept: int
    seconds: float
    version: int


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in ``folder``; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def outdated(
    versions: Sequence[Version], rewritten: int, spared: Collection[int], keep: timedelta, now: datetime
) -> list[int]:
    """Return the numbers of those of ``versions`` (oldest first) that may go; the newest never does.

    A version's time runs from when another replaced it, so that what was changed or deleted a day ago is there for
    the rest of ``keep``, however old it was. Those from ``rewritten`` on hold what the newest holds, so their time runs
    from when they were made.

    Args:
        versions: all there are.
        rewritten: the version that compaction wrote anew.
        spared: versions that stay in any case: tagged or leased ones.
        keep: how long a version stays.
        now: the time.
    """
    since = [
        version.created if version.number >= rewritten else replacement.created
        for version, replacement in itertools.pairwise(versions)
    ]
    return [
        version.number
        for version, start in zip(versions, since, strict=False)
        if version.number not in spared and now - start >= keep
    ]


def remove_versions(
    folder: Path, manifest: Manifest, store: PassageStore, rewritten: int, keep: timedelta
) -> list[int]:
    """Remove what is `outdated`, and what killed processes left; return the numbers of the versions removed.

    ``store`` is the newest version. To be called by the one who holds the write lock.
    """
    history = store.history
    with removing(folder):
        spared = leased(folder) | set(history.tags().values())
        going = outdated(history.versions(), rewritten, spared, keep, datetime.now())
        condemned = history.condemned() | set(going)
        # A process may be killed between the first file that goes and the last: then these are refused, not read.
        history.condemn(condemned)
        store.remove(condemned)
        history.condemn(())
    _drop_leftovers(folder, manifest, keep)
    return going


def _drop_leftovers(folder: Path, manifest: Manifest, keep: timedelta) -> None:
    """Delete what killed processes left: halves of manifests and codes, and vectors of a re-encoding given up."""
    drop_stale_files(folder, manifest.id)
    for partial in partial_manifests(folder):
        partial.unlink(missing_ok=True)
    staging = folder / STAGING_FOLDER
    times = [file.stat().st_mtime for file in staging.rglob("*")]
    if times and time.time() - max(times) >= keep.total_seconds():  # until then it may be gone on with
        shutil.rmtree(staging, ignore_errors=True)
