"""`KnowledgeBase.check` finds what is wrong, says what to do, and repairs what is derived."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import damage
from vectors import filled, found, low_dimensional

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from command import ragstone

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, search
from ragstone.knowledge.ledger import ledger_of
from ragstone.knowledge.storage import passage_table
from ragstone.testing import ToyEncoder


@pytest.fixture
def kb(tmp_path: Path) -> KnowledgeBase:
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add([Passage(f"p{i}", text=f"alpha text {i}", metadata={"i": i}) for i in range(30)])
    kb._store.index_words(all_rows=True)
    return kb


def newest_manifest(kb: KnowledgeBase) -> Path:
    return min((kb.path / "passages.lance/_versions").glob("*.manifest"))  # numbered downwards


def index_file(kb: KnowledgeBase) -> Path:
    return max((kb.path / "passages.lance/_indices").glob("*/part_0_invert.lance"), key=os.path.getmtime)


def test_a_base_that_was_only_used_is_sound(kb: KnowledgeBase) -> None:
    kb.delete("p1")
    kb.upsert([Passage("p2", text="beta")])
    kb.reencode(ToyEncoder(width=24))
    report = KnowledgeBase.check(kb.path)
    assert report.sound
    assert (report.version, report.passages, report.unknown_files, report.notes) == (kb.version, 29, 0, ())
    assert report.whole_versions == tuple(version.number for version in kb.versions())


def test_rows_that_are_wrong_are_counted(kb: KnowledgeBase) -> None:
    vectors = np.ones((3, kb.width), np.float32)
    vectors[2, 1] = np.nan
    kb._store.append(passage_table([Passage("p1", text="x"), Passage("p2", text="y"), Passage("z", text="z")], vectors))
    problems = [fault.problem for fault in KnowledgeBase.check(kb.path).faults]
    assert problems == ["2 rows have the id of another", "1 vectors are not finite"]


def test_a_damaged_keyword_index_is_built_anew(kb: KnowledgeBase) -> None:
    before = found(kb.search("alpha 7", k=30, search="keyword"))
    damage(index_file(kb), "flipped")
    (fault,) = KnowledgeBase.check(kb.path).faults
    assert fault.kind == "keywords"
    assert "--repair" in fault.remedy
    report = KnowledgeBase.check(kb.path, repair=True)
    assert report.sound
    assert "cannot be searched by words" in report.notes[0]
    assert found(KnowledgeBase.open(kb.path, encoder=ToyEncoder()).search("alpha 7", k=30, search="keyword")) == before
    assert len(kb.versions()) == len(report.whole_versions)


def test_a_keyword_index_of_other_words_is_found(kb: KnowledgeBase, tmp_path: Path) -> None:
    other = KnowledgeBase.create(tmp_path / "other", encoder=ToyEncoder())
    other.add([Passage(f"p{i}", text=f"omega {i * 7}") for i in range(30)])
    other._store.index_words(all_rows=True)
    for file in index_file(other).parent.iterdir():
        (index_file(kb).parent / file.name).write_bytes(file.read_bytes())
    (kb.path / "passages.lance/checksums.tsv").unlink()  # or it would be noticed at once
    assert "keywords" in {fault.kind for fault in KnowledgeBase.check(kb.path).faults}


def test_codes_of_other_vectors_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ragstone.knowledge.axes import Axes
    from ragstone.knowledge.codes import AXES_FILE, _checksum

    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    bases = [filled(tmp_path / str(seed), low_dimensional(600, 16, seed))[0] for seed in (1, 2)]
    for base in bases:
        base.search(vectors=np.ones(16), k=1)
        assert KnowledgeBase.check(base.path).sound
    (own,), (other,) = (list(base.path.glob("codes-*.tvim")) for base in bases)
    own.write_bytes(other.read_bytes())
    checksum = _checksum(own, Axes.load(own.parent / AXES_FILE))
    wrong = own.rename(own.with_name(f"{own.name.rsplit('-', 1)[0]}-{checksum}.tvim"))
    (fault,) = KnowledgeBase.check(bases[0].path).faults
    assert (fault.file, fault.problem) == (wrong.name, "does not agree with the vectors")
    assert KnowledgeBase.check(bases[0].path, repair=True).sound
    assert not wrong.exists()


@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_an_older_version_becomes_the_newest_again(kb: KnowledgeBase, how: str) -> None:
    version, before = kb.version, found(kb.search("alpha 7", k=30, search="hybrid"))
    kb.upsert([Passage("p7", text="gamma")])
    lost = kb.version
    damage(newest_manifest(kb), how)
    report = KnowledgeBase.check(kb.path)
    assert (report.sound, report.version, report.passages) == (False, lost, None)
    assert f"--restore {version}" in report.faults[0].remedy
    with pytest.raises(KnowledgeBaseError, match=rf"version {lost} .* is not whole"):
        KnowledgeBase.check(kb.path, restore=lost)
    report = KnowledgeBase.check(kb.path, restore=version)
    assert report.sound
    assert report.version > lost  # whoever still reads the lost one moves on
    again = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    assert found(again.search("alpha 7", k=30, search="hybrid")) == before
    assert again.upsert([Passage("p7", text="gamma")]) == 1


def test_a_damaged_ledger_forgets_but_accuses_nobody(kb: KnowledgeBase) -> None:
    file = kb.path / "passages.lance/checksums.tsv"
    for place in (0.0, 0.3, 0.7):
        damage(file, "flipped", place)
        ledger_of.cache_clear()
        assert len(KnowledgeBase.open(kb.path)) == 30
        assert [fault.kind for fault in KnowledgeBase.check(kb.path).faults] == ["checksums"]
        report = KnowledgeBase.check(kb.path, repair=True)
        assert (report.sound, report.unknown_files) == (True, 0)
    damage(file, "cut", 0.99)  # as by a kill: the last line does not end
    kb.delete("p1")
    damage(file, "missing")
    assert KnowledgeBase.check(kb.path).unknown_files > 0
    kb.delete("p2")
    assert KnowledgeBase.check(kb.path).unknown_files == 0


def test_what_a_killed_write_left_is_noted_and_removed(kb: KnowledgeBase) -> None:
    left = kb.path / ".codes.1234"
    left.write_bytes(b"half")
    assert KnowledgeBase.check(kb.path).notes == ()  # its process may still write
    os.utime(left, (0, 0))
    report = KnowledgeBase.check(kb.path)
    assert report.sound
    assert "1 files (4 bytes)" in report.notes[0]
    assert KnowledgeBase.check(kb.path, repair=True).notes == ()
    assert not left.exists()


def test_the_command_line_says_what_is_wrong_and_returns_1(kb: KnowledgeBase, tmp_path: Path) -> None:
    done = ragstone("check", kb.path)
    assert (done.returncode, "sound" in done.stdout) == (0, True)
    name = index_file(kb).name
    damage(index_file(kb), "cut")
    done = ragstone("check", kb.path, "--json")
    values = json.loads(done.stdout)
    assert (done.returncode, values["sound"]) == (1, False)
    assert values["faults"][0]["file"].endswith(name)
    done = ragstone("check", kb.path, "--repair")
    assert (done.returncode, "repaired keyword index built anew" in done.stdout) == (0, True)
    done = ragstone("check", tmp_path / "nowhere")
    assert (done.returncode, "does not exist" in done.stderr) == (1, True)
