"""Several processes: what they make is what one makes, and their end is the end of nothing else."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ragstone.errors import InputError, KnowledgeBaseError, ModelError
from ragstone.knowledge import KnowledgeBase, Passage, SplitOptions, workers
from ragstone.testing import ToyEncoder, question_tokenizer, tiny_question_encoder

TEXTS = [f"alpha beta text {i} " + "word " * (i % 13) for i in range(40)]
FIVE_WORDS = SplitOptions(words=5)


class Uneven(ToyEncoder):
    """Takes its time over the first passages, so that later ones are done before."""

    def encode_passages(self, pairs, *, progress=None):
        if any("text 0 " in text or "text 1 " in text for _, text in pairs):
            time.sleep(0.5)
        return super().encode_passages(pairs, progress=progress)


class Dies(ToyEncoder):
    """Its process is killed when it comes to a certain passage."""

    def encode_passages(self, pairs, *, progress=None):
        if any("text 29 " in text for _, text in pairs):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_passages(pairs, progress=progress)


class Fails(ToyEncoder):
    def _vector(self, text):
        if "text 29 " in text:
            raise ModelError("no vector for text 29")
        return super()._vector(text)


class Pid(ToyEncoder):
    """A vector says which process made it."""

    def _vector(self, text):
        return np.full(self.width, os.getpid() % 100_000, np.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(workers, "PIECE_PASSAGES", 3)


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


def content(kb):
    """All that is stored, vectors included, in the order in which it was committed."""
    columns = ["id", "document_id", "source", "position", "content_hash", "title", "text", "vector"]
    return KnowledgeBase.open(kb.path)._store.scan(columns).drop_columns(["_rowid"]).to_pylist()


def passages_a_version(kb):
    return [version.passages for version in kb.versions()]


def test_what_several_make_is_what_one_makes_whoever_is_done_first(tmp_path, notes):
    one = KnowledgeBase.create(tmp_path / "one", encoder=ToyEncoder())
    several = KnowledgeBase.create(tmp_path / "several", encoder=Uneven())
    calls = []
    report = several.add_documents(
        notes, split=FIVE_WORDS, chunk_passages=8, workers=3, progress=lambda *call: calls.append(call)
    )
    expected = one.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    assert (report.documents, report.passages) == (expected.documents, expected.passages)
    assert content(several) == content(one)
    assert passages_a_version(several) == passages_a_version(one)
    done = [done for done, _, unit in calls if unit == "passages"]
    assert done == sorted(done)
    assert (done[-1], calls[-1][1]) == (report.passages, report.passages)


def test_a_base_is_reencoded_by_several(tmp_path):
    passages = [Passage(f"p{i}", "t", text) for i, text in enumerate(TEXTS)]
    bases = []
    for name, how in (("one", 1), ("several", 2)):
        base = KnowledgeBase.create(tmp_path / name, encoder=ToyEncoder())
        base.add(passages)
        base.reencode(Uneven(24, name="other", fingerprint="toy-2"), chunk=7, workers=how)
        bases.append(base)
    assert content(bases[0]) == content(bases[1])
    assert bases[1].width == 24


def test_they_share_the_work_and_this_process_does_none(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    base.add([Passage(f"p{i}", text=text) for i, text in enumerate(TEXTS)])
    base.reencode(Pid(1, fingerprint="pid"), chunk=9, workers=["cpu", "cpu"])
    makers = {int(row["vector"][0]) for row in content(base)}
    assert 1 <= len(makers) <= 2
    assert os.getpid() % 100_000 not in makers


def test_for_a_few_passages_no_process_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PIECE_PASSAGES", 40)
    monkeypatch.setattr(workers, "_Processes", None)
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    base.add([Passage(f"p{i}", text=text) for i, text in enumerate(TEXTS)])
    base.reencode(ToyEncoder(fingerprint="toy-2"), workers=4)
    with pytest.raises(TypeError):  # the double is no class: two chunks do start them
        base.reencode(ToyEncoder(fingerprint="toy-3"), workers=4, chunk=20)


def test_a_worker_that_dies_is_an_error_and_the_next_run_goes_on(tmp_path, notes):
    whole = KnowledgeBase.create(tmp_path / "whole", encoder=ToyEncoder())
    whole.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    base = KnowledgeBase.create(tmp_path / "kb", encoder=Dies())
    with pytest.raises(KnowledgeBaseError, match=r"worker process ended.*fewer workers"):
        base.add_documents(notes, split=FIVE_WORDS, chunk_passages=8, workers=2)
    kept = content(base)
    assert kept == content(whole)[: len(kept)]
    again = KnowledgeBase.open(base.path, encoder=ToyEncoder())
    assert again.add_documents(notes, chunk_passages=8, workers=2).passages == len(content(whole)) - len(kept)
    assert content(base) == content(whole)


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path, notes):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=Fails())
    with pytest.raises(ModelError, match="no vector for text 29"):
        base.add_documents(notes, split=FIVE_WORDS, chunk_passages=8, workers=2)


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    base.add([Passage(f"p{i}", text=text) for i, text in enumerate(TEXTS)])
    with pytest.raises(ModelError, match="passage 'p0' is not finite"):
        base.reencode(Infinite(fingerprint="toy-2"), chunk=9, workers=2)


class Infinite(ToyEncoder):
    def _vector(self, text):
        return super()._vector(text) * np.inf


@pytest.mark.parametrize("wrong", [0, -1, [], "cuda:0"])
def test_wrong_numbers_of_workers_are_refused(tmp_path, wrong):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    for call in (lambda: base.add_documents(tmp_path, workers=wrong), lambda: base.reencode(Uneven(), workers=wrong)):
        with pytest.raises(InputError, match="workers="):
            call()


def test_an_encoder_that_cannot_be_sent_is_an_error_with_a_remedy(tmp_path, notes):
    encoder = ToyEncoder()
    encoder.hook = lambda: None
    base = KnowledgeBase.create(tmp_path / "kb", encoder=encoder)
    with pytest.raises(InputError, match=r"cannot be sent to another process.*use workers=1"):
        base.add_documents(notes, split=FIVE_WORDS, chunk_passages=8, workers=2)


def test_slow_files_are_read_by_several_in_the_order_of_one(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.{'html' if i % 3 else 'txt'}").write_text(f"<p>{text}</p>")
    (folder / "07.html").write_bytes(b"")
    bases = []
    for name, how in (("one", 1), ("several", 2)):
        base = KnowledgeBase.create(tmp_path / name, encoder=ToyEncoder())
        report = base.add_documents(folder, workers=how)
        assert [Path(skipped.path).name for skipped in report.skipped] == ["07.html"]
        bases.append(base)
    assert content(bases[0]) == content(bases[1])


# Real encoders, which are loaded by name


@pytest.fixture
def encoder_folder(tmp_path):
    tiny_question_encoder().save_pretrained(tmp_path / "encoder")
    question_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_named_encoder_is_loaded_by_each_worker_as_it_is_here(tmp_path, encoder_folder):
    from ragstone.encoders import load_encoder

    encoder = load_encoder(encoder_folder, device="cpu", dtype="float32", pooling="cls", passage_prompt="passage: ")
    passages = [Passage(f"p{i}", "t", text) for i, text in enumerate(TEXTS)]
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=3)
    base.add(passages, vectors=np.ones((len(passages), 3)))
    base.reencode(encoder, chunk=16, workers=2)
    expected = encoder.encode_passages([("t", text) for text in TEXTS])
    apart = np.linalg.norm(base.vectors([p.id for p in passages]) - expected, axis=1)
    assert (apart <= 1e-6 * np.linalg.norm(expected, axis=1)).all()  # the batches differ, so the rounding does
    assert base.info().encoder == encoder.spec.to_dict()


def test_an_encoder_that_was_trained_in_memory_is_refused(tmp_path, encoder_folder):
    from ragstone.encoders import load_encoder

    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    base.add([Passage(f"p{i}", text=text) for i, text in enumerate(TEXTS)])
    encoder = load_encoder(encoder_folder, device="cpu", dtype="float32")
    encoder.model.embeddings.word_embeddings.weight.data += 1
    with pytest.raises(InputError, match=r"was trained since it was loaded.*workers=1"):
        base.reencode(encoder, chunk=16, workers=2)


def test_another_encoder_under_the_same_name_is_refused(encoder_folder):
    from ragstone.encoders import load_encoder

    recipe = pickle.loads(workers._recipe(load_encoder(encoder_folder, device="cpu", dtype="float32"), 2))
    assert recipe.load("cpu").spec.to_dict() == recipe.spec
    tiny_question_encoder(seed=1).save_pretrained(encoder_folder)
    with pytest.raises(ModelError, match="is not the encoder in memory"):
        recipe.load(None)
    (encoder_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Each worker loads the encoder by its name"):
        recipe.load(None)


# The end of the process that started them

INDEX = """
import os, signal, sys
from ragstone.knowledge import KnowledgeBase, SplitOptions, workers
from ragstone.testing import ToyEncoder
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs these tests may ignore it
    workers.PIECE_PASSAGES = 3
    base, notes = sys.argv[1:]
    told = lambda done, total, unit: unit == "passages" and print(done, flush=True)
    KnowledgeBase.create(base, encoder=ToyEncoder(delay=0.05)).add_documents(
        notes, split=SplitOptions(words=5), chunk_passages=8, workers=2, progress=told)
