"""A fault is put into a file of each kind for real; then there is the right answer or an error that names the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import HOWS, damage
from vectors import brute_force, filled, found, low_dimensional

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, ledger, search
from ragstone.testing import ToyEncoder

KINDS = ("data/*.lance", "_deletions/*", "_indices/*/*", "_versions/*.manifest")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several fragments, one with deletions, and a keyword index."""
    kb = KnowledgeBase.create(tmp_path_factory.mktemp("whole") / "kb", encoder=ToyEncoder())
    kb.add([Passage(f"p{i}", text=f"alpha text {i}", metadata={"i": i}) for i in range(40)])
    kb.upsert([Passage("p3", text="beta text"), Passage("new", text="gamma text")])
    kb.delete("p1")
    kb._store.index_words(all_rows=True)
    kb.upsert([Passage("p4", text="delta text")])
    return kb.path


def answers(kb: KnowledgeBase) -> list[object]:
    """All that can be asked of the base."""
    ids = sorted({"new", *(f"p{i}" for i in range(40))} - {"p1"})
    return [
        len(kb),
        kb.get(ids),
        kb.vectors(ids).tolist(),
        *(found(kb.search("alpha text 7", k=50, search=how)) for how in ("dense", "exact", "keyword", "hybrid")),
        found(kb.search("text", k=50, where="json_get_int(metadata, 'i') > 20")),
    ]


