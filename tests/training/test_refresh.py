"""The worker re-encodes while its parent goes on; whatever becomes of either, the base is whole."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ragstone.encoders import load_encoder
from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase
from ragstone.testing import question_tokenizer, tiny_question_encoder, toy_passages
from ragstone.training import PassageRefresher


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two encoders of one width, and one that is wider."""
    root = tmp_path_factory.mktemp("encoders")
    for name, options in {"first": {}, "second": {"seed": 1}, "wide": {"hidden_size": 32}}.items():
        tiny_question_encoder(**options).save_pretrained(root / name)
        question_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def kb(encoders, tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=encoders / "first", dtype="float32")
    kb.add(toy_passages())
    return kb


def wait_for(refresher):
    while (version := refresher.poll()) is None and refresher.running:
        time.sleep(0.05)
    return version


def found(kb):
    return [(hit.passage.id, hit.score) for hit in kb.search(vectors=np.ones(kb.width), k=8)]


def test_retrieval_goes_on_with_the_old_vectors_and_moves_when_polled(kb, encoders):
    before, version = found(kb), kb.version
    with PassageRefresher(kb.path, dtype="float32", threads=1, chunk=3) as refresher:
        assert (refresher.running, refresher.poll()) == (False, None)
        refresher.start(encoders / "wide")
        assert refresher.running
        with pytest.raises(InputError, match="still being re-encoded"):
            refresher.start(encoders / "second")
        new = wait_for(refresher)
        assert new > version
        assert (refresher.running, refresher.poll()) == (False, None)
    assert (found(kb), kb.version) == (before, version)
    kb.refresh()
    assert (kb.width, kb.version) == (32, new)
    rows = kb._store.row_ids()
    ids, vectors = kb._store.ids_of(rows), kb._store.vectors_of(rows)
    wide = load_encoder(encoders / "wide", dtype="float32")
    np.testing.assert_allclose(vectors, wide.encode_passages([(p.title, p.text) for p in kb.get(ids)]), atol=1e-5)


def test_what_goes_wrong_in_the_worker_is_one_sentence_here_and_the_base_is_as_it_was(kb, tmp_path, encoders):
    before, version = found(kb), kb.version
    with PassageRefresher(kb.path) as refresher:
        refresher.start(tmp_path / "nowhere")
        with pytest.raises(
            KnowledgeBaseError, match=r"was not re-encoded with .*nowhere: The encoder .*nowhere.* is ne"
        ):
            wait_for(refresher)
        assert not refresher.running
        refresher.start(encoders / "second")
        os.kill(refresher._worker.pid, signal.SIGKILL)
        with pytest.raises(KnowledgeBaseError, match="exit code -9"):
            wait_for(refresher)
    kb.refresh()
    assert (found(kb), kb.version) == (before, version)


def test_closing_ends_the_worker(kb, encoders):
    refresher = PassageRefresher(kb.path)
    refresher.start(encoders / "second")
    worker = refresher._worker
    refresher.close()
    assert worker.poll() is not None
    assert (refresher.running, refresher.poll()) == (False, None)
    refresher.close()
    kb.delete("toy-0")  # the lock went with it


PARENT = """
import os, sys
from ragstone.training import PassageRefresher
refresher = PassageRefresher(sys.argv[1])
refresher.start(sys.argv[2])
print(refresher._worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_worker_ends_with_its_parent_even_one_that_is_killed(kb, encoders):
    with kb._writing():  # so that the worker waits, and would for a minute
        parent = subprocess.run(
            [sys.executable, "-c", PARENT, str(kb.path), str(encoders / "second")], stdout=subprocess.PIPE, text=True
        )
        worker = int(parent.stdout)
        deadline = time.monotonic() + 30
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(worker)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
