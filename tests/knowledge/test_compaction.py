import json
import os
import shutil
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import numpy as np
import pytest
from vectors import brute_force, filled, found, low_dimensional

from ragstone.errors import InputError, KnowledgeBaseError, LockedError
from ragstone.knowledge import KnowledgeBase, Passage, Version, leases
from ragstone.knowledge import codes as codes_module
from ragstone.knowledge import search as search_module
from ragstone.knowledge.compaction import outdated
from ragstone.knowledge.history import _ranges
from ragstone.knowledge.manifest import write_lock
from ragstone.testing import ToyEncoder

NOW = timedelta()
EYE = np.eye(4, dtype=np.float32)


@pytest.fixture
def kb(tmp_path):
    """Versions 1 to 3 are those of an empty base; then each of four passages has one."""
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=4)
    for place in range(4):
        kb.add([Passage(f"p{place}", text=f"word{place}")], vectors=EYE[place])
    return kb


def numbers(kb: KnowledgeBase) -> list[int]:
    return [version.number for version in kb.versions()]


def held(kb: KnowledgeBase) -> set[int]:
    return leases.leased(kb.path)


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# Which versions go


def history(*days: float) -> list[Version]:
    return [Version(number, datetime(2030, 1, 1) + timedelta(days=day), 0) for number, day in enumerate(days, 1)]


def test_a_version_goes_when_what_replaced_it_is_old():
    versions = history(0, 10, 20, 21)  # 4 is what compaction made of 3
    day = datetime(2030, 1, 22)

    def gone(keep: float, spared: tuple[int, ...] = (), rewritten: int = 3) -> list[int]:
        return outdated(versions, rewritten, spared, timedelta(days=keep), day)

    assert gone(0) == [1, 2, 3]
    assert gone(1) == [1, 2, 3]
    assert gone(1.5) == [1]  # 2 was replaced by 3 a day ago, 3 was made a day ago
    assert gone(11) == [1]
    assert gone(12) == []
    assert gone(0, spared=(2,)) == [1, 3]
    assert gone(0.5, rewritten=4) == [1, 2]  # 3 was replaced by other content, at this moment
    assert outdated(history(0), 1, (), NOW, day) == []