def files(base: Path, kind: str) -> list[Path]:
    """The files of a kind that the newest version needs."""
    import lance

    wanted = ledger.version_files(lance.dataset(base / "passages.lance"))
    found = [file for file in (base / "passages.lance").glob(kind) if file.is_file()]
    names = {file: file.relative_to(base / "passages.lance").as_posix() for file in found}
    return sorted(file for file in found if any(names[file].startswith(name) for name in wanted))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_at_open_and_by_a_base_that_is_open(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    monkeypatch.setattr(ledger, "_SHARE", 0)
    base = shutil.copytree(whole, tmp_path / "kb")
    there = KnowledgeBase.open(base, encoder=ToyEncoder())
    there.search("alpha", k=5, search="hybrid")
    damaged = files(base, kind)[HOWS.index(how) % len(files(base, kind))]
    name = damaged.relative_to(base / "passages.lance").as_posix()
    damage(damaged, how)
    for attempt in (
        lambda: KnowledgeBase.open(base),
        lambda: there.search("alpha", k=5),
        lambda: there.get("p2"),
        lambda: there.upsert([Passage("p2", text="never stored")]),
    ):
        with pytest.raises(KnowledgeBaseError, match=f"{name} .*(version=|--repair)"):
            attempt()
    assert [fault.file for fault in KnowledgeBase.check(base).faults] == [f"passages.lance/{name}"]


@pytest.mark.parametrize("place", [0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_no_flipped_bit_of_a_version_s_manifest_makes_lance_panic(
    whole: Path, tmp_path: Path, place: float, capfd: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(whole, tmp_path / "kb")
    damage(files(base, KINDS[3])[0], "flipped", place)
    with pytest.raises(KnowledgeBaseError, match=r"\.manifest is not as it was written"):
        KnowledgeBase.open(base)
    assert "panicked" not in capfd.readouterr().err


def test_older_versions_answer_where_only_the_newest_is_damaged(whole: Path, tmp_path: Path) -> None:
    base = shutil.copytree(whole, tmp_path / "kb")
    version = KnowledgeBase.open(base).version
    before = answers_of_text(base, version - 1)
    damage(files(base, KINDS[3])[0], "flipped")
    assert answers_of_text(base, version - 1) == before
    with pytest.raises(KnowledgeBaseError, match="has no version 99"):
        KnowledgeBase.open(base, version=99)


def answers_of_text(base: Path, version: int) -> list[tuple[str, float]]:
    return found(KnowledgeBase.open(base, version=version, encoder=ToyEncoder()).search("alpha text", k=50))


def test_a_copied_or_touched_base_is_read_once_and_then_trusted(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "VERIFIED_BYTES", 0)  # as if all files were large
    read: list[str] = []
    crc_of = ledger.crc_of
    monkeypatch.setattr(ledger, "crc_of", lambda path: read.append(path.name) or crc_of(path))
    base = shutil.copytree(whole, tmp_path / "kb")
    first = answers(KnowledgeBase.open(base, encoder=ToyEncoder()))
    assert len(read) > 3
    assert first == answers(KnowledgeBase.open(whole, encoder=ToyEncoder()))
    ledger.ledger_of.cache_clear()  # another process
    read.clear()
    assert answers(KnowledgeBase.open(base, encoder=ToyEncoder())) == first
    assert [name for name in read if not name.endswith(".manifest")] == []
    damage(files(base, KINDS[0])[0], "flipped in secret")
    with pytest.raises(KnowledgeBaseError, match="checksum differs"):
        KnowledgeBase.open(base)


def test_many_files_are_not_looked_at_for_each_question(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = KnowledgeBase.open(shutil.copytree(whole, tmp_path / "kb"), encoder=ToyEncoder())
    now = [100.0]
    monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])
    kb._snapshot.store._guard._next = 101.0
    damage(files(kb.path, KINDS[2])[0], "missing")
    assert len(kb.search("alpha", k=3)) == 3
    now[0] = 101.0
    with pytest.raises(KnowledgeBaseError, match="is missing"):
        kb.search("alpha", k=3)


# What lies beside the dataset


@pytest.mark.parametrize("how", [*HOWS, "another width", "another encoder"])
def test_a_damaged_manifest_is_named_and_restored_from_its_copy(whole: Path, tmp_path: Path, how: str) -> None:
    base = shutil.copytree(whole, tmp_path / "kb")
    before = answers(KnowledgeBase.open(base, encoder=ToyEncoder()))
    file = base / "manifest.json"
    if how.startswith("another"):  # still JSON
        values = json.loads(file.read_bytes())
        values["width"] += how == "another width"
        values["encoder"]["fingerprint"] += "?" * (how == "another encoder")
        file.write_text(json.dumps(values))
    else:
        damage(file, how)
    with pytest.raises(KnowledgeBaseError, match=r"manifest\.json"):
        KnowledgeBase.open(base)
    assert [fault.file for fault in KnowledgeBase.check(base).faults] == ["manifest.json"]
    report = KnowledgeBase.check(base, repair=True)
    assert report.sound
    assert report.repaired == ("manifest.json restored from its copy",)
    assert answers(KnowledgeBase.open(base, encoder=ToyEncoder())) == before


def test_a_manifest_without_a_checksum_is_read_as_ever(whole: Path, tmp_path: Path) -> None:
    base = shutil.copytree(whole, tmp_path / "kb")
    values = json.loads((base / "manifest.json").read_bytes())
    del values["checksum"]
    (base / "manifest.json").write_text(json.dumps(values))
    assert len(KnowledgeBase.open(base)) == len(KnowledgeBase.open(whole))


@pytest.mark.parametrize("how", HOWS)
def test_damaged_codes_are_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    vectors = low_dimensional(600, 16, 0)
    kb, ids = filled(tmp_path / "kb", vectors)
    question = low_dimensional(1, 16, 7)[0]
    expected = brute_force(ids, vectors, question, 10)
    assert found(kb.search(vectors=question, k=10)) == expected
    (file,) = kb.path.glob("codes-*.tvim")
    damage(file, how)
    faults = KnowledgeBase.check(kb.path).faults
    assert [fault.file for fault in faults] == ([] if how == "missing" else [file.name])
    assert found(KnowledgeBase.open(kb.path).search(vectors=question, k=10)) == expected
    assert KnowledgeBase.check(kb.path).sound


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["data/*.lance", "_versions/*.manifest"])
def test_damaged_staging_is_thrown_away_by_the_next_reencoding(tmp_path: Path, kind: str, how: str) -> None:
    class Stops(ToyEncoder):
        def encode_passages(self, pairs, *, progress=None):
            if self.encoded >= 20:
                raise KeyboardInterrupt
            return super().encode_passages(pairs, progress=progress)

    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add([Passage(f"p{i}", text=f"alpha text {i}") for i in range(40)])
    with pytest.raises(KeyboardInterrupt):
        kb.reencode(Stops(width=24), chunk=10)
    damage(min((kb.path / "reencode.lance").glob(kind)), how)
    assert {fault.kind for fault in KnowledgeBase.check(kb.path).faults} == {"staging"}
    encoder = ToyEncoder(width=24)
    KnowledgeBase.open(kb.path, encoder=ToyEncoder()).reencode(encoder, chunk=10)
    assert encoder.encoded >= 40
    np.testing.assert_array_equal(
        KnowledgeBase.open(kb.path).vectors(["p0", "p39"]),
        encoder.encode_passages([("", "alpha text 0"), ("", "alpha text 39")]),
    )
    assert KnowledgeBase.check(kb.path).sound


def test_a_damaged_hint_of_lance_changes_nothing(whole: Path, tmp_path: Path) -> None:
    expected = answers(KnowledgeBase.open(whole, encoder=ToyEncoder()))
    base = shutil.copytree(whole, tmp_path / "kb")
    hint = base / "passages.lance/_versions/latest_version_hint.json"
    for content in ('{"version":2}', '{"version":99}', "", "\0"):
        hint.write_text(content)
        assert answers(KnowledgeBase.open(base, encoder=ToyEncoder())) == expected
    hint.unlink()
    assert answers(KnowledgeBase.open(base, encoder=ToyEncoder())) == expected


def test_a_killed_writer_s_files_are_no_fault_and_get_checksums_from_the_next(whole: Path, tmp_path: Path) -> None:
    base = shutil.copytree(whole, tmp_path / "kb")
    code = f"""
import os
from ragstone.knowledge import KnowledgeBase, Passage, ledger
from ragstone.testing import ToyEncoder
ledger.Ledger.record = lambda self: os.kill(os.getpid(), 9)
KnowledgeBase.open({str(base)!r}, encoder=ToyEncoder()).upsert([Passage("late", text="alpha late")])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    kb = KnowledgeBase.open(base, encoder=ToyEncoder())
    assert kb.get("late")[0].text == "alpha late"
    report = KnowledgeBase.check(base)
    assert report.sound
    assert report.unknown_files > 0
    kb.delete("late")
    assert KnowledgeBase.check(base).unknown_files == 0
