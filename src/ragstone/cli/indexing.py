"""``ragstone index`` and ``ragstone reindex``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.markup import escape

from ragstone.cli.console import out, print_json, progress_bar, quiet_libraries, show_skipped, working
from ragstone.errors import DocumentError
from ragstone.knowledge import KnowledgeBase, SplitOptions, find_files

__all__ = ["index_paths", "reencode"]


def index_paths(
    paths: list[Path],
    folder: Path,
    *,
    encoder: str | None,
    split: SplitOptions | Literal["same"] | None,
    prune: bool,
    memory: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Index ``paths`` into the knowledge base in ``folder``, which is made if it does not exist."""
    quiet_libraries()
    find_files(paths)  # a wrong path is said before anything is made
    with working("Loading the encoder"):
        if KnowledgeBase.exists(folder):
            base = KnowledgeBase.open(folder, encoder=encoder, memory=memory, device=device, dtype=dtype)
        else:
            base = KnowledgeBase.create(folder, encoder=encoder or "local", memory=memory, device=device, dtype=dtype)
    with progress_bar() as progress:
        report = base.add_documents(paths, split=split, prune=prune, progress=progress)
    with working("Preparing search"):
        base.prepare()
    if as_json:
        print_json(asdict(report))
    else:
        counts = f"{report.added:,} new, {report.updated:,} changed, {report.unchanged:,} unchanged"
        removed = f", {report.removed:,} removed" if report.removed else ""
        out.print(
            f"{folder}: {report.documents:,} documents ({counts}{removed}), {report.passages:,} passages encoded in "
            f"{report.seconds:.1f} s; {len(base):,} passages in all (version {base.version})."
        )
        show_skipped(report.skipped)
    if report.skipped and not report.documents:
        raise DocumentError(f"Nothing could be indexed: all {len(report.skipped)} inputs were skipped.")


def reencode(folder: Path, encoder: str, *, device: str | None, dtype: str | None, as_json: bool) -> None:
    """Make all vectors of the knowledge base in ``folder`` anew with ``encoder``."""
    quiet_libraries()
    started = time.monotonic()
    base = KnowledgeBase.open(folder, device=device, dtype=dtype)
    before = base.version
    with progress_bar() as progress:
        base.reencode(encoder, progress=progress)
    seconds = time.monotonic() - started
    if as_json:
        values = {"version": base.version, "passages": len(base), "encoder": encoder, "width": base.width}
        print_json({**values, "changed": base.version > before, "seconds": seconds})
    elif base.version == before:
        out.print(f"{folder}: its vectors are those of {escape(encoder)} already (version {before}).")
    else:
        out.print(
            f"{folder}: {len(base):,} passages, now with vectors of {escape(encoder)} (width {base.width}), in "
            f"{seconds:.1f} s (version {base.version}; version {before} has the old ones)."
        )
