import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from ragstone.errors import EncoderMismatchError, InputError, KnowledgeBaseError, LockedError
from ragstone.knowledge import KnowledgeBase, Passage, search
from ragstone.knowledge.manifest import Manifest
from ragstone.knowledge.storage import PassageStore
from ragstone.testing import ToyEncoder, ToyEncoderSpec

PASSAGES = [Passage(f"p{i}", f"title {i % 7}", f"alpha text {i}") for i in range(60)]


class Mirrored(ToyEncoder):
    """Vectors that point the other way: of the same width, and of another encoder."""

    def __init__(self, **options):
        super().__init__(**{"name": "mirrored", "fingerprint": "toy-2", **options})

    def _vector(self, text):
        return -super()._vector(text)


class Interrupted(Mirrored):
    """Fails once it has encoded ``after`` passages."""

    def __init__(self, after, **options):
        super().__init__(**options)
        self.after = after

    def _vector(self, text):
        if self.encoded == self.after:
            raise KeyboardInterrupt
        return super()._vector(text)


def wide():
    return ToyEncoder(48, name="wide", fingerprint="toy-3")


def encoders():
    return {"toy": ToyEncoder(), "mirrored": Mirrored(), "wide": wide()}


@pytest.fixture
def kb(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add(PASSAGES[:40])
    kb.add(PASSAGES[40:])
    kb.delete(["p3", "p50"])
    kb.upsert([Passage("p5", text="replaced")])
    return kb


def found(kb, how="dense"):
    return [(hit.passage, hit.score, hit.vector.tolist()) for hit in kb.search("alpha title 3", k=100, search=how)]


def check_version(path, version=None):
    """Every vector of a version is that of its passage by the encoder that the version names; return its name."""
    name = KnowledgeBase.open(path, version=version).info().encoder["name"]
    kb = KnowledgeBase.open(path, version=version, encoder=encoders()[name])
    rows = kb._store.row_ids()
    ids, vectors = kb._store.ids_of(rows), kb._store.vectors_of(rows)
    expected = encoders()[name].encode_passages([(p.title, p.text) for p in kb.get(ids)])
    np.testing.assert_array_equal(vectors, expected)
    assert kb.width == kb.info().width == vectors.shape[1]
    return name


@pytest.mark.parametrize("encoder", [Mirrored, wide])
def test_a_reencoded_base_is_one_that_was_made_with_the_new_encoder(kb, tmp_path, encoder):
    ids = kb._store.scan(["id"])["id"].to_pylist()
    fresh = KnowledgeBase.create(tmp_path / "fresh", encoder=encoder())
    fresh.add(kb.get(ids))
    words = found(kb, "keyword")
    before = kb.version
    version = kb.reencode(encoder(), chunk=7)
    assert version == kb.version > before
    assert kb.width == kb.encoder.width == fresh.width
    for how in ("dense", "exact", "hybrid"):
        assert found(kb, how) == found(fresh, how)
    assert [(p, score) for p, score, _ in found(kb, "keyword")] == [(p, score) for p, score, _ in words]
    reopened = KnowledgeBase.open(kb.path, encoder=encoder())
    assert found(reopened) == found(fresh)
    assert reopened.info().encoder == encoder().spec.to_dict()
    assert not (kb.path / "reencode.lance").exists()


def test_every_version_holds_vectors_of_the_encoder_that_it_names(kb):
    first = kb.version
    names = ["toy"] * (first - 3)  # with passages: the first three versions are those of `create`
    kb.reencode(Mirrored())
    kb.upsert([Passage("new", text="new"), Passage("p1", text="changed")])
    kb.reencode(wide())
    kb.reencode(ToyEncoder())
    seen = [check_version(kb.path, v.number) for v in kb.versions() if v.passages]
    assert seen[: len(names)] == names
    assert [name for place, name in enumerate(seen) if seen[place - 1 : place] != [name]] == [
        "toy",
        "mirrored",
        "wide",
        "toy",
    ]


def test_an_old_version_refuses_the_new_encoder_and_the_new_one_the_old(kb):
    old, before = kb.version, found(kb)
    new = kb.reencode(Mirrored())
    assert found(KnowledgeBase.open(kb.path, version=old, encoder=ToyEncoder())) == before
    for version, encoder in ((old, Mirrored()), (new, ToyEncoder())):
        with pytest.raises(EncoderMismatchError, match="reencode"):
            KnowledgeBase.open(kb.path, version=version, encoder=encoder)


def test_a_reader_goes_on_with_the_old_vectors_and_encoder_until_it_refreshes(kb, monkeypatch):
    reader = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    before = found(reader)
    kb.reencode(wide())
    assert found(reader) == before
    loaded = []
    monkeypatch.setattr("ragstone.knowledge.encoding.load", lambda name, spec, **_: loaded.append(name) or wide())
    reader.refresh()
    assert found(reader) == found(kb)
    assert loaded == ["wide"]
    assert reader.width == 48


def test_codes_are_those_of_the_version_that_is_searched(kb, monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 0)
    reader, old = KnowledgeBase.open(kb.path, encoder=ToyEncoder()), kb.version
    for encoder in (Mirrored(), wide(), ToyEncoder()):
        found(kb)  # makes codes, in memory and in their file
        kb.reencode(encoder)
        assert found(kb) == found(kb, "exact")
        assert found(KnowledgeBase.open(kb.path, encoder=encoder)) == found(kb, "exact")
        assert found(reader) == found(reader, "exact")
    again = KnowledgeBase.open(kb.path, version=old, encoder=ToyEncoder())
    assert found(again) == found(reader)


def test_writes_that_follow_go_by_the_new_encoder(kb):
    kb.reencode(wide())
    kb.add([Passage("new", text="new words")])
    kb.upsert([Passage("p1", text="changed")])
    assert check_version(kb.path) == "wide"


def test_given_vectors_of_the_old_encoder_are_refused(kb):
    stale = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    kb.reencode(Mirrored())
    with pytest.raises(EncoderMismatchError, match="re-encoded after this handle was opened"):
        stale.add([Passage("new", text="new")], vectors=np.ones((1, 32)))
    stale.add([Passage("new", text="new")], vectors=np.ones((1, 32)))  # the handle has moved on, and said so


# Interrupted runs


def test_an_interrupted_run_changes_nothing_and_the_next_goes_on_from_there(kb):
    before, version = found(kb), kb.version
    with pytest.raises(KeyboardInterrupt):
        kb.reencode(Interrupted(35), chunk=10)
    assert (found(kb), kb.version) == (before, version)
    assert found(KnowledgeBase.open(kb.path, encoder=ToyEncoder())) == before
    encoder, told = Mirrored(), []
    kb.reencode(encoder, chunk=10, progress=lambda *step: told.append(step))
    assert encoder.encoded == len(kb) - 30
    assert (told[0], told[-1]) == ((30, len(kb), "passages"), (len(kb), len(kb), "passages"))
    assert check_version(kb.path) == "mirrored"


def test_what_changed_between_two_runs_is_encoded_anew(kb):
    with pytest.raises(KeyboardInterrupt):
        kb.reencode(Interrupted(35), chunk=10)
    kb.delete(["p0", "p1"])
    kb.upsert([Passage("p2", text="changed"), Passage("p59", text="changed")])
    kb.add([Passage("new", text="new")])
    encoder = Mirrored()
    kb.reencode(encoder)
    assert encoder.encoded == len(kb) - 30 + 2 + 1  # p0, p1 and p2 had been put aside
    assert check_version(kb.path) == "mirrored"


@pytest.mark.parametrize(("encoder", "resume"), [(Mirrored(), False), (wide(), True)])
def test_what_was_put_aside_serves_that_encoder_only_and_only_on_request(kb, encoder, resume):
    with pytest.raises(KeyboardInterrupt):
        kb.reencode(Interrupted(35), chunk=10)
    kb.reencode(encoder, resume=resume)
    assert encoder.encoded == len(kb)
    assert check_version(kb.path) == encoder.spec.name


def test_damaged_leftovers_are_made_anew(kb):
    with pytest.raises(KeyboardInterrupt):
        kb.reencode(Interrupted(35), chunk=10)
    for file in (kb.path / "reencode.lance" / "_versions").iterdir():
        file.write_bytes(b"")
    kb.reencode(Mirrored())
    assert check_version(kb.path) == "mirrored"


@pytest.mark.parametrize("step", ["drop_columns", "alter_columns"])
def test_a_run_cut_short_after_the_switch_is_tidied_by_the_next_writer(kb, monkeypatch, step):
    with monkeypatch.context() as patch:

        def die(*_):
            raise KeyboardInterrupt

        patch.setattr(type(kb._store._dataset), step, die)
        with pytest.raises(KeyboardInterrupt):
            kb.reencode(wide())
    assert check_version(kb.path) == "wide"
    again = KnowledgeBase.open(kb.path, encoder=wide())
    again.add([Passage("new", text="new")])
    assert again._store._dataset.schema.names.count("vector") == 1
    assert "new_vector" not in again._store._dataset.schema.names
    assert check_version(kb.path) == "wide"


REENCODE = """
import sys
import lance
from ragstone.testing import ToyEncoder, ToyEncoderSpec
from ragstone.knowledge import KnowledgeBase
base, width, name, fingerprint = sys.argv[1:]
encoder = ToyEncoder(int(width), delay=0.002, name=name, fingerprint=fingerprint)
kb = KnowledgeBase.open(base)
print("started", flush=True)
kb.reencode(encoder, chunk=5)
"""


def test_kill_9_leaves_the_old_vectors_or_the_new_and_the_next_run_completes(kb):
    chance = random.Random(0)
    targets = [("48", "wide", "toy-3"), ("32", "toy", "toy-1")]
    killed, current = 0, "toy"
    while killed < 4:
        target = next(t for t in targets if t[1] != current)
        process = subprocess.Popen(
            [sys.executable, "-c", REENCODE, str(kb.path), *target], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() != 0
        current = check_version(kb.path)
    last = next(t for t in targets if t[1] != current)
    subprocess.run([sys.executable, "-c", REENCODE, str(kb.path), *last], check=True, capture_output=True)
    assert check_version(kb.path) == last[1]
    assert not (kb.path / "reencode.lance").exists()


def test_while_a_base_is_reencoded_others_read_it_and_do_not_write(kb):
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(Mirrored):
        def _vector(self, text):
            begun.set()
            go_on.wait()
            return super()._vector(text)

    thread = threading.Thread(target=KnowledgeBase.open(kb.path).reencode, args=(Waiting(),))
    other = KnowledgeBase.open(kb.path, encoder=ToyEncoder())
    before = found(other)
    thread.start()
    begun.wait()
    try:
        with pytest.raises(LockedError):
            other.delete("p1")
        assert found(other) == before
    finally:
        go_on.set()
        thread.join()
    assert check_version(kb.path) == "mirrored"


# Odd bases


def test_the_same_encoder_encodes_nothing_and_removes_what_a_killed_run_left(kb):
    (kb.path / "reencode.lance").mkdir()
    version, encoder = kb.version, ToyEncoder()
    assert kb.reencode(encoder) == version
    assert encoder.encoded == 0
    assert not (kb.path / "reencode.lance").exists()


def test_of_the_same_encoder_elsewhere_only_the_name_is_taken_over(kb):
    version, encoder = kb.version, ToyEncoder(name="elsewhere")
    assert kb.reencode(encoder) == version + 1
    assert encoder.encoded == 0
    assert KnowledgeBase.open(kb.path).info().encoder["name"] == "elsewhere"
    assert KnowledgeBase.open(kb.path, version=version).info().encoder["name"] == "toy"


def test_a_base_of_given_vectors_gets_an_encoder(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=32)
    kb.add(PASSAGES, vectors=np.ones((60, 32)))
    version = kb.version
    kb.reencode(Mirrored())
    assert check_version(kb.path) == "mirrored"
    assert not KnowledgeBase.open(kb.path, version=version).has_encoder


def test_an_empty_base_changes_its_encoder(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.reencode(wide())
    assert kb.search("alpha") == []
    kb.add(PASSAGES)
    assert check_version(kb.path) == "wide"


def test_changing_how_documents_are_split_keeps_the_encoder_of_each_version(kb, tmp_path):
    (tmp_path / "note.txt").write_text("A note.")
    old = kb.version
    kb.reencode(wide())
    kb.add_documents(tmp_path / "note.txt", split=None)
    assert (check_version(kb.path), check_version(kb.path, old)) == ("wide", "toy")
    assert KnowledgeBase.open(kb.path).info().split is None


def test_wrong_arguments_change_nothing(kb, tmp_path):
    with pytest.raises(InputError, match="chunk=0"):
        kb.reencode(Mirrored(), chunk=0)
    with pytest.raises(KnowledgeBaseError, match="for reading only"):
        KnowledgeBase.open(kb.path, version=kb.version).reencode(Mirrored())
    assert check_version(kb.path) == "toy"


def test_a_store_without_an_encoder_of_its_own_must_fit_the_manifest(kb):
    assert Manifest.read(kb.path).encoder["name"] == "toy"
    with pytest.raises(KnowledgeBaseError, match="of width 32"):
        PassageStore.open(kb.path, 8)


# The encoder is part of the data


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "toy-2"),
        ("width", 24),
        ("pooling", "cls"),
        ("normalize", True),
        ("passage_prompt", "passage: "),
        ("question_prompt", "query: "),
    ],
)
def test_an_encoder_that_differs_in_any_field_is_refused_at_open(tmp_path, field, value):
    made_by = Prompted()
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=made_by)
    kb.add(PASSAGES)
    with pytest.raises(EncoderMismatchError, match=rf"{field} .*but the encoder 'toy' has {field} .*reindex"):
        KnowledgeBase.open(kb.path, encoder=Prompted(**{field: value}))
    assert KnowledgeBase.open(kb.path, encoder=Prompted()).search("alpha text 3", k=1)


