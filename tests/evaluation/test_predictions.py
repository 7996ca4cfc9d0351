"""Summaries are means over all questions, files hold every prediction, and two runs compare question by question."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest

from ragstone.errors import DataError, InputError, MissingExtraError
from ragstone.evaluation import (
    Prediction,
    ReadPassage,
    compare,
    read_predictions,
    read_run,
    results,
    summarize,
    write_predictions,
    write_run,
)
from ragstone.evaluation.wording import explanation, grouped


def prediction(id_, exact, posterior=(0.5, 0.5), ids=("a", "b"), error="", **scores):
    passages = tuple(
        ReadPassage(i, "T", f"text of {i}", 2.0 - n, p, p, False)
        for n, (i, p) in enumerate(zip(ids, posterior, strict=True))
    )
    return Prediction(
        id_,
        f"question {id_}?",
        ("yes", "ja"),
        (),
        "" if error else "ja\n<b>",
        None if error else math.log(0.75),
        None if error else 0.75,
        bool(exact),
        {"exact_match": float(exact), **scores},
        () if error else passages,
        error,
    )


RUN = [
    prediction("1", 1, f1=1.0),
    prediction("2", 0, (1.0, 0.0), ("c", "d"), f1=0.5),
    prediction("3", 0, ids=("b", "a"), f1=0.0),
    prediction("4", 0, error="no passage", f1=0.0),
]


def test_the_summary_is_the_mean_and_a_question_without_an_answer_counts():
    evaluation = summarize(RUN, settings={"k": 2})
    assert evaluation.summary["exact_match"] == 0.25
    assert evaluation.summary["f1"] == pytest.approx(1.5 / 4)
    assert evaluation.summary["calibration_error"] == pytest.approx(0.75 - 1 / 3)
    assert evaluation.summary["posterior_entropy"] == pytest.approx(2 * math.log(2) / 3)
    assert evaluation.summary["posterior_entropy_share"] == pytest.approx(2 / 3)
    assert evaluation.summary["same_passages"] == pytest.approx(2 / 3)
    low, high = evaluation.intervals["f1"]
    assert 0 <= low < 1.5 / 4 < high <= 1
    values = json.loads(json.dumps(evaluation.to_dict()))
    assert (values["n"], values["unanswered"], values["settings"]) == (4, 1, {"k": 2})
    with pytest.raises(InputError, match="no predictions"):
        summarize([])


def test_a_score_is_averaged_over_the_questions_that_have_it():
    assert summarize([prediction("1", 1, hit_at_1=1.0), prediction("2", 0)]).summary["hit_at_1"] == 1.0


def test_wrong_answers_are_the_reader_s_or_the_retriever_s():
    def judged(id_, exact, gold):
        return replace(prediction(id_, exact, reciprocal_rank=0.0), positive_ids=(gold,))

    run = [judged("1", 1, "a"), judged("2", 0, "b"), judged("3", 0, "z"), judged("4", 1, "z"), judged("5", 1, "a")]
    summary = summarize([*run, prediction("6", 0)]).summary
    assert summary["correct_where_found"] == pytest.approx(2 / 3)
    assert (summary["reading_errors"], summary["retrieval_errors"]) == (1 / 5, 1 / 5)
    assert "correct_where_found" not in summarize(run[2:4]).summary
    assert "reading_errors" not in summarize(RUN).summary


def test_one_passage_has_no_share_of_log_1():
    summary = summarize([prediction("1", 1, (1.0,), ("a",))]).summary
    assert summary["posterior_entropy"] == 0.0
    assert "posterior_entropy_share" not in summary


def test_without_scipy_there_is_a_summary_and_a_warning(monkeypatch, caplog):
    def missing(values, seed):
        raise MissingExtraError("A confidence interval needs scipy")

    monkeypatch.setattr(results, "bootstrap_interval", missing)
    with caplog.at_level(logging.WARNING):
        evaluation = summarize(RUN)
    assert evaluation.summary["exact_match"] == 0.25
    assert evaluation.intervals == {}
    assert "needs scipy" in caplog.text


def test_predictions_come_back_as_they_were_written(tmp_path):
    write_predictions(tmp_path / "p.jsonl", RUN)
    assert read_predictions(tmp_path / "p.jsonl") == RUN


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "1"}', '{"question": "who?", "answers": ["a"]}'])
def test_files_that_hold_no_predictions_are_refused(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"p\.jsonl.*--predictions"):
        read_predictions(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        read_predictions(tmp_path / "nowhere")


@pytest.mark.parametrize("scores", [3, {"f1": None}, {"f1": math.nan}, {"f1": "1"}, {"f1": 10**400}, {"f1": True}])
def test_scores_that_are_no_numbers_are_refused(tmp_path, scores):
    write_predictions(tmp_path / "p.jsonl", [replace(RUN[1], scores={})])
    line = json.loads((tmp_path / "p.jsonl").read_text())
    (tmp_path / "p.jsonl").write_text(json.dumps(line | {"scores": scores}))
    with pytest.raises(DataError, match=r"p\.jsonl, line 1 is no prediction"):
        read_predictions(tmp_path / "p.jsonl")


def test_runs_are_compared_question_by_question_in_any_order():
    better = [prediction(p.id, 1, f1=1.0) for p in reversed(RUN)]
    found = compare(RUN, better)
    assert set(found) == {"exact_match", "f1"}
    assert (found["exact_match"].mean, found["exact_match"].other_mean) == (0.25, 1.0)
    assert found["f1"].difference == pytest.approx(1.5 / 4 - 1)
    assert found["f1"].p_value == pytest.approx(2 / 8)  # three questions differ, all in one direction
    assert compare(RUN, RUN)["f1"].p_value == 1.0


def test_runs_over_other_questions_are_refused():
    with pytest.raises(InputError, match="1 differ, such as the one with the id '4'"):
        compare(RUN, RUN[:3])
    renamed = [*RUN[:3], Prediction(**{**vars(RUN[3]), "question": "another?"})]
    with pytest.raises(InputError, match="the id '4'"):
        compare(RUN, renamed)


def test_a_run_file_comes_back_best_first_and_ids_may_hold_blanks(tmp_path):
    spaced = [prediction("q", 1, (0.2, 0.8), ("my file.txt#1", "b"))]
    write_run(tmp_path / "run", spaced)
    assert read_run(tmp_path / "run") == {"q": [("my file.txt#1", 2.0), ("b", 1.0)]}
    (tmp_path / "run").write_text("q Q0 b 1 0.5 t\n\nq Q0 a 2 0.7 t\r\nr\tQ0\tc\t1\t-1e3\tt\nq Q0 z 3 0.5 t")
    assert read_run(tmp_path / "run") == {"q": [("a", 0.7), ("b", 0.5), ("z", 0.5)], "r": [("c", -1000.0)]}
    with pytest.raises(InputError, match="'two words' has blanks"):
        write_run(tmp_path / "run", [prediction("two words", 1)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no ranking"),
        ("q Q0 a 1 0.5", "line 1"),
        ("q Q0 a 1 0.5 t\nq Q0 a 1 high t", "line 2"),
        ("q Q0 a 1 nan t", "finite"),
        ("q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t", "ranked twice for the question 'q'"),
    ],
)
def test_run_files_that_cannot_be_used_are_refused(tmp_path, text, words):
    (tmp_path / "run").write_text(text)
    with pytest.raises(DataError, match=words):
        read_run(tmp_path / "run")


def test_every_number_of_a_summary_has_a_name_and_an_explanation():
    summary = summarize([prediction("1", 1, f1=1.0, recall_at_5=1.0, ndcg_at_10=1.0, accuracy=1.0)]).summary
    names = [name for group in grouped(summary).values() for name in group]
    assert sorted(names) == sorted(summary)
    assert all(explanation(name) for name in names)