"""


def members(group):
    """The processes of a group that still run."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return [pid for pid, of, state in rows if int(of) == group and not state.startswith("Z")]


@pytest.mark.parametrize(("how", "after"), [(signal.SIGINT, 0), (signal.SIGINT, 12), (signal.SIGKILL, 12)])
def test_the_end_of_the_run_is_the_end_of_its_workers_and_loses_nothing(tmp_path, notes, how, after):
    (tmp_path / "index.py").write_text(INDEX)
    command = [sys.executable, tmp_path / "index.py", tmp_path / "kb", notes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen(
        command, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if after:
        while int(run.stdout.readline()) < after:
            pass
    else:
        while len(members(run.pid)) < 3:  # as its workers start
            time.sleep(0.1)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # as a terminal does
    else:
        run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode != 0
    if how == signal.SIGINT:
        assert said.count("Traceback") == 1  # that of the run; its workers say nothing
        assert said.strip().endswith("KeyboardInterrupt")
    patience = time.monotonic() + 30
    while members(run.pid):
        assert time.monotonic() < patience
        time.sleep(0.1)
    base = KnowledgeBase.open(tmp_path / "kb", encoder=ToyEncoder())
    kept = content(base)
    assert len(kept) >= after - 8 - 2 * 3  # what was encoded and not committed is of one chunk
    whole = KnowledgeBase.create(tmp_path / "whole", encoder=ToyEncoder())
    whole.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    assert kept == content(whole)[: len(kept)]
    base.add_documents(notes, split=FIVE_WORDS, chunk_passages=8)
    assert content(base) == content(whole)


def test_a_file_that_vanishes_before_a_worker_reads_it_is_skipped(tmp_path):
    (found,) = workers._read(tmp_path / "gone.pdf")
    assert "does not exist" in found.reason
