import json
import random

import numpy as np
import pytest

from ragstone.errors import InputError, ModelError
from ragstone.knowledge import KnowledgeBase, Passage, SplitOptions
from ragstone.testing import ToyEncoder

FIVE_WORDS = SplitOptions(words=5)


def words(count: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]) for _ in range(count))


@pytest.fixture
def kb(tmp_path):
    return KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())


@pytest.fixture
def notes(tmp_path):
    """A folder of ten text files of one to ten passages of five words."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(words(5 * (i + 1), seed=i))
    return folder


def content(kb: KnowledgeBase) -> list[tuple]:
    """All that is stored, vectors included, in the order of ids."""
    kb = KnowledgeBase.open(kb.path)
    table = kb._store.scan(
        ["id", "document_id", "source", "position", "content_hash", "title", "text", "metadata", "vector"]
    )
    return sorted(tuple(map(str, row.values())) for row in table.drop_columns(["_rowid"]).to_pylist())


def write_records(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_files_become_passages_with_source_and_position(kb, notes):
    report = kb.add_documents(notes, split=FIVE_WORDS)
    assert (report.documents, report.added, report.updated, report.unchanged) == (10, 10, 0, 0)
    assert (report.passages, report.skipped, report.version) == (55, (), kb.version)
    assert len(kb) == 55
    source = (notes / "3.txt").as_posix()
    passages = kb.get([f"{source}#{i}" for i in range(4)])
    assert {passage.source for passage in passages} == {source}
    assert {passage.title for passage in passages} == {"3"}
    assert " ".join(passage.text for passage in passages) == (notes / "3.txt").read_text()
    assert {hit.passage.source for hit in kb.search("alpha", k=55)} == {
        (notes / f"{i}.txt").as_posix() for i in range(10)
    }
    assert kb.info().documents == 10


def test_an_unchanged_folder_is_not_encoded_again(kb, notes):
    kb.add_documents(notes, split=FIVE_WORDS)
    version, encoded, before = kb.version, kb.encoder.encoded, content(kb)
    report = kb.add_documents([notes, notes / "1.txt"])
    assert (report.unchanged, report.added, report.updated, report.passages) == (10, 0, 0, 0)
    assert (kb.encoder.encoded, kb.version, content(kb)) == (encoded, version, before)
    again = KnowledgeBase.open(kb.path)  # its encoder does not exist, and is not missed
    assert again.add_documents(notes).unchanged == 10


def test_only_what_changed_is_encoded_and_a_document_that_shrank_leaves_nothing_behind(kb, notes):
    kb.add_documents(notes, split=FIVE_WORDS)
    (notes / "9.txt").write_text("one passage only")
    (notes / "new.txt").write_text("a new file")
    encoded, version = kb.encoder.encoded, kb.version
    report = kb.add_documents(notes)
    assert (report.added, report.updated, report.unchanged, report.passages) == (1, 1, 9, 2)
    assert kb.encoder.encoded == encoded + 2
    assert len(kb) == 55 - 10 + 2
    source = (notes / "9.txt").as_posix()
    assert [passage.text for passage in kb.get(source)] == ["one passage only"]
    assert kb.search("x", where=f"document_id = '{source}'", k=99)[0].passage.id == source
    assert kb.version == version + 2  # one commit for the passages, one for the keyword index
    assert len(kb.search("passage only", search="keyword")) == 1


def test_records_keep_their_ids_and_are_replaced_by_them(kb, tmp_path):
    file = tmp_path / "it's.jsonl"
    write_records(file, [{"id": f"O'Hara {i} 😀", "title": "T", "text": words(8, i), "year": i} for i in range(5)])
    kb.add_documents(file)
    assert kb.get("O'Hara 3 😀")[0].metadata == {"year": 3}
    write_records(
        file,
        [
            {"id": f"O'Hara {i} 😀", "title": "T", "text": "changed" if i == 3 else words(8, i), "year": i}
            for i in range(5)
        ],
    )
    report = kb.add_documents(file)
    assert (report.updated, report.unchanged) == (1, 4)
    assert kb.get("O'Hara 3 😀")[0].text == "changed"
    assert len(kb) == 5


def test_an_id_given_twice_is_reported_and_the_first_is_kept(kb, tmp_path):
    write_records(tmp_path / "a.jsonl", [{"id": "1", "text": "first"}, {"id": "2", "text": words(12, 0)}])
    write_records(tmp_path / "b.jsonl", [{"id": "1", "text": "second"}, {"id": "2#1", "text": "taken"}])
    for _ in range(2):
        report = kb.add_documents([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], split=FIVE_WORDS)
        assert kb.get("1")[0].text == "first"
        assert "the id '1' was given before" in report.skipped[0].reason
        assert "its passage '2#1' has the id" in report.skipped[1].reason
        assert " ".join(passage.text for passage in kb.get(["2#0", "2#1", "2#2"])) == words(12, 0)
        ids = kb._store.scan(["id"])["id"].to_pylist()
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("listed", [1, 1000])
def test_no_document_takes_the_passages_of_a_stored_one(kb, tmp_path, monkeypatch, listed):
    monkeypatch.setattr("ragstone.knowledge.storage._LISTED_IDS", listed)
    write_records(tmp_path / "a.jsonl", [{"id": "a", "text": words(20, 0)}])
    kb.add_documents(tmp_path / "a.jsonl", split=FIVE_WORDS)
    before = content(kb)
    write_records(tmp_path / "b.jsonl", [{"id": "a#0", "text": "intruder"}, {"id": "b", "text": words(20, 1)}])
    report = kb.add_documents(tmp_path)
    assert (report.documents, report.added, report.updated, report.unchanged, report.passages) == (3, 1, 0, 1, 4)
    (skipped,) = report.skipped
    assert "its passage 'a#0' has the id of one of the stored document 'a'" in skipped.reason
    assert [row for row in content(kb) if row[1] == "a"] == before
    assert kb.add_documents(tmp_path, prune=True).removed == 0


@pytest.mark.parametrize("split", ["foo", 50, True, {"words": 5}])
def test_a_split_that_is_none_is_refused_and_changes_nothing(kb, notes, split):
    before = (kb.path / "manifest.json").read_bytes()
    for act in (kb.add_documents, kb.estimate_documents):
        with pytest.raises(InputError, match=r"split=.* must be a SplitOptions"):
            act(notes, split=split)
    assert (kb.path / "manifest.json").read_bytes() == before
    assert kb.split == SplitOptions()


def test_a_passage_added_by_hand_gives_way_to_a_document_with_its_id(kb, tmp_path):
    kb.add([Passage("1", text="by hand"), Passage("other", text="by hand")])
    write_records(tmp_path / "a.jsonl", [{"id": "1", "text": "from a file"}])
    report = kb.add_documents(tmp_path / "a.jsonl")
    assert (report.added, report.updated) == (0, 1)  # something was there before
    assert [passage.text for passage in kb.get(["1", "other"])] == ["from a file", "by hand"]
    assert len(kb) == 2
    kb.upsert([Passage("1", text="by hand again")])  # no longer what the file says
    assert kb.add_documents(tmp_path / "a.jsonl").passages == 1
    assert kb.get("1")[0].text == "from a file"


def test_the_split_is_remembered_and_another_one_splits_anew(kb, notes):
    kb.add_documents(notes, split=FIVE_WORDS)
    kb = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    assert kb.info().split == FIVE_WORDS
    assert kb.add_documents(notes).unchanged == 10
    report = kb.add_documents(notes, split=SplitOptions(words=10))
    assert (report.updated, len(kb)) == (10, 1 + 1 + 2 + 2 + 3 + 3 + 4 + 4 + 5 + 5)
    report = kb.add_documents(notes, split=None)
    assert (report.updated, len(kb), kb.info().split) == (10, 10, None)
    assert KnowledgeBase.open(kb.path, encoder=ToyEncoder()).add_documents(notes).unchanged == 10


def test_what_cannot_be_read_is_reported_and_skipped(kb, notes):
    (notes / "bad.txt").write_bytes(b"caf\xe9")
    (notes / "empty.txt").write_text("")
    (notes / "records.jsonl").write_text('{"id": "r", "text": "fine"}\nnot json\n')
    report = kb.add_documents(notes, split=FIVE_WORDS)
    assert report.added == 11
    assert [(skipped.path.rsplit("/")[-1], skipped.line) for skipped in report.skipped] == [
        ("bad.txt", None),
        ("empty.txt", None),
        ("records.jsonl", 2),
    ]
    with pytest.raises(InputError, match="does not exist"):
        kb.add_documents(notes / "nowhere")


def test_prune_takes_out_what_is_gone_from_these_paths(kb, notes, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("stays")
    kb.add_documents([notes, tmp_path / "elsewhere.txt"], split=FIVE_WORDS)
    kb.add([Passage("by hand", text="stays")])
    (notes / "9.txt").unlink()
    (notes / "8.txt").write_bytes(b"\xff no longer readable")
    assert kb.add_documents(notes).removed == 0
    assert len(kb) == 57
    report = kb.add_documents(notes, prune=True)
    assert (report.removed, report.unchanged, len(report.skipped)) == (1, 8, 1)
    assert len(kb) == 57 - 10
    assert kb.get("by hand")


def test_progress_counts_files_and_then_passages(kb, notes):
    calls: list[tuple[int, int, str]] = []
    kb.add_documents(notes, split=FIVE_WORDS, chunk_passages=20, progress=lambda *call: calls.append(call))
    assert calls == [(i, 10, "files") for i in range(1, 11)] + [(i, 55, "passages") for i in range(1, 56)]


class Stops(ToyEncoder):
    """Raises once a number of passages are encoded."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        super().__init__()
        self.after, self.error = after, error

    def encode_passages(self, pairs, *, progress=None):
        if self.encoded + len(pairs) > self.after:
            raise self.error
        return super().encode_passages(pairs, progress=progress)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("after", [0, 12, 24, 36, 48])
