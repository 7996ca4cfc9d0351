import copy
import gc
import json
import math
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from ragstone.errors import EncoderMismatchError, InputError, KnowledgeBaseError
from ragstone.knowledge import Hit, KnowledgeBase, Passage, SplitOptions
from ragstone.knowledge.passages import as_passages
from ragstone.testing import ToyEncoder

NASTY_IDS = [
    "O'Hara",
    "'; DROP TABLE passages; --",
    "emoji 😀",
    "日本語",
    "a\\b",
    'say "hi"',
    "new\nline",
    "%_",
    "ı İ ß",
]


@pytest.fixture
def kb(tmp_path):
    return KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())


@pytest.fixture
def vector_kb(tmp_path):
    return KnowledgeBase.create(tmp_path / "kb", encoder=None, width=4)


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


# Storing and fetching


def test_what_is_added_comes_back_the_same(kb):
    passages = [
        Passage("a", "A title", "Some text.", "doc", "file.pdf", 3, {"year": 1999, "tags": ["x", "😀"], "f": 0.1}),
        Passage("b", text=""),
        Passage("c", "Only a title", metadata={"nested": {"list": [1, None, True]}, "big": 2**53}),
    ]
    assert kb.add(passages) == 3
    assert len(kb) == 3
    assert kb.get(["c", "a", "b", "a"]) == [passages[2], passages[0], passages[1], passages[0]]
    assert kb.get("b") == [passages[1]]
    assert KnowledgeBase.open(kb.path, encoder=ToyEncoder()).get(["a", "b", "c"]) == passages


def test_ids_of_any_kind_are_found_replaced_and_deleted(kb):
    kb.add([Passage(id_, text=f"text {place}") for place, id_ in enumerate(NASTY_IDS)])
    assert [passage.id for passage in kb.get(NASTY_IDS)] == NASTY_IDS
    kb.upsert([Passage(id_, text="replaced") for id_ in NASTY_IDS])
    assert len(kb) == len(NASTY_IDS)
    assert {passage.text for passage in kb.get(NASTY_IDS)} == {"replaced"}
    for id_ in NASTY_IDS:
        assert kb.delete(id_) == 1
    assert len(kb) == 0


def test_strings_and_mappings_are_passages_too(kb):
    kb.add(["only text", {"id": 7, "title": "T", "contents": "C", "year": 1}])
    assert kb.get("7") == [Passage("7", "T", "C", metadata={"year": 1})]
    assert kb.get(as_passages(["only text"])[0].id)[0].text == "only text"


def test_add_refuses_an_id_that_is_in_use(kb):
    kb.add([Passage("a", text="first"), Passage("b", text="b")])
    with pytest.raises(InputError, match=r"'a'.*upsert"):
        kb.add([Passage("z", text="z"), Passage("a", text="second")])
    assert len(kb) == 2
    assert kb.get("a")[0].text == "first"


def test_add_refuses_an_id_given_twice_and_upsert_takes_the_last(kb):
    twice = [Passage("a", text="first"), Passage("b", text="b"), Passage("a", text="last")]
    with pytest.raises(InputError, match="'a' is given twice"):
        kb.add(twice)
    assert kb.upsert(twice) == 2
    assert kb.get("a")[0].text == "last"
    assert kb.upsert(twice) == 2
    assert len(kb) == 2


@pytest.mark.parametrize(
    "wrong", [{"page": "three"}, {"page": 2**40}, {"source": Path("file.pdf")}, {"document_id": 7}]
)
def test_a_passage_that_cannot_be_stored_is_refused(kb, wrong):
    with pytest.raises(InputError):
        kb.add([Passage("a", text="a", **wrong)])
    assert len(kb) == 0


def test_upsert_with_vectors_keeps_each_with_its_passage(vector_kb):
    eye = np.eye(4)
    vector_kb.upsert([Passage("a"), Passage("b"), Passage("a")], vectors=eye[:3])
    assert ids(vector_kb.search(vectors=eye[2], k=1)) == ["a"]
    assert vector_kb.search(vectors=eye[0], k=1)[0].score == 0.0


def test_delete_tells_how_many_and_forgives_unknown_ids(kb):
    kb.add([Passage("a", text="a"), Passage("b", text="b")])
    assert kb.delete(["a", "nowhere", "a"]) == 1
    assert kb.delete([]) == 0
    with pytest.raises(InputError, match=r"'a'"):
        kb.get("a")


