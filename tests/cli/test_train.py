"""``ragstone train``: the plan, a run, its end, and what is refused."""

import json
import sys

import pytest
from command import ragstone

from ragstone import RagPipeline
from ragstone.cli.training import slow_allocator
from ragstone.training.presets import PRESETS, SOURCES

pytest.importorskip("accelerate")
pytest.importorskip("peft")

QUESTIONS = [
    {"question": "who wrote Hamlet?", "answers": ["Shakespeare", "William Shakespeare"]},
    {"question": "capital of France", "answers": ["Paris"]},
    {"question": "who discovered radium", "answers": ["Marie Curie"]},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return file


@pytest.fixture
def train(base, models, questions, tmp_path):
    def run(*arguments):
        given = [base[0], questions, "--model", models / "rag", "--out", tmp_path / "out", "-k", 2, "--batch-size", 2]
        return ragstone("train", *given, *arguments)

    return run


def test_a_model_is_trained_saved_and_asked(train, base, tmp_path, questions):
    done = train("--steps", 3, "--lora-rank", 2, "--dev", questions, "--eval-every", 1, "--patience", 5, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 3
    assert summary["eval_loss"] > 0
    rag = RagPipeline.from_pretrained(tmp_path / "out", knowledge_base=base[0])
    assert rag.model.config.n_docs == 2
    assert len(rag("capital of France", max_new_tokens=3).passages) == 2
    ask = ["ask", base[0], "capital of France", "--model", tmp_path / "out", "--max-new-tokens", 3, "--json"]
    assert len(json.loads(ragstone(*ask).stdout)["passages"]) == 2, "the K that it was trained for"
    assert len(json.loads(ragstone(*ask, "-k", 3).stdout)["passages"]) == 3


@pytest.mark.parametrize("missing", ["accelerate", "peft"])
def test_a_missing_extra_is_named_with_its_remedy(train, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    done = train("--steps", 1, "--lora-rank", 2)
    assert done.returncode == 1
    assert f'needs {missing}; pip install "ragstone[training]"' in " ".join(done.stderr.split())


def test_an_interrupted_run_says_where_it_goes_on(train, tmp_path, monkeypatch):
    def stop_at_two(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("transformers.TrainerCallback.on_step_begin", stop_at_two)
    done = train("--steps", 4, "--save-every", 1)
    assert done.returncode == 130
    said = "".join(done.stderr.split())
    assert "Interruptedafter2steps" in said
    assert f"--resumegoesonfrom{tmp_path / 'out' / 'checkpoints' / 'checkpoint-2'}" in said


def test_a_dry_run_prints_the_plan_with_measured_time_and_writes_nothing(train, tmp_path):
    done = train("--epochs", 10, "--dry-run", "--json", "--null-passage", "bias")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 20
    assert plan["seconds a step"] > 0
    assert plan["memory in GB"] > 0
    assert not (tmp_path / "out").exists()
    assert "learning rate" in train("--steps", 1, "--dry-run").stderr


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_the_paper_sets_and_names_its_source(train, name):
    done = train("--preset", name, "--dry-run", "--json", "--test-k", 3)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["learning rate"] == 3e-5
    assert plan["label smoothing"] == 0.1
    assert plan["options"]["test_k"] == 3, "what is said on the command line wins"
    assert set(PRESETS[name].__dataclass_fields__) <= {word.strip() for key in SOURCES for word in key.split(",")} | {
        "test_k_sequence",
        "test_k_token",
    }


def test_a_second_run_into_the_same_folder_goes_on_or_is_refused(train, tmp_path):
    assert train("--steps", 2, "--save-every", 1).returncode == 0
    again = train("--steps", 4, "--save-every", 1)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    done = train("--steps", 4, "--save-every", 1, "--resume", "--json")
    assert json.loads(done.stdout)["steps"] == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--preset", "paper"], "no preset"),
        (["--eval-every", "1"], "--dev"),
        (["--patience", "1"], "--eval-every"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--epochs", "nan"], "--epochs is nan"),
        (["--label-smoothing", "nan"], "label_smoothing is nan"),
        (["--label-smoothing", "1"], "below 1"),
        (["--score-scale", "inf"], "score_scale is inf"),
        (["--seed", "-1"], "--seed"),
        (["--dev-metric", "foo"], "dev_metric is 'foo'"),
        (["--answers", "most"], "answers"),
        (["--adapters", "anywhere"], "give the ranks"),
        (["--freeze-generator", "--freeze-question-encoder"], "Nothing is left"),
        (["--null-passage", "empty"], "null_passage"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(train, wrong, said):
    done = train("--steps", 1, *wrong)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_model_to_start_from_is_not_written_over(train, models):
    before = (models / "rag" / "config.json").read_bytes()
    for folder in (models / "rag", models / "rag" / "config.json"):
        done = train("--steps", 1, "--lora-rank", 2, "--out", folder)
        assert done.returncode == 2
        assert "name another folder" in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert (models / "rag" / "config.json").read_bytes() == before


def test_dev_questions_are_measured_at_the_end_where_nothing_else_is_said(train, questions):
    done = train("--steps", 1, "--dev", questions, "--dev-metric", "f1", "--json")
    assert {"eval_loss", "eval_f1"} <= set(json.loads(done.stdout))


def test_a_run_of_a_preset_chooses_among_its_labels(train, tmp_path):
    claims = tmp_path / "claims.jsonl"
    rows = [{"question": "Paris is a city", "answers": ["SUPPORTS"]}, {"question": "Radium", "answers": ["REFUTES"]}]
    claims.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--steps", 1, "-k", 2, "--test-k", 2, "--dev", claims, "--dev-metric", "accuracy", "--json"]
    done = train("--preset", "fever2", *settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval_accuracy"] in (0.0, 0.5, 1.0)


def test_a_resumption_without_a_checkpoint_says_that_it_begins_anew(train):
    done = train("--steps", 1, "--resume")
    assert done.returncode == 0
    assert "begins anew" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("loaded", "device", "slow"),
    [
        ("/lib/libc.so.6", "cpu", True),
        ("/lib/libc.so.6", "cuda", False),
        ("/lib/libc.so.6\n/lib/libjemalloc.so.2", "cpu", False),
        ("/lib/ld-musl.so", "cpu", False),
        (None, "cpu", False),
    ],
)
def test_the_plan_tells_of_an_allocator_that_wears_out(tmp_path, loaded, device, slow):
    maps = tmp_path / "maps"
    if loaded is not None:
        maps.write_text(loaded)
    assert slow_allocator(device, str(maps)) is slow