def test_another_question_prompt_is_taken_over_and_encodes_nothing(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=Prompted())
    kb.add(PASSAGES)
    reader = KnowledgeBase.open(kb.path, encoder=Prompted())
    asking = Prompted(question_prompt="query: ")
    kb.reencode(asking)
    assert asking.encoded == 0
    assert KnowledgeBase.open(kb.path, encoder=asking).encoder_spec["question_prompt"] == "query: "
    assert reader.encoder_spec["question_prompt"] == ""
    reader.refresh()
    assert reader._snapshot._encoder is None  # it would ask as before; the one that the base names is loaded


def test_another_metric_is_refused(kb):
    manifest = json.loads((kb.path / "manifest.json").read_text())
    (kb.path / "manifest.json").write_text(json.dumps({**manifest, "metric": "cosine"}))
    for call in (lambda: KnowledgeBase.open(kb.path), lambda: kb.add([Passage("new", text="new")])):
        with pytest.raises(EncoderMismatchError, match="compares vectors by 'cosine'"):
            call()


@dataclass(frozen=True)
class PromptedSpec(ToyEncoderSpec):
    question_prompt: str = ""
    passage_prompt: str = ""


class Prompted(ToyEncoder):
    """Has prompts in its description."""

    def __init__(self, width=32, **fields):
        super().__init__(width)
        self.spec = PromptedSpec(width, **fields)
