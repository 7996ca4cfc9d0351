"""``ragstone index``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.markup import escape

from ragstone.cli.console import err, out, print_json, progress_bar, quiet_libraries, working
from ragstone.errors import DocumentError
from ragstone.knowledge import KnowledgeBase, SplitOptions, find_files

__all__ = ["index_paths"]

SHOWN_SKIPS = 10


def index_paths(
    paths: list[Path],
    folder: Path,
    *,
    encoder: str | None,
    split: SplitOptions | Literal["same"] | None,
    prune: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Index ``paths`` into the knowledge base in ``folder``, which is made if it does not exist."""
    quiet_libraries()
    find_files(paths)  # a wrong path is said before anything is made
    with working("Loading the encoder"):
        if KnowledgeBase.exists(folder):
            base = KnowledgeBase.open(folder, encoder=encoder, device=device, dtype=dtype)
        else:
            base = KnowledgeBase.create(folder, encoder=encoder or "local", device=device, dtype=dtype)
    with progress_bar() as progress:
        report = base.add_documents(paths, split=split, prune=prune, progress=progress)
    if as_json:
        print_json(asdict(report))
    else:
        counts = f"{report.added:,} new, {report.updated:,} changed, {report.unchanged:,} unchanged"
        removed = f", {report.removed:,} removed" if report.removed else ""
        out.print(
            f"{folder}: {report.documents:,} documents ({counts}{removed}), {report.passages:,} passages encoded in "
            f"{report.seconds:.1f} s; {len(base):,} passages in all (version {base.version})."
        )
        for skipped in report.skipped[:SHOWN_SKIPS]:
            err.print(f"[yellow]skipped[/] {escape(skipped.reason)}", soft_wrap=True)
        if len(report.skipped) > SHOWN_SKIPS:
            err.print(f"… and {len(report.skipped) - SHOWN_SKIPS:,} more; --json lists them all.")
    if report.skipped and not report.documents:
        raise DocumentError(f"Nothing could be indexed: all {len(report.skipped)} inputs were skipped.")