def test_nothing_to_store_commits_nothing(kb):
    version = kb.version
    assert kb.add([]) == 0
    assert kb.upsert([]) == 0
    assert kb.delete(["nowhere"]) == 0
    assert kb.version == version


# Versions


def test_every_commit_is_a_version_that_can_be_opened(kb):
    start = kb.version
    kb.add([Passage("a", text="one")])
    kb.upsert([Passage("a", text="two"), Passage("b", text="b")])
    kb.delete("a")
    assert [version.number for version in kb.versions()] == [*range(1, start + 4)]
    assert [version.passages for version in kb.versions()][start:] == [1, 2, 1]
    old = KnowledgeBase.open(kb.path, version=start + 1, encoder=ToyEncoder())
    assert (len(old), old.version, old.get("a")[0].text) == (1, start + 1, "one")
    assert [hit.passage.text for hit in old.search("one", search="keyword")] == ["one"]
    assert [hit.passage.text for hit in old.search("one")] == ["one"]
    with pytest.raises(KnowledgeBaseError, match="for reading only"):
        old.delete("a")
    with pytest.raises(KnowledgeBaseError, match=f"no version 99, only 1 to {start + 3}"):
        KnowledgeBase.open(kb.path, version=99)


def test_a_reader_stays_at_its_version_until_it_refreshes(kb):
    kb.add([Passage("a", text="alpha")])
    reader = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    kb.upsert([Passage("a", text="changed"), Passage("b", text="beta")])
    assert [hit.passage.text for hit in reader.search("alpha")] == ["alpha"]
    reader.refresh()
    assert reader.version == kb.version
    assert sorted(hit.passage.text for hit in reader.search("alpha")) == ["beta", "changed"]


def test_a_writer_builds_on_what_another_wrote(kb):
    other = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    kb.add([Passage("a", text="a")])
    with pytest.raises(InputError, match="'a'"):
        other.add([Passage("a", text="again")])
    other.add([Passage("b", text="b")])
    assert len(other) == 2


def test_a_deep_copy_reads_on_by_itself(kb):
    kb.add([Passage("a", text="alpha"), Passage("b", text="beta")])
    kb.search("alpha")  # files are open and mapped from now on
    copied = copy.deepcopy(kb)
    version = copied.version
    kb.delete(["a"])
    assert [hit.passage.id for hit in copied.search("alpha", k=1)] == ["a"]
    path = kb.path
    del kb
    gc.collect()
    KnowledgeBase.open(path, encoder=ToyEncoder()).compact(keep=timedelta(0))
    assert copied.version == version
    assert [passage.id for passage in copied.get(["b", "a"])] == ["b", "a"]


# Opening and creating


def test_the_folder_can_be_moved(kb, tmp_path):
    kb.add([Passage("a", text="alpha")])
    kb.path.rename(tmp_path / "moved")
    moved = KnowledgeBase.open(tmp_path / "moved", encoder=ToyEncoder())
    assert ids(moved.search("alpha", search="hybrid")) == ["a"]
    moved.add([Passage("b", text="b")])
    assert str(tmp_path).encode() not in (tmp_path / "moved" / "manifest.json").read_bytes()


def test_create_refuses_a_folder_in_use(kb, tmp_path):
    with pytest.raises(KnowledgeBaseError, match="open it"):
        KnowledgeBase.create(kb.path, encoder=ToyEncoder())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(KnowledgeBaseError, match=r"not empty: it holds 'notes.txt'"):
        KnowledgeBase.create(tmp_path / "other", encoder=ToyEncoder())
    with pytest.raises(KnowledgeBaseError, match="is a file"):
        KnowledgeBase.create(tmp_path / "other" / "notes.txt", encoder=ToyEncoder())
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_create_takes_over_what_a_creation_cut_short_left(kb):
    (kb.path / "manifest.json").unlink()
    kb = KnowledgeBase.create(kb.path, encoder=ToyEncoder())
    kb.add([Passage("a", text="a")])
    (kb.path / "manifest.json").unlink()  # not cut short: there are passages
    with pytest.raises(KnowledgeBaseError, match=r"not empty: it holds 'passages.lance'"):
        KnowledgeBase.create(kb.path, encoder=ToyEncoder())


