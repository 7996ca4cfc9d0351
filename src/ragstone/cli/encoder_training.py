"""``ragstone train-encoder``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from ragstone.cli.console import counted, print_json, progress_bar, quiet_libraries
from ragstone.cli.console import out as console
from ragstone.knowledge import KnowledgeBase
from ragstone.questions import read_questions
from ragstone.training import train_encoder

__all__ = ["train"]


def train(folder: Path, questions: Path, *, encoder: str, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Train ``encoder`` on the gold passages of ``questions`` in the knowledge base ``folder``; save it in ``out``."""
    quiet_libraries()
    base = KnowledgeBase.open(folder)
    with progress_bar() as progress:
        report = train_encoder(read_questions(questions), base, encoder=encoder, out=out, progress=progress, **options)
    if as_json:
        print_json(asdict(report))
        return
    console.print(
        f"{escape(report.folder)}: learnt from {counted(report.questions, 'question')} "
        f"({counted(report.pairs, 'gold passage')}) in {report.steps:,} steps and {report.seconds:.1f} s, "
        f"mean loss {report.loss:.3f} nats."
    )
    console.print(f"Use it with: ragstone reindex {escape(str(folder))} --encoder {escape(report.folder)}")
