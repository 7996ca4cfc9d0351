"""Options that several verbs have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = [
    "Beams",
    "Decode",
    "Device",
    "Devices",
    "Dtype",
    "Extractive",
    "Json",
    "K",
    "Memory",
    "Method",
    "ModelK",
    "Search",
    "SearchOption",
    "VersionOption",
    "Where",
    "WorkerCount",
    "parse_version",
]


class Method(StrEnum):
    """How passages are summed out."""

    token = "token"
    sequence = "sequence"


class Search(StrEnum):
    """How passages are found."""

    dense = "dense"
    exact = "exact"
    keyword = "keyword"
    hybrid = "hybrid"


class Decode(StrEnum):
    """How RAG-Sequence ranks hypotheses."""

    thorough = "thorough"
    fast = "fast"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]
Devices = Annotated[str | None, typer.Option("--device", help="cpu, cuda, or several: cuda:0,cuda:1, one worker each.")]
WorkerCount = Annotated[int | None, typer.Option("--workers", min=1, help="Processes that read and encode [1].")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default the quicker one, found by a probe.")]
K = Annotated[int, typer.Option("-k", min=1, help="Passages a question.")]
ModelK = Annotated[int | None, typer.Option("-k", min=1, help="Passages a question [the model's own].")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beams of the search for an answer [the model's own].")]
Extractive = Annotated[
    bool | None,
    typer.Option("--extractive/--free", help="Answer in words that stand in a passage, or freely [the model's own]."),
]
Where = Annotated[str | None, typer.Option(help="Filter on passages, as SQL: \"source LIKE '%.pdf'\".")]
Memory = Annotated[str | None, typer.Option(help="What search structures may use, as 2GB [half the machine's].")]
SearchOption = Annotated[Search, typer.Option("--search", help="How passages are found.")]
VersionOption = Annotated[
    str | None, typer.Option("--version", help="A version of the base, by number or tag [the newest].")
]


def parse_version(text: str | None) -> int | str | None:
    """Return a version as `KnowledgeBase.open` takes it: digits are a number, anything else is a tag."""
    return int(text) if text is not None and text.isdecimal() else text