def test_create_needs_an_encoder_or_a_width(tmp_path):
    with pytest.raises(InputError, match="width=768"):
        KnowledgeBase.create(tmp_path / "kb", encoder=None)
    with pytest.raises(InputError, match="width=0"):
        KnowledgeBase.create(tmp_path / "kb", encoder=None, width=0)
    with pytest.raises(InputError, match=r"width=5.*width 32"):
        KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(), width=5)
    assert not (tmp_path / "kb").exists()
    assert KnowledgeBase.create(tmp_path / "deep" / "er" / "kb", encoder=None, width=3).width == 3


def test_open_says_what_is_wrong_with_a_folder(kb, tmp_path):
    with pytest.raises(KnowledgeBaseError, match=r"does not exist; make one with"):
        KnowledgeBase.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KnowledgeBaseError, match="is not a knowledge base"):
        KnowledgeBase.open(tmp_path / "empty")
    assert not KnowledgeBase.exists(tmp_path / "empty")
    manifest = kb.path / "manifest.json"
    whole = manifest.read_text()
    plain = {name: value for name, value in json.loads(whole).items() if name != "checksum"}
    for text, message in [
        (whole[: len(whole) // 2], "is damaged"),
        ("", "is damaged"),
        ("[1]", "is damaged"),
        (json.dumps({**plain, "width": None}), "is damaged"),
        (json.dumps({**plain, "split": {"words": -1}}), "is damaged"),
        (json.dumps({**json.loads(whole), "format": "other"}), "declares the format 'other'"),
        (json.dumps({**json.loads(whole), "format_version": 99}), "format version 99.*upgrade"),
        (json.dumps({**json.loads(whole), "width": 16}), "is damaged .*checksum"),
        (json.dumps({**plain, "width": 16}), "width 32, but manifest.json beside it says 16"),
    ]:
        manifest.write_text(text)
        with pytest.raises(KnowledgeBaseError, match=message):
            KnowledgeBase.open(kb.path)
    manifest.write_text(json.dumps({**plain, "from_the_future": 1}))
    assert len(KnowledgeBase.open(kb.path)) == 0


def test_another_encoder_is_refused(kb):
    for other in (ToyEncoder(16), ToyEncoder(fingerprint="toy-2"), ToyEncoder(pooling="cls")):
        with pytest.raises(EncoderMismatchError, match="open the base with the encoder that made it"):
            KnowledgeBase.open(kb.path, encoder=other)
    KnowledgeBase.open(kb.path, encoder=ToyEncoder(name="elsewhere"))


def test_the_encoder_is_loaded_when_it_is_needed(kb, monkeypatch):
    kb.add([Passage("a", text="alpha")])
    loaded = []

    def load(name, spec, *, device, dtype):
        loaded.append((name, spec["pooling"], device, dtype))
        return ToyEncoder()

    monkeypatch.setattr("ragstone.knowledge.encoding.load", load)
    again = KnowledgeBase.open(kb.path, device="cpu", dtype="float32")
    assert ids(again.search("alpha", search="keyword")) == ["a"]
    assert not loaded
    assert ids(again.search("alpha")) == ["a"]
    again.search("alpha")
    assert loaded == [("toy", "mean", "cpu", "float32")]
    monkeypatch.setattr("ragstone.knowledge.encoding.load", lambda *_, **__: ToyEncoder(fingerprint="other weights"))
    with pytest.raises(EncoderMismatchError, match="other weights"):
        KnowledgeBase.open(kb.path).search("alpha")


def test_info_tells_what_the_base_holds(kb):
    kb.add([Passage("a", text="a", document_id="d"), Passage("b", text="b", document_id="d"), Passage("c", text="c")])
    info = kb.info()
    assert (info.passages, info.documents, info.width, info.version) == (3, 1, 32, kb.version)
    assert (info.metric, info.dense_search, info.split) == ("inner_product", "exact", SplitOptions())
    assert info.encoder == ToyEncoder().spec.to_dict()
    assert info.bytes > 1000
    assert repr(kb) == f"KnowledgeBase({str(kb.path)!r}, version={kb.version}, passages=3)"


# Vectors that are given


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 5)), r"shape \(2, 5\).*width 4"),
        (np.ones((3, 4)), r"vectors \(3\) and of texts \(2\) differ"),
        ([[1, 2, 3, 4], [1, 2, 3, math.nan]], "number 1 is NaN"),
        ([[math.inf, 0, 0, 0], [1, 2, 3, 4]], "number 0 is NaN, infinite"),
        (np.full((2, 4), 1e300), "too large"),
        (np.ones((2, 4, 1)), "shape"),
        ("vectors", "array of numbers"),
        ([[1, 2, 3, 4], [1, 2]], "array of numbers"),
    ],
)
def test_vectors_that_cannot_be_stored_are_refused(vector_kb, vectors, message):
    with pytest.raises(InputError, match=message):
        vector_kb.add(["a", "b"], vectors=vectors)
    assert len(vector_kb) == 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64"])
