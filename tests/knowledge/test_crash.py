import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ragstone.errors import KnowledgeBaseError, LockedError
from ragstone.knowledge import KnowledgeBase, Passage
from ragstone.testing import ToyEncoder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

HOLD_THE_LOCK = """
import sys, time
from ragstone.knowledge.manifest import write_lock
with write_lock(__import__("pathlib").Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def kb(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add([Passage(f"p{i}", text=f"alpha text {i}") for i in range(50)])
    return kb


@pytest.fixture
def other_writer(kb):
    """Starts a process that holds the lock for some seconds."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD_THE_LOCK, str(kb.path), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_writer_is_refused_and_readers_are_not(kb, other_writer):
    process = other_writer(60)
    for write in (
        lambda: kb.add([Passage("new", text="new")]),
        lambda: kb.upsert([Passage("p1", text="new")]),
        lambda: kb.delete("p1"),
        lambda: kb.add_documents(__file__.replace(".py", ".txt")),
    ):
        with pytest.raises(LockedError, match="being written to by another process"):
            write()
    assert len(KnowledgeBase.open(kb.path, encoder=ToyEncoder()).search("alpha", k=50)) == 50
    process.kill()  # a lock ends with its process
    process.wait()
    kb.add([Passage("new", text="new")])


def test_a_second_writer_may_wait(kb, other_writer):
    waiting = KnowledgeBase.open(kb.path, encoder=ToyEncoder(), wait=30)
    other_writer(0.5)
    assert waiting.delete("p1") == 1
    other_writer(60)
    hasty = KnowledgeBase.open(kb.path, encoder=ToyEncoder(), wait=0.1)
    with pytest.raises(LockedError, match=r"\(after 0.1 seconds\)"):
        hasty.delete("p2")


def test_two_handles_in_one_process_exclude_each_other(kb):
    slow = KnowledgeBase.open(kb.path, encoder=ToyEncoder(delay=0.5))
    thread = threading.Thread(target=slow.add, args=([Passage("slow", text="slow")],))
    thread.start()
    time.sleep(0.25)
    with pytest.raises(LockedError):
        kb.delete("p1")
    thread.join()
    assert kb.delete("slow") == 1


def test_readers_see_whole_versions_while_another_process_writes(kb, tmp_path):
    script = f"""
from ragstone.testing import ToyEncoder
from ragstone.knowledge import KnowledgeBase, Passage
kb = KnowledgeBase.open({str(kb.path)!r}, encoder=ToyEncoder())
for turn in range(30):
    kb.upsert([Passage(f"p{{i}}", text=f"alpha turn{{turn}}") for i in range(50)])
"""
    writer = subprocess.Popen([sys.executable, "-c", script])
    seen = set()
    while writer.poll() is None:
        hits = KnowledgeBase.open(kb.path, encoder=ToyEncoder()).search("alpha", k=60)
        texts = {hit.passage.text for hit in hits if "turn" in hit.passage.text}
        assert len(hits) == 50
        assert len(texts) <= 1
        seen |= texts
    assert writer.returncode == 0
    assert len(seen) > 1


def test_kill_9_while_indexing_loses_nothing_committed(tmp_path):
    import crash

    result = crash.run(tmp_path, kills=3, seed=1, documents=25)
    assert result.killed == 3
    assert result.faults == []


def test_kill_9_of_any_write_while_others_read_loses_and_tears_nothing(tmp_path):
    import crash_updates

    result = crash_updates.run(tmp_path, kills=3, seed=5, readers=2)
    assert result.killed.total() == 3
    assert min(result.reads, result.pinned, result.finished) > 0
    assert (result.lost, result.faults, result.errors) == ([], [], [])


def test_the_crash_check_sees_what_is_torn_lost_or_wrong(tmp_path):
    from crash_updates import encoder, examine, passage

    base = KnowledgeBase.create(tmp_path / "kb", encoder=encoder(32))
    base.add([passage(f"p{place}", 3) for place in range(5)])
    assert examine(base) == (dict.fromkeys((f"p{place}" for place in range(5)), 3), [])
    torn = dataclasses.replace(passage("p1", 3), text=passage("p1", 4).text)
    base.upsert([torn])
    _, faults = examine(base)
    assert [fault.split(": ")[1].split(" ")[0:2] for fault in faults] == [
        ["p1", "is"],
        ["p1", "has"],
        ["marker3", "is"],
    ]


# Damaged files


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])


@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
@pytest.mark.parametrize("kind", ["data/*.lance", "_deletions/*", "_indices/*/*"])
def test_a_damaged_file_is_an_error_and_never_a_wrong_answer(kb, kind, how):
    kb.delete("p1")
    kb._store.index_words(all_rows=True)
    expected = [(hit.passage.id, hit.score) for hit in kb.search("alpha text 7", k=50)]
    for file in sorted((kb.path / "passages.lance").glob(kind)):
        damage(file, how)

    def ask() -> None:
        damaged = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
        assert [(hit.passage.id, hit.score) for hit in damaged.search("alpha text 7", k=50)] == expected
        damaged.search("alpha text 7", search="keyword")

    with pytest.raises(KnowledgeBaseError, match=r"passages.lance cannot be read"):
        ask()


@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_a_damaged_version_is_an_error_and_the_one_before_can_be_opened(kb, how):
    version = kb.version
    kb.delete("p1")
    newest = min((kb.path / "passages.lance" / "_versions").glob("*.manifest"))  # numbered downwards
    damage(newest, how)
    with pytest.raises(KnowledgeBaseError, match=rf"passages.lance cannot be read: _versions/{newest.name} .*version="):
        KnowledgeBase.open(kb.path)
    assert len(KnowledgeBase.open(kb.path, version=version)) == 50


def test_a_missing_dataset_is_an_error(kb):
    (kb.path / "passages.lance").rename(kb.path / "elsewhere")
    with pytest.raises(KnowledgeBaseError, match=r"passages.lance cannot be read"):
        KnowledgeBase.open(kb.path)


def test_a_write_that_fails_leaves_the_last_version(kb, monkeypatch):
    before, version = kb.get(["p1", "p2"]), kb.version

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(kb._store._dataset), "insert", fail)
    monkeypatch.setattr(type(kb._store._dataset), "merge_insert", fail)
    for write in (kb.add, kb.upsert):
        with pytest.raises(KnowledgeBaseError, match=r"No space left on device.*last version is whole"):
            write([Passage("new", text="new")])
    again = KnowledgeBase.open(kb.path)
    assert (again.get(["p1", "p2"]), again.version) == (before, version)
