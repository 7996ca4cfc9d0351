"""The verbs that read: documents in, passages and answers out. Others are in ``learning.py`` and ``maintenance.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ragstone.cli.options import (
    Beams,
    Decode,
    Device,
    Devices,
    Dtype,
    Extractive,
    Json,
    K,
    Memory,
    Method,
    ModelK,
    Search,
    SearchOption,
    VersionOption,
    Where,
    WorkerCount,
    parse_version,
)
from ragstone.errors import InputError

__all__ = ["app"]

app = typer.Typer(
    name="ragstone",
    help="Ask your own documents. Retrieval-augmented generation with exact likelihoods and the evidence behind them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" takes the [default] in a help text for markup
)


def _version(value: bool) -> None:
    if value:
        from ragstone import __version__

        typer.echo(f"ragstone {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    pass


@app.command()
def setup(json: Json = False) -> None:
    """Fetch the local default models (MiniLM and SmolLM2-135M-Instruct) and convert them once."""
    from dataclasses import asdict

    from ragstone import local
    from ragstone.cli.console import err, print_json

    done = local.setup(progress=lambda line: err.print(line))
    if json:
        print_json(asdict(done))


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders: txt md html pdf docx jsonl csv tsv parquet.")],
    kb: Annotated[Path, typer.Option("--kb", help="The knowledge base; made if it does not exist.")],
    encoder: Annotated[str | None, typer.Option(help="Name or folder of the encoder of a new base [local].")] = None,
    words: Annotated[int | None, typer.Option(min=1, help="Words a passage [100, or as the base has it].")] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Words that neighbouring passages share [0, or as the base has it].")
    ] = None,
    sentences: Annotated[
        bool | None, typer.Option("--sentences/--no-sentences", help="Cut at ends of sentences [as the base has it].")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Do not split: a record or page is a passage.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove documents that are no longer there.")] = False,
    memory: Memory = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say disk, memory and time, from a sample, and do nothing.")
    ] = False,
    workers: WorkerCount = None,
    device: Devices = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Read documents, split and encode them, and store them. Run it again to update; interrupt it at any time."""
    from ragstone.cli.indexing import index_paths

    given = {"words": words, "overlap": overlap, "sentences": sentences}
    changes = {name: value for name, value in given.items() if value is not None}
    if whole and changes:
        raise InputError(f"--whole splits nothing, so it does not go with --{' or --'.join(changes)}; leave one out")
    index_paths(
        paths,
        kb,
        encoder=encoder,
        split=None if whole else changes,
        prune=prune,
        memory=memory,
        workers=workers,
        estimate=estimate,
        device=device,
        dtype=dtype,
        as_json=json,
    )


@app.command()
def reindex(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    encoder: Annotated[str, typer.Option(help="Name or folder of the new encoder.")],
    workers: WorkerCount = None,
    device: Devices = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Make all vectors anew with another encoder. Run it again if it was interrupted: it goes on from there."""
    from ragstone.cli.indexing import reencode

    reencode(kb, encoder, workers=workers, device=device, dtype=dtype, as_json=json)


@app.command()
def search(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    question: Annotated[str, typer.Argument(help="What to look for.")],
    k: K = 5,
    how: SearchOption = Search.dense,
    where: Where = None,
    version: VersionOption = None,
    min_score: Annotated[float | None, typer.Option("--min-score", help="Leave out passages that score less.")] = None,
    per_document: Annotated[
        int | None, typer.Option("--per-document", min=1, help="At most so many passages of one document.")
    ] = None,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Find passages."""
    from ragstone.cli.asking import search_passages

    options = {"k": k, "search": how.value, "where": where, "min_score": min_score, "per_document": per_document}
    search_passages(
        kb,
        question,
        options=options,
        version=parse_version(version),
        memory=memory,
        device=device,
        dtype=dtype,
        as_json=json,
    )


@app.command()
def ask(
    kb: Annotated[str | None, typer.Argument(help="The knowledge base (left out with --passages).")] = None,
    question: Annotated[str | None, typer.Argument(help="The question; without one, ask interactively.")] = None,
    model: Annotated[str, typer.Option(help="Name or folder of a RAG model.")] = "local",
    method: Annotated[Method | None, typer.Option(help="RAG-Token or RAG-Sequence.")] = None,
    passages: Annotated[
        list[Path] | None, typer.Option("--passages", help="Read these files instead of a knowledge base; repeatable.")
    ] = None,
    k: ModelK = None,
    how: SearchOption = Search.dense,
    where: Where = None,
    version: VersionOption = None,
    decode: Annotated[Decode, typer.Option(help="For RAG-Sequence.")] = Decode.thorough,
    beams: Beams = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    extractive: Extractive = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which passages carried the answer.")] = False,
    memory: Memory = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Answer a question with the passages behind the answer."""
    from ragstone.cli.asking import answer_questions

    if passages and question is None:
        kb, question = None, kb
    if kb is None and not passages:
        raise InputError('Name a knowledge base (ragstone ask DIR "…"), or files to read with --passages.')
    options: dict[str, Any] = {"k": k, "search": how.value, "where": where, "decode": decode.value}
    if beams is not None:
        options["num_beams"] = beams
    answer_questions(
        kb,
        question,
        model=model,
        method=None if method is None else method.value,
        files=passages,
        version=parse_version(version),
        options={**options, "max_new_tokens": max_new_tokens, "extractive": extractive},
        explain=explain,
        memory=memory,
        device=device,
        dtype=dtype,
        as_json=json,
    )


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A knowledge base, or a model.")],
    memory: Memory = None,
    json: Json = False,
) -> None:
    """Say what a knowledge base or a model holds."""
    from ragstone.cli.information import show

    show(what, memory=memory, as_json=json)


@app.command()
def check(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    repair: Annotated[bool, typer.Option("--repair", help="Make anew what can be made anew.")] = False,
    restore: Annotated[int | None, typer.Option(min=1, help="Make this version the newest again.")] = None,
    json: Json = False,
) -> None:
    """Verify every file and every passage of a knowledge base. The exit code is 1 if something is wrong."""
    from ragstone.cli.checking import check_folder

    raise typer.Exit(check_folder(kb, repair=repair, restore=restore, as_json=json))


from ragstone.cli import exchange, learning, maintenance  # noqa: E402, F401  (they add their verbs)
