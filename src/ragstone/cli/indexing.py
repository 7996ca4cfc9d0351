"""``ragstone index`` and ``ragstone reindex``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from ragstone.cli.console import counted, err, out, print_json, progress_bar, quiet_libraries, show_skipped, working
from ragstone.errors import DocumentError, InputError
from ragstone.knowledge import IndexEstimate, KnowledgeBase, SplitOptions, estimate_documents, find_files
from ragstone.knowledge.documents import SUFFIXES
from ragstone.knowledge.workers import Workers

__all__ = ["index_paths", "reencode", "share_out"]


def index_paths(
    paths: list[Path],
    folder: Path,
    *,
    encoder: str | None,
    split: Mapping[str, Any] | None,
    prune: bool,
    memory: str | None,
    workers: int | None,
    estimate: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Index ``paths`` into the knowledge base in ``folder``, which is made if it does not exist.

    ``split`` changes fields of how it splits documents; None: not at all from now on.
    """
    quiet_libraries()
    find_files(paths)  # a wrong path is said before anything is made
    device, apart = share_out(device, workers)
    if estimate:
        _print_estimate(_estimate(paths, folder, encoder, split, apart, device, dtype), as_json)
        return
    with working("Loading the encoder"):
        if KnowledgeBase.exists(folder):
            base = KnowledgeBase.open(folder, encoder=encoder, memory=memory, device=device, dtype=dtype)
        else:
            base = KnowledgeBase.create(folder, encoder=encoder or "local", memory=memory, device=device, dtype=dtype)
    with progress_bar() as progress:
        options = _split(base.split, split)
        report = base.add_documents(paths, split=options, prune=prune, workers=apart, progress=progress)
    with working("Preparing search"):
        base.prepare()
    if as_json:
        print_json(asdict(report))
    else:
        counts = f"{report.added:,} new, {report.updated:,} changed, {report.unchanged:,} unchanged"
        removed = f", {report.removed:,} removed" if report.removed else ""
        out.print(
            f"{folder}: {counted(report.documents, 'document')} ({counts}{removed}), "
            f"{counted(report.passages, 'passage')} encoded in "
            f"{report.seconds:.1f} s; {counted(len(base), 'passage')} in all (version {base.version}).",
            markup=False,
        )
        if not report.documents and not report.skipped:
            err.print(f"No file of a kind that can be read was found ({', '.join(SUFFIXES)}).", style="yellow")
        show_skipped(report.skipped)
    if report.skipped and not report.documents:
        raise DocumentError(f"Nothing could be indexed: all {len(report.skipped)} inputs were skipped.")


def _split(held: SplitOptions | None, changes: Mapping[str, Any] | None) -> SplitOptions | Literal["same"] | None:
    if not changes:
        return None if changes is None else "same"
    return replace(held or SplitOptions(), **changes)


def share_out(device: str | None, workers: int | None) -> tuple[str | None, Workers]:
    """Return the device of this process, and how many workers there are or their devices.

    >>> share_out("cuda:0,cuda:1", None)
    ('cuda:0', ['cuda:0', 'cuda:1'])
    """
    devices = [name for name in (device or "").split(",") if name]
    if len(devices) < 2:
        return device, workers or 1
    count = workers or len(devices)
    if count < len(devices):
        raise InputError(
            f"--workers {count} leaves some of {device} idle; give at least {len(devices)}, or fewer devices"
        )
    return devices[0], [devices[n % len(devices)] for n in range(count)]


def _estimate(
    paths: list[Path],
    folder: Path,
    encoder: str | None,
    split: Mapping[str, Any] | None,
    workers: Workers,
    device: str | None,
    dtype: str | None,
) -> IndexEstimate:
    with working("Measuring a sample"):
        if KnowledgeBase.exists(folder):
            base = KnowledgeBase.open(folder, encoder=encoder, device=device, dtype=dtype)
            return base.estimate_documents(paths, split=_split(base.split, split), workers=workers)
        from ragstone.encoders import load_encoder

        loaded = load_encoder(encoder or "local", device=device, dtype=dtype)
        options = None if split is None else SplitOptions(**split)
        return estimate_documents(paths, loaded, split=options, workers=workers)


def _print_estimate(estimate: IndexEstimate, as_json: bool) -> None:
    if as_json:
        print_json(asdict(estimate))
        return
    rows = {
        "files": f"{estimate.files:,}",
        "documents": f"about {estimate.documents:,}",
        "passages to encode": f"about {estimate.passages:,}, vectors of width {estimate.width}",
        "disk": _size(estimate.disk_bytes),
        "memory to index": _size(estimate.memory_bytes),
        "memory to search": f"{_size(estimate.search_memory_bytes)} besides the encoder",
        "time": f"{_duration(estimate.seconds)} (reading {_duration(estimate.reading_seconds)}, encoding "
        f"{_duration(estimate.encoding_seconds)}, storing {_duration(estimate.storing_seconds)})",
        "measured on": f"{estimate.sampled_passages:,} passages of {estimate.sampled_files:,} files; nothing was written",
    }
    for name, value in rows.items():
        out.print(f"{name:>18}  {value}", soft_wrap=True)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def reencode(
    folder: Path, encoder: str, *, workers: int | None, device: str | None, dtype: str | None, as_json: bool
) -> None:
    """Make all vectors of the knowledge base in ``folder`` anew with ``encoder``."""
    quiet_libraries()
    device, apart = share_out(device, workers)
    started = time.monotonic()
    base = KnowledgeBase.open(folder, device=device, dtype=dtype)
    before = base.version
    with progress_bar() as progress:
        base.reencode(encoder, workers=apart, progress=progress)
    seconds = time.monotonic() - started
    if as_json:
        values = {"version": base.version, "passages": len(base), "encoder": encoder, "width": base.width}
        print_json({**values, "changed": base.version > before, "seconds": seconds})
    elif base.version == before:
        out.print(f"{folder}: its vectors are those of {encoder} already (version {before}).", markup=False)
    else:
        out.print(
            f"{folder}: {counted(len(base), 'passage')}, now with vectors of {encoder} (width {base.width}), in "
            f"{seconds:.1f} s (version {base.version}; version {before} has the old ones).",
            markup=False,
        )
