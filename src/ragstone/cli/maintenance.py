"""The verbs that keep a knowledge base in order: ``compact``, ``tag``, ``delete``."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ragstone.cli.app import app
from ragstone.cli.console import SHOWN_SKIPS, counted, err, out, print_json, working
from ragstone.cli.options import Json, VersionOption, parse_version
from ragstone.errors import InputError

__all__ = ["compact", "delete", "parse_duration", "tag"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str) -> timedelta | None:
    """Return the time that ``7d``, ``12h`` or the like says; None for ``all``."""
    if text == "all":
        return None
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if match is None:
        raise InputError(f"--keep {text!r} is no time; write a number and s, m, h, d or w, such as 7d, or all")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@app.command()
def compact(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    keep: Annotated[str, typer.Option(help="How long a version stays that was replaced: 12h, 7d, 4w; or all.")] = "7d",
    json: Json = False,
) -> None:
    """Write the files anew without what was deleted, and remove old versions that have no tag and no reader."""
    from ragstone.knowledge import KnowledgeBase

    duration = parse_duration(keep)
    base = KnowledgeBase.open(kb)
    with working("Compacting"):
        report = base.compact(duration)
    if json:
        print_json(asdict(report))
        return
    out.print(
        f"{kb}: {report.bytes_before / 1e6:,.1f} MB are now {report.bytes_after / 1e6:,.1f} MB; "
        f"{len(report.versions_removed):,} versions removed, {report.versions_kept:,} kept, in {report.seconds:.1f} s "
        f"(version {report.version}).",
        markup=False,
    )


@app.command()
def tag(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    name: Annotated[str, typer.Argument(help="The name.")],
    version: VersionOption = None,
    move: Annotated[bool, typer.Option("--move", help="Take the name from the version that has it.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the name away; the version stays.")] = False,
    json: Json = False,
) -> None:
    """Name a version (the newest by default), so that it can be opened by name and is never removed."""
    from ragstone.knowledge import KnowledgeBase

    base = KnowledgeBase.open(kb, version=parse_version(version))
    if delete:
        base.untag(name)
    else:
        base.tag(name, move=move)
    if json:
        print_json({"tags": base.tags()})
    elif delete:
        out.print(f"{kb}: the tag {name} is gone.", markup=False)
    else:
        out.print(f"{kb}: version {base.version} is {name}.", markup=False)


@app.command()
def delete(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    ids: Annotated[list[str], typer.Argument(help="Ids of passages.")],
    document: Annotated[bool, typer.Option("--document", help="They are ids of whole documents.")] = False,
    json: Json = False,
) -> None:
    """Delete passages or documents. Versions made before still hold them, until they are compacted away."""
    from ragstone.knowledge import KnowledgeBase

    base = KnowledgeBase.open(kb)
    known = set() if document else base.known(ids)
    missing = [] if document else [name for name in dict.fromkeys(ids) if name not in known]
    count = base.delete_documents(ids) if document else base.delete(ids)
    if json:
        print_json({"deleted": count, "missing": missing, "passages": len(base), "version": base.version})
        return
    out.print(f"{kb}: {counted(count, 'passage')} deleted, {len(base):,} left (version {base.version}).", markup=False)
    for name in missing[:SHOWN_SKIPS]:
        err.print(f"There is no passage {name!r}.", style="yellow", markup=False, soft_wrap=True)