def test_vectors_of_any_real_dtype_are_stored(vector_kb, dtype):
    vectors = np.arange(8).reshape(2, 4).astype(dtype)
    vector_kb.add([Passage("a"), Passage("b")], vectors=vectors)
    hits = vector_kb.search(vectors=np.ones(4), k=2)
    assert [(hit.passage.id, hit.score) for hit in hits] == [("b", 22.0), ("a", 6.0)]
    assert hits[0].vector.dtype == np.float32
    assert hits[0].vector.tolist() == [4, 5, 6, 7]


def test_without_an_encoder_texts_are_not_encoded(vector_kb, tmp_path):
    with pytest.raises(KnowledgeBaseError, match="encoder=None; give vectors="):
        vector_kb.add(["text"])
    vector_kb.add([Passage("a", text="alpha")], vectors=np.ones((1, 4)))
    with pytest.raises(KnowledgeBaseError, match="encoder=None; give vectors="):
        vector_kb.search("alpha")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(KnowledgeBaseError, match="encoder=None"):
        vector_kb.add_documents(tmp_path / "a.txt")
    assert ids(vector_kb.search("alpha", search="keyword")) == ["a"]
    assert ids(vector_kb.search("alpha", vectors=np.ones(4), search="hybrid")) == ["a"]


def test_a_base_outlives_a_change_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = KnowledgeBase.create("kb", encoder=None, width=2)
    opened = KnowledgeBase.open("kb")
    monkeypatch.chdir("/")
    made.add(["north"], vectors=[[0, 1]])
    opened.refresh()
    assert [hit.passage.text for hit in opened.search(vectors=[0, 1])] == ["north"]
    assert opened.path == tmp_path / "kb"


def test_things_of_the_wrong_kind_are_named(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2)
    kb.add(["north"], vectors=[[0, 1]])
    for act, words in [
        (lambda: kb.add(None), "passages come as a list, not as None"),
        (lambda: kb.delete(3), "ids must be a string or a list of strings, not 3"),
        (lambda: kb.delete(["\ud800"]), r"the passage id '\\ud800' is not valid Unicode at character 0"),
        (lambda: kb.get(["\ud800"]), r"the passage id '\\ud800' is not valid Unicode at character 0"),
        (lambda: kb.search(None), None),
        (lambda: kb.search(3, search="keyword"), "questions must be a string or a list of strings, not 3"),
        (lambda: kb.search(vectors=[0, 1], where=3), "where=3 must be an SQL predicate"),
        (lambda: KnowledgeBase.open(kb.path, version=1.5), "version=1.5 must be a whole number"),
        (lambda: KnowledgeBase.open(kb.path, version=True), "version=True must be a whole number"),
    ]:
        with pytest.raises(InputError, match=words):
            act()
    assert len(kb.search(vectors=[0, 1], k=2**63)) == 1


@pytest.mark.parametrize(
    "leave", [lambda path: path.rename(path.with_name("moved")), shutil.rmtree], ids=["moved", "removed"]
)
def test_a_base_that_was_moved_or_removed_is_said_to_be_that_and_is_not_begun_anew(vector_kb, leave, monkeypatch):
    monkeypatch.setattr("ragstone.knowledge.ledger._LONGEST_PAUSE", 0)  # between two looks at the files
    vector_kb.add(["one", "two"], vectors=np.eye(4)[:2])
    vector_kb.search(vectors=[1, 0, 0, 0])
    vector_kb.refresh()
    leave(vector_kb.path)
    for act in (
        lambda: KnowledgeBase.search(vector_kb, vectors=[1, 0, 0, 0]),
        lambda: vector_kb.add(["three"], vectors=np.eye(4)[2:3]),
        lambda: vector_kb.delete(["one"]),
        vector_kb.refresh,
    ):
        with pytest.raises(KnowledgeBaseError, match="is there no more: it was moved or removed"):
            act()
        assert not vector_kb.path.exists()
