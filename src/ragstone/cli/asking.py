"""``ragstone search`` and ``ragstone ask``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragstone.cli.console import complain, err, out, print_json, quiet_libraries, working
from ragstone.cli.explanation import print_answer, print_hits
from ragstone.errors import DocumentError, InputError, RagstoneError
from ragstone.knowledge import Document, KnowledgeBase, Passage, SplitOptions, document_passages, iter_documents

__all__ = ["answer_questions", "search_passages"]


def search_passages(
    folder: Path,
    question: str,
    *,
    options: dict[str, Any],
    version: int | str | None,
    memory: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Print the best passages."""
    quiet_libraries()
    base = KnowledgeBase.open(folder, version=version, memory=memory, device=device, dtype=dtype)
    hits = base.search(question, **options)
    if as_json:
        print_json([{**asdict(hit.passage), "score": hit.score} for hit in hits])
    else:
        print_hits(hits)


def answer_questions(
    folder: str | None,
    question: str | None,
    *,
    model: str,
    method: str | None,
    files: list[Path] | None,
    version: int | str | None,
    options: dict[str, Any],
    explain: bool,
    memory: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Answer ``question``, or every line of standard input, which on a terminal is a conversation."""
    from ragstone.pipeline import RagPipeline

    quiet_libraries()
    base = (
        None
        if folder is None
        else KnowledgeBase.open(folder, version=version, memory=memory, device=device, dtype=dtype)
    )
    passages = _read_passages(files) if files else None
    with working("Loading the model"):
        rag = RagPipeline.from_pretrained(model, knowledge_base=base, method=method, device=device, dtype=dtype)  # type: ignore[arg-type]

    def answer(text: str) -> None:
        with working("Reading"):
            result = rag(text, passages=passages, **options)
        if as_json:
            print_json(result.to_dict())
        else:
            print_answer(result, explain=explain)

    if question is not None:
        answer(question)
        return
    for line in _questions():
        try:
            answer(line)
        except RagstoneError as error:  # one bad question does not end the conversation
            complain(str(error))


def _questions() -> Iterator[str]:
    """Questions from a prompt on a terminal, else one a line; bytes that are no text are left for the question's check."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin):
            if question := (line if number else line.removeprefix("\ufeff")).strip():
                yield question
        return
    err.print("Ask a question; an empty line or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = out.input("[bold cyan]?[/] ").strip()
        except EOFError:
            out.print()
            return
        if not line:
            return
        yield line


def _read_passages(files: list[Path]) -> list[Passage]:
    """The passages of files that need no knowledge base."""
    passages: list[Passage] = []
    for document in iter_documents(files):
        if not isinstance(document, Document):
            raise DocumentError(document.reason)
        passages += document_passages(document, SplitOptions())
    if not passages:
        raise InputError(f"{', '.join(map(str, files))} hold no text.")
    return passages