def test_numbers_in_words():
    assert _ranges([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"
    assert _ranges([4]) == "4"


# Compaction


def test_compaction_keeps_content_row_ids_and_scores_and_removes_old_versions(tmp_path):
    vectors = low_dimensional(300, 8, seed=1)
    kb, ids = filled(tmp_path / "kb", vectors)
    for start in range(0, 60, 20):
        vectors[start : start + 20] += 1
        kb.upsert([Passage(id_, text="changed") for id_ in ids[start : start + 20]], vectors[start : start + 20])
    kb.delete(ids[250:])
    before = kb._store.scan(["id", "text", "vector", "_row_last_updated_at_version"]).sort_by("_rowid")
    report = kb.compact(NOW)
    after = kb._store.scan(["id", "text", "vector", "_row_last_updated_at_version"]).sort_by("_rowid")
    assert after.equals(before)
    assert numbers(kb) == [kb.version] == [report.version]
    assert report.versions_kept == 1
    assert report.versions_removed == (*range(1, min(report.versions_removed) + len(report.versions_removed)),)
    assert report.bytes_after < report.bytes_before
    assert len(kb._store._dataset.get_fragments()) == 1
    again = KnowledgeBase.open(kb.path)
    for base in (kb, again):
        assert found(base.search(vectors=vectors[3], k=10)) == brute_force(ids[:250], vectors[:250], vectors[3], 10)
        assert len(base.search("changed", k=100, search="keyword")) == 60


def test_a_second_compaction_finds_nothing_to_do(kb):
    kb.compact(NOW)
    version = kb.version
    report = kb.compact(NOW)
    assert (kb.version, report.versions_removed) == (version, ())


def test_nothing_younger_than_keep_goes_and_none_keeps_all(kb):
    before = numbers(kb)
    assert kb.compact().versions_removed == ()
    assert kb.compact(None).versions_removed == ()
    assert numbers(kb)[: len(before)] == before
    for version in (4, 5, 6):
        assert len(KnowledgeBase.open(kb.path, version=version)) == version - 3
    with pytest.raises(InputError, match=r"keep=-1 day.*timedelta\(0\)"):
        kb.compact(timedelta(days=-1))
    with pytest.raises(InputError, match=r"keep=7 must be a timedelta"):
        kb.compact(keep=7)


def test_rows_of_any_state_are_found_by_word_before_and_after_compaction(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add([Passage(f"p{i}", text=f"alpha old{i}") for i in range(2000)])
    kb.add([Passage(f"q{i}", text=f"alpha old{i}") for i in range(200)])
    kb._store.index_words(all_rows=True)
    kb.add([Passage("fresh", text="beta fresh")])  # too few for the index to be brought up to date
    kb.upsert([Passage("p1", text="gamma fresh")])
    kb.delete("p2")

    def check(base: KnowledgeBase) -> None:
        by_words = lambda text: [hit.passage.id for hit in base.search(text, k=3, search="keyword")]  # noqa: E731
        assert by_words("beta") == ["fresh"]
        assert by_words("gamma") == ["p1"]
        assert by_words("fresh") == ["fresh", "p1"]
        assert by_words("old1") == ["q1"]
        assert by_words("old2") == ["q2"]
        assert len(base.search("alpha", k=1000, search="keyword")) == 1000

    check(kb)
    kb.compact(NOW)
    assert {index.num_rows_indexed for index in kb._store._dataset.describe_indices()} == {len(kb)}
    check(kb)
    check(KnowledgeBase.open(kb.path, encoder=ToyEncoder()))
    kb.upsert([Passage("p3", text="delta")])
    kb.compact(NOW)
    assert [hit.passage.id for hit in kb.search("delta", search="keyword")] == ["p3"]


def test_the_word_index_is_brought_up_to_date_after_every_so_many_rows(kb):
    indexed = lambda: min(i.num_rows_indexed for i in kb._store._dataset.describe_indices())  # noqa: E731
    assert indexed() == 0
    for start in range(0, 2500, 500):
        kb.upsert([Passage(f"q{i}", text="word") for i in range(start, start + 500)], np.ones((500, 4)))
    assert 2048 < indexed() <= len(kb)
    for _ in range(5):  # the same rows again: each time they are new to the index
        kb.upsert([Passage(f"q{i}", text="gamma") for i in range(500)], np.ones((500, 4)))
        assert len(kb) - indexed() <= 2048
    assert len(kb.search("gamma", k=1000, search="keyword")) == 500


# Codes


@pytest.fixture
def quantised(monkeypatch):
    monkeypatch.setattr(search_module, "EXACT_BELOW", 10)


def test_compaction_takes_the_codes_along(tmp_path, quantised, monkeypatch):
    vectors = low_dimensional(400, 8, seed=2)
    kb, ids = filled(tmp_path / "kb", vectors)
    kb.search(vectors=vectors[0])  # makes the codes and their file
    kb.upsert([Passage(ids[5])], vectors[5] + 1)  # too few for a new file
    kb.delete(ids[7])
    kb.compact(NOW)
    monkeypatch.setattr(codes_module, "_build", lambda store: pytest.fail("the codes were built anew"))
    vectors[5] += 1
    left = [place for place in range(400) if place != 7]
    for base in (kb, KnowledgeBase.open(kb.path)):
        expected = brute_force([ids[i] for i in left], vectors[left], vectors[5], 5)
        assert found(base.search(vectors=vectors[5], k=5)) == expected


def test_compaction_deletes_what_killed_processes_and_copies_left(kb):
    partial = (".manifest.json.77", "..manifest.json.copy.77", ".codes.77", ".codes.78")
    for name in ("codes-0123abcd-3-00000000.tvim", *partial):
        (kb.path / name).write_bytes(b"x")
    os.utime(kb.path / ".codes.77", (0, 0))
    torn = kb.path / "passages.lance" / "data" / f"{'01' * 25}.lance"
    torn.write_bytes(b"x" * 1000)
    staging = kb.path / "reencode.lance" / "data"
    staging.mkdir(parents=True)
    kb.compact()
    assert staging.exists()  # a re-encoding that was cut short may go on
    kb.compact(NOW)
    assert not staging.exists()
    assert not torn.exists()
    names = {path.name for path in kb.path.iterdir()}
    whole = {"manifest.json", ".manifest.json.copy", "passages.lance", "write.lock", "leases"}
    assert names == whole | {".codes.78"}  # which may be being written
    (kb.path / "manifest.json").write_bytes(b"x")
    assert KnowledgeBase.check(kb.path, repair=True).sound


# Leases


def test_a_version_that_is_read_stays_until_it_is_not(kb):
    reader = KnowledgeBase.open(kb.path, version=5)
    other = KnowledgeBase.open(kb.path)
    kb.add([Passage("new")], EYE[0])
    assert held(kb) == {5, 7, kb.version}
    kb.compact(NOW)
    assert numbers(kb) == [5, 7, kb.version]
    assert len(reader.search(vectors=EYE[0], k=9)) == 2
    assert len(KnowledgeBase.open(kb.path, version=5)) == 2
    assert len(other.search("word3", search="keyword")) == 1
    other.refresh()
    assert (other.version, held(kb)) == (kb.version, {5, kb.version})
    del reader
    kb.compact(NOW)
    assert numbers(kb) == [kb.version]
    assert len(list((kb.path / "leases").iterdir())) == 3  # the gate, and one for each handle


def test_a_search_in_another_thread_keeps_its_version(kb, monkeypatch):
    reader = KnowledgeBase.open(kb.path, encoder=None)
    begun, go = threading.Event(), threading.Event()
    search, hits = reader._searcher.search, []

    def slow(*arguments):
        begun.set()
        assert go.wait(60)
        return search(*arguments)

    monkeypatch.setattr(reader._searcher, "search", slow)
    thread = threading.Thread(target=lambda: hits.append(reader.search(vectors=EYE[3])))
    thread.start()
    assert begun.wait(60)
    kb.upsert([Passage("p3", text="changed")], EYE[0])
    reader.refresh()
    kb.compact(NOW)
    assert numbers(kb) == [7, reader.version, kb.version]
    go.set()
    thread.join()
    assert [(hit.passage.text, hit.score) for hit in hits[0][:1]] == [("word3", 1.0)]
    kb.compact(NOW)
    assert numbers(kb) == [reader.version, kb.version]


READER = """
import sys
from ragstone.knowledge import KnowledgeBase
kb = KnowledgeBase.open(sys.argv[1], version=5)
print("open", flush=True)
sys.stdin.readline()
print(len(kb.search("word1", search="keyword")), flush=True)
sys.stdin.readline()
"""


def test_the_lease_of_another_process_ends_with_it(kb):
    command = [sys.executable, "-c", READER, str(kb.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        kb.compact(NOW)
        assert numbers(kb) == [5, kb.version]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n"
    finally:
        process.kill()
        process.wait()
    assert len(list((kb.path / "leases").glob("5-*"))) == 1  # what is left of it
    assert kb.compact(NOW).versions_removed == (5,)
    assert list((kb.path / "leases").glob("5-*")) == []


def test_thousands_of_refreshes_leak_neither_descriptors_nor_files(kb):
    readers = [KnowledgeBase.open(kb.path) for _ in range(3)]
    count = descriptors()
    for _ in range(1000):
        for reader in readers:
            reader.refresh()
    for place in range(30):
        kb.upsert([Passage("p0", text=f"turn{place}")], EYE[0])
        for reader in readers:
            reader.refresh()
    assert descriptors() <= count
    assert held(kb) == {kb.version}
    assert len(list((kb.path / "leases").iterdir())) == 1 + 4
    del readers, reader
    assert len(list((kb.path / "leases").iterdir())) == 1 + 1


def test_a_lease_of_a_forked_parent_is_not_given_back_by_the_child(tmp_path):
    lease = leases.Lease(tmp_path, 3)
    (path,) = (tmp_path / "leases").glob("3-*")
    leases._release(path, os.open(path, os.O_RDONLY), os.getpid() + 1)
    assert leases.leased(tmp_path) == {3}
    del lease
    assert leases.leased(tmp_path) == set()


def test_a_folder_that_cannot_be_written_to_is_read_without_a_lease(kb, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    reader = KnowledgeBase.open(kb.path)
    assert held(kb) == {kb.version}  # the writer's own
    assert len(list((kb.path / "leases").iterdir())) == 2
    assert len(reader.search(vectors=EYE[0], k=9)) == 4
    (kb.path / "leases" / "gate").unlink()
    assert len(KnowledgeBase.open(kb.path, version=5)) == 2


def test_opening_waits_while_versions_are_removed(kb):
    opened = threading.Event()
    with leases.removing(kb.path):
        thread = threading.Thread(target=lambda: (KnowledgeBase.open(kb.path, version=5), opened.set()))
        thread.start()
        assert not opened.wait(0.2)
    assert opened.wait(60)
    thread.join()


# Versions and tags


def test_a_tag_names_a_version_and_keeps_it(kb):
    KnowledgeBase.open(kb.path, version=5).tag("two")
    kb.tag("release-1.0")
    assert kb.tags() == {"release-1.0": 7, "two": 5}
    assert kb.info().tags == kb.tags()
    kb.delete("p0")
    kb.compact(NOW)
    assert numbers(kb) == [5, 7, kb.version]
    tagged = KnowledgeBase.open(kb.path, version="two")
    assert (tagged.version, len(tagged)) == (5, 2)
    with pytest.raises(KnowledgeBaseError, match="for reading only"):
        tagged.delete("p0")
    del tagged
    kb.untag("two")
    kb.compact(NOW)
    assert numbers(kb) == [7, kb.version]


def test_a_tag_moves_only_if_it_is_told_to(kb):
    kb.tag("live")
    kb.tag("live")
    kb.delete("p0")
    with pytest.raises(KnowledgeBaseError, match="has the tag 'live' at version 7; move it with move=True"):
        kb.tag("live")
    kb.tag("live", move=True)
    assert kb.tags() == {"live": kb.version}


_NO_REFS = ["a.lock", "a.", "a..b", "..", "a" * 201, None, 5]


@pytest.mark.parametrize("name", ["", "7", "a b", "../x", ".hidden", "a/b", "é", "new\nline", "x\n", *_NO_REFS])
def test_a_tag_that_is_no_name_is_refused(kb, name):
    with pytest.raises(InputError, match="is no name"):
        kb.tag(name)
    assert kb.tags() == {}


@pytest.mark.parametrize("name", ["a.lock.b", "a.b.c", "lock", "A_", "a" * 200])
def test_a_tag_that_is_a_name_is_taken(kb, name):
    kb.tag(name)
    assert list(kb.tags()) == [name]


def test_an_unknown_tag_names_those_there_are(kb):
    with pytest.raises(KnowledgeBaseError, match="has no tag 'x', and no other"):
        KnowledgeBase.open(kb.path, version="x")
    kb.tag("y")
    for use in (lambda: KnowledgeBase.open(kb.path, version="x"), lambda: kb.untag("x")):
        with pytest.raises(KnowledgeBaseError, match="has no tag 'x', only 'y'"):
            use()


def test_opening_a_version_that_was_removed_says_so(kb):
    kb.compact(NOW)
    with pytest.raises(KnowledgeBaseError, match=f"no longer has version 5: compaction removed it, only {kb.version}"):
        KnowledgeBase.open(kb.path, version=5)
    for never in (0, -1, kb.version + 1):
        with pytest.raises(KnowledgeBaseError, match=f"has no version {never}, only"):
            KnowledgeBase.open(kb.path, version=never)


def test_a_removal_that_was_cut_short_is_completed_and_its_versions_are_refused(kb, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(kb._store._dataset), "cleanup_old_versions", die)
        with pytest.raises(KeyboardInterrupt):
            kb.compact(NOW)
    assert json.loads((kb.path / "removing.json").read_bytes())[:3] == [1, 2, 3]
    assert numbers(kb) == [kb.version]
    with pytest.raises(KnowledgeBaseError, match="no longer has version 5"):
        KnowledgeBase.open(kb.path, version=5)
    assert len(KnowledgeBase.open(kb.path)) == 4
    kb.compact()
    assert not (kb.path / "removing.json").exists()
    assert [entry["version"] for entry in kb._store._dataset.versions()] == numbers(kb)
    (kb.path / "removing.json").write_text("{")
    with pytest.raises(KnowledgeBaseError, match=r"removing\.json is damaged"):
        kb.versions()


# Writers


def test_every_writing_method_is_refused_while_another_writes(kb):
    kb.tag("here")
    before, version = numbers(kb), kb.version
    passages = [Passage("p0", text="new")]
    with write_lock(kb.path, 0):
        for write in (
            lambda: kb.add([Passage("new")], EYE[0]),
            lambda: kb.upsert(passages, EYE[0]),
            lambda: kb.delete("p0"),
            lambda: kb.delete_documents("p0"),
            lambda: kb.add_documents(__file__),
            lambda: kb.reencode(ToyEncoder()),
            lambda: kb.compact(NOW),
            lambda: kb.tag("there"),
            lambda: kb.untag("here"),
        ):
            with pytest.raises(LockedError, match="being written to by another"):
                write()
    assert (numbers(kb), kb.version, kb.tags()) == (before, version, {"here": version})


def test_a_search_sees_a_handle_s_own_write_when_all_of_it_is_done(kb, monkeypatch):
    seen = []
    kind = type(kb._store)
    index_words = kind.index_words
    monkeypatch.setattr(kind, "index_words", lambda store: (seen.append(len(kb)), index_words(store)))
    kb.add([Passage("new")], EYE[0])
    assert (seen, len(kb)) == ([4], 5)


def test_what_a_search_reads_never_moves_whatever_the_handle_writes(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    for write in (
        lambda: kb.add([Passage("a", text="a"), Passage("b", text="b")]),
        lambda: kb.upsert([Passage("a", text="c")]),
        lambda: kb.delete("a"),
        lambda: kb.compact(NOW),
        lambda: kb.reencode(ToyEncoder(48)),
        lambda: kb.reencode(ToyEncoder(48, name="elsewhere")),
    ):
        snapshot = kb._snapshot
        version, content = snapshot.store.version, snapshot.store.scan(["id", "text", "vector"])
        write()
        assert kb.version > version == snapshot.store.version
        assert snapshot.store.scan(["id", "text", "vector"]).equals(content)


def test_documents_are_deleted_whole(kb):
    kb.add([Passage("d1", document_id="d"), Passage("d2", document_id="d"), Passage("d", text="x")], np.ones((3, 4)))
    assert kb.delete_documents(["d", "nowhere"]) == 2
    assert {passage.id for passage in kb.get(["d", "p0"])} == {"d", "p0"}
    assert len(kb) == 5


def test_a_copy_of_a_base_is_compacted_on_its_own(kb, tmp_path):
    shutil.copytree(kb.path, tmp_path / "copy")
    copy = KnowledgeBase.open(tmp_path / "copy")
    copy.compact(NOW)
    assert (numbers(copy), len(copy)) == ([copy.version], 4)
    assert len(numbers(kb)) == 7


def test_versions_are_not_listed_while_some_are_being_removed(kb):
    listed = []
    thread = threading.Thread(target=lambda: listed.append(numbers(kb)))
    with leases.removing(kb.path):
        thread.start()
        thread.join(0.3)
        assert not listed
    thread.join()
    assert listed == [[*range(1, kb.version + 1)]]
