"""What the tests of reading files share."""

from __future__ import annotations

from pathlib import Path

from ragstone.knowledge.documents import Document, Skipped, iter_documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> list[Document]:
    found = list(iter_documents(path))
    assert all(isinstance(item, Document) for item in found), found
    return found  # type: ignore[return-value]


def text_of(path: Path) -> str:
    (document,) = read(path)
    return " ".join(" ".join(section.text for section in document.sections).split())


def reason(path: Path) -> str:
    (skipped,) = iter_documents(path)
    assert isinstance(skipped, Skipped)
    assert skipped.path == str(path)
    assert str(path) in skipped.reason
    assert "\n" not in skipped.reason
    return skipped.reason
