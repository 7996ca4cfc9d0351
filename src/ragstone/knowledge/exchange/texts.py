"""Passages without vectors, as retrieval benchmarks ship them: BEIR, the table of DPR, the JSON lines of Pyserini.

They are read by the same readers as `index` reads records with; here each record stays one passage, with its own id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ragstone.errors import InputError
from ragstone.knowledge.documents import Document, Skipped, document_passages, read_file
from ragstone.knowledge.exchange.chunks import Chunk, Source
from ragstone.knowledge.passages import Passage

__all__ = ["CORPUS", "text_source"]

CORPUS = "corpus.jsonl"


def text_source(path: Path, kind: str) -> Source:
    """Open a BEIR folder or its ``corpus.jsonl``, a DPR table, or a file or folder of Pyserini's JSON lines."""
    files = _files(path, kind)

    def chunks(rows: int) -> Iterator[Chunk]:
        passages: list[Passage] = []
        skipped: list[Skipped] = []
        for document in (document for file in files for document in read_file(file)):
            if isinstance(document, Skipped):
                skipped.append(document)
            else:
                passages.append(_passage(document, kind))
            if len(passages) + len(skipped) >= rows:
                yield Chunk(passages, None, tuple(skipped))
                passages, skipped = [], []
        if passages or skipped:
            yield Chunk(passages, None, tuple(skipped))

    return Source(kind, path, sum(map(_count_lines, files)), None, chunks, _notes(path, kind))


def _files(path: Path, kind: str) -> list[Path]:
    if path.is_file():
        return [path]
    if kind == "beir":
        files = [path / CORPUS]
        if not files[0].is_file():
            raise InputError(f"{path} has no {CORPUS}, which holds the passages of a BEIR collection; give its folder")
        return files
    files = sorted(path.glob("*.jsonl" if kind == "pyserini" else "*.tsv"))
    if not files or (kind == "dpr" and len(files) > 1):
        named = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{path} holds no single collection of the format {kind}, but {named}; give the file itself")
    return files


def _passage(document: Document, kind: str) -> Passage:
    """Return a record as one passage. Pyserini's have their title, where there is one, on a line of its own at first."""
    title, text = document.title, document.sections[0].text
    if kind == "pyserini" and not title and "\n" in text:
        title, text = (part.strip() for part in text.split("\n", 1))
    (passage,) = document_passages(replace(document, title=title, source=None), None)
    return replace(passage, text=text, document_id=None)


def _count_lines(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    except OSError as error:
        raise InputError(f"{file} cannot be opened: {error.strerror or error}") from None


def _notes(path: Path, kind: str) -> tuple[str, ...]:
    if kind != "beir" or not path.is_dir():
        return ()
    others = [name for name in ("queries.jsonl", "qrels") if (path / name).exists()]
    if not others:
        return ()
    return (f"{path} also holds {' and '.join(others)}: questions and their gold passages, which are not imported.",)
