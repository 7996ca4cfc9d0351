"""``ragstone import`` and ``ragstone export``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ragstone.cli.app import app
from ragstone.cli.options import Device, Dtype, Json

__all__ = ["export", "import_"]


class ImportFormat(StrEnum):
    """What can be imported."""

    auto = "auto"
    legacy = "legacy"
    dataset = "dataset"
    beir = "beir"
    dpr = "dpr"
    pyserini = "pyserini"
    parquet = "parquet"


class ExportFormat(StrEnum):
    """What can be exported."""

    parquet = "parquet"
    faiss = "faiss"
    jsonl = "jsonl"


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file or folder: DPR's index, a saved Dataset, Parquet, BEIR, …")],
    kb: Annotated[Path, typer.Option("--kb", help="The knowledge base; made if it does not exist.")],
    format: Annotated[ImportFormat, typer.Option(help="What the source is.")] = ImportFormat.auto,
    index: Annotated[Path | None, typer.Option(help="The faiss file that belongs to a Dataset or Parquet.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="What made the vectors, if any; else what makes them [nobody says; else local].")
    ] = None,
    question_encoder: Annotated[
        str | None, typer.Option(help="What encodes questions, where that is another model (DPR).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Take over a collection or index of another tool. Vectors are kept; interrupt it at any time, and run it again."""
    from ragstone.cli.console import counted, err, out, print_json, progress_bar, quiet_libraries, show_skipped
    from ragstone.knowledge.exchange import import_collection

    quiet_libraries()
    with progress_bar() as progress:
        report = import_collection(
            source,
            kb,
            format=format.value,
            index=index,
            encoder=encoder,
            question_encoder=question_encoder,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if json:
        print_json(asdict(report))
        return
    how = "encoded" if report.encoded else "with the vectors they came with"
    out.print(
        f"{kb}: {counted(report.passages, 'passage')} of {source} ({report.format}), {how}, "
        f"and {report.unchanged:,} that were there already, in {report.seconds:.1f} s (version {report.version}).",
        markup=False,
    )
    for note in report.notes:
        err.print(note, soft_wrap=True, markup=False)
    show_skipped(report.skipped)


@app.command()
def export(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")],
    format: Annotated[ExportFormat | None, typer.Option(help="[as OUT ends]")] = None,
    json: Json = False,
) -> None:
    """Write all passages to Parquet (with vectors), to a faiss file with a list of ids beside it, or to JSON lines."""
    from ragstone.cli.console import counted, out, print_json, progress_bar
    from ragstone.knowledge import KnowledgeBase

    base = KnowledgeBase.open(kb)
    with progress_bar() as progress:
        report = base.export(to, format=None if format is None else format.value, progress=progress)
    if json:
        print_json(asdict(report))
    else:
        files = " and ".join(report.files)
        out.print(
            f"{files}: {counted(report.passages, 'passage')}, {report.bytes / 1e6:,.1f} MB, in {report.seconds:.1f} s.",
            markup=False,
        )