def test_a_run_that_ends_early_is_completed_by_the_next(kb, notes, tmp_path, after, error):
    whole = KnowledgeBase.create(tmp_path / "whole", encoder=ToyEncoder())
    whole.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    stopped = KnowledgeBase.open(kb.path, encoder=Stops(after, error))
    with pytest.raises(error):
        stopped.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    kept = content(kb)
    assert len(kept) <= after
    assert set(kept) <= set(content(whole))  # whole passages
    for i in range(10):  # and whole documents
        assert sum(f"/{i}.txt" in row[1] for row in kept) in (0, i + 1)
    again = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    report = again.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    assert again.encoder.encoded == report.passages == 55 - len(kept)
    assert content(kb) == content(whole)


def test_chunks_are_of_whole_documents(kb, notes):
    start = kb.version
    kb.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    assert [version.passages for version in kb.versions()][start:-1] == [10, 21, 36, 45, 55]
    with pytest.raises(InputError, match="chunk_passages=0"):
        kb.add_documents(notes, chunk_passages=0)


def test_an_encoder_that_fails_stores_nothing(tmp_path, notes):
    class Broken(ToyEncoder):
        def _vector(self, text):
            return super()._vector(text) * np.nan

    kb = KnowledgeBase.create(tmp_path / "kb", encoder=Broken())
    with pytest.raises(ModelError, match=r"passage '.*0.txt' is not finite"):
        kb.add_documents(notes, split=FIVE_WORDS)
    with pytest.raises(ModelError, match="passage 'a' is not finite"):
        kb.add([Passage("a", text="text")])
    assert len(kb) == 0
