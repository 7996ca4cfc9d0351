"""A disk that is full, during any command: one sentence says so, and the last version is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vectors import found

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, search
from ragstone.testing import ToyEncoder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill the file system up to some bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        state = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - left)
    return filler


def passages(count: int, word: str = "alpha") -> list[Passage]:
    return [Passage(f"p{i}", text=f"{word} text {i}") for i in range(count)]


def documents(kb: KnowledgeBase) -> None:
    folder = kb.path.parent.parent / "documents"
    folder.mkdir(exist_ok=True)
    for i in range(50):
        (folder / f"{i}.txt").write_text(f"omega {i} " * 500)
    kb.add_documents(folder)


WRITES: dict[str, Callable[[KnowledgeBase], object]] = {
    "add": lambda kb: kb.add([Passage(f"new{i}", text=f"new {i}") for i in range(3000)]),
    "upsert": lambda kb: kb.upsert(passages(2500, "beta")),
    "delete": lambda kb: kb.delete(["p1", "p2"]),
    "reencode": lambda kb: kb.reencode(ToyEncoder(width=256)),
    "documents": documents,
    "split": lambda kb: kb.add_documents([], split=None),
    "words": lambda kb: kb._store.rebuild_indices(),
}


def attempt(write: Callable[[KnowledgeBase], object], kb: KnowledgeBase) -> tuple[bool, str]:
    """Whether a write was done, and else what was said."""
    try:
        write(kb)
    except KnowledgeBaseError as error:
        return False, str(error)
    return True, ""


@pytest.mark.parametrize("left", [0, 65_536])
@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_leaves_the_last_version(disk: Path, what: str, left: int) -> None:
    kb = KnowledgeBase.create(disk / "kb", encoder=ToyEncoder())
    kb.add(passages(100))
    version, before = kb.version, found(kb.search("alpha text 7", k=100, search="hybrid"))
    filler = fill(disk, left)
    complete, said = attempt(WRITES[what], kb)
    assert complete or ("disk full" in said and "make room" in said and "\n" not in said)
    assert left or not complete
    again = KnowledgeBase.open(disk / "kb", encoder=ToyEncoder())
    if not complete and what not in ("documents", "words"):  # those commit in parts
        assert again.version == version
    if not complete and what != "documents":
        assert found(again.search("alpha text 7", k=100, search="hybrid")) == before
    filler.unlink()
    assert KnowledgeBase.check(disk / "kb", repair=True).sound
    WRITES["upsert"](KnowledgeBase.open(disk / "kb", encoder=ToyEncoder()))
    assert KnowledgeBase.check(disk / "kb").sound


def test_a_full_disk_while_a_base_is_made(disk: Path) -> None:
    filler = fill(disk, 0)
    with pytest.raises(KnowledgeBaseError, match="disk full"):
        KnowledgeBase.create(disk / "kb", encoder=ToyEncoder())
    filler.unlink()
    KnowledgeBase.create(disk / "kb", encoder=ToyEncoder()).add(passages(10))
    assert KnowledgeBase.check(disk / "kb").sound


def test_a_full_disk_costs_the_codes_but_no_answer(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    kb = KnowledgeBase.create(disk / "kb", encoder=ToyEncoder())
    kb.add(passages(300))
    fill(disk, 0)
    assert found(kb.search("alpha 7", k=5)) == found(kb.search("alpha 7", k=5, search="exact"))
    assert [*disk.glob("kb/*codes*")] == [*disk.glob("kb/.codes*")] == []


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage
from ragstone.testing import ToyEncoder
kb = KnowledgeBase.create({str(tmp_path / "kb")!r}, encoder=ToyEncoder())
kb.add([Passage("a", text="alpha")])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (kb.add, kb.upsert):
    try:
        write([Passage(f"p{{i}}", text=f"beta {{i}}") for i in range(2000)])
    except KnowledgeBaseError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("disk full") == 2, done
    assert [passage.text for passage in KnowledgeBase.open(tmp_path / "kb").get("a")] == ["alpha"]
    assert len(KnowledgeBase.open(tmp_path / "kb")) == 1
