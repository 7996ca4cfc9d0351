"""``ragstone check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from ragstone.cli.console import counted, out, print_json, working
from ragstone.knowledge import KnowledgeBase

__all__ = ["check_folder"]


def check_folder(folder: Path, *, repair: bool, restore: int | None, as_json: bool) -> int:
    """Check the knowledge base in ``folder``; return the exit code: 0 if it is sound, 1 if not."""
    with working("Checking every file and every passage"):
        report = KnowledgeBase.check(folder, repair=repair, restore=restore)
    if as_json:
        print_json({"sound": report.sound, **asdict(report)})
        return 0 if report.sound else 1
    for done in report.repaired:
        out.print(f"[green]repaired[/] {escape(done)}", soft_wrap=True)
    for note in report.notes:
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for fault in report.faults:
        problem = escape(f"{fault.file}: {fault.problem}")
        out.print(f"[bold red]fault[/] {problem}\n      {escape(fault.remedy)}", soft_wrap=True)
    held = "passages that cannot be read" if report.passages is None else counted(report.passages, "passage")
    unknown = f", {counted(report.unknown_files, 'file')} without a checksum yet" if report.unknown_files else ""
    verdict = "sound" if report.sound else counted(len(report.faults), "fault")
    whole = counted(len(report.whole_versions), "whole version")
    out.print(
        f"{escape(str(folder))}: {verdict}; version {report.version} with {held}, {whole}, "
        f"{counted(report.files, 'file')} ({report.bytes:,} bytes) in {report.seconds:.1f} s{unknown}."
    )
    return 0 if report.sound else 1
