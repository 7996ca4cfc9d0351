"""A tiny model and a knowledge base for the command line."""

import json

import pytest
from command import ragstone
from transformers.utils import logging

from ragstone.testing import TOY_PASSAGES, question_tokenizer, tiny_question_encoder, tiny_rag


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder folder and a RAG model folder whose question encoder it is."""
    root = tmp_path_factory.mktemp("models")
    tiny_question_encoder().save_pretrained(root / "encoder")
    question_tokenizer().save_pretrained(root / "encoder")
    model, tokenizer = tiny_rag("token", "bart")
    model.save_pretrained(root / "rag")
    tokenizer.save_pretrained(root / "rag")
    return root


@pytest.fixture
def notes(tmp_path):
    """A folder of files, one of which cannot be read."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for title, text in TOY_PASSAGES:
        (folder / f"{title}.txt").write_text(text, encoding="utf-8")
    (folder / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    return folder


@pytest.fixture(autouse=True)
def offline_and_unchanged(monkeypatch):
    """No hub is asked, nothing says how wide lines are, and the libraries' own logging is left as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def base(models, notes, tmp_path):
    done = ragstone("index", notes, "--kb", tmp_path / "kb", "--encoder", models / "encoder", "--json")
    assert done.returncode == 0, done.stderr
    return tmp_path / "kb", json.loads(done.stdout)
