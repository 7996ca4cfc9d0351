"""evaluate: what is judged is what the pipeline says, and no question is lost on the way."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from ragstone import KnowledgeBase, RagPipeline
from ragstone.errors import InputError, ModelError
from ragstone.evaluation import Question, evaluate, read_run, write_run
from ragstone.testing import TOY_PASSAGES, tiny_rag, toy_passages

QUESTIONS = [
    Question("who wrote hamlet?", ("William Shakespeare",), "q1", ("toy-0",)),
    Question("capital of France", ("Paris",), "q2"),
    Question("how high is everest", ("8,849 metres",), "q3", ("toy-1", "toy-7")),
]


@pytest.fixture(params=[("token", "bart"), ("sequence", "t5"), ("token", "llama"), ("sequence", "llama")], ids="-".join)
def rag(request, tmp_path):
    model, tokenizer = tiny_rag(*request.param, seed=3, n_docs=3)
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    pipeline = RagPipeline(model, tokenizer, base)
    base.add(toy_passages(), vectors=pipeline.retriever.encode_passages(toy_passages()))
    return pipeline


def test_predictions_are_the_pipeline_s_answers(rag):
    seen = []
    evaluation = evaluate(
        rag, QUESTIONS, k=4, max_new_tokens=3, progress=lambda done, total, unit: seen.append((done, total, unit))
    )
    assert seen == [(3, 3, "questions")]
    answers = rag([q.question for q in QUESTIONS], k=4, max_new_tokens=3)
    for prediction, answer, question in zip(evaluation.predictions, answers, QUESTIONS, strict=True):
        assert (prediction.id, prediction.prediction) == (question.id, answer.text)
        assert prediction.log_prob == pytest.approx(answer.log_prob, abs=1e-5)
        assert prediction.confidence == pytest.approx(math.exp(answer.log_prob), rel=1e-4)
        assert [p.id for p in prediction.passages] == [e.passage.id for e in answer.passages]
        assert [p.posterior for p in prediction.passages] == pytest.approx([e.posterior for e in answer.passages])
    assert evaluation.settings["k"] == 4
    assert evaluation.settings["method"] == rag.method
    assert set(evaluation.summary) >= {"exact_match", "f1", "contains", "recall_at_3", "recall_at_4", "same_passages"}


def test_rankings_are_judged_by_gold_passages_or_else_by_the_answer_s_words(rag):
    found = {p.id: p for p in evaluate(rag, QUESTIONS, k=8, search="keyword", max_new_tokens=2).predictions}
    hamlet, paris, everest = found["q1"], found["q2"], found["q3"]
    assert hamlet.scores["recall_at_1"] == hamlet.scores["reciprocal_rank"] == 1.0
    assert paris.passages[0].holds_answer
    assert paris.scores["hit_at_1"] == paris.scores["recall_at_1"] == 1.0
    assert everest.scores["hit_at_8"] == 1.0
    ranked = [passage.id for passage in everest.passages]
    assert everest.scores["recall_at_8"] == len({"toy-1", "toy-7"} & set(ranked)) / 2


def test_a_question_without_hits_is_unanswered_and_wrong_and_the_others_are_answered(rag):
    lost = Question("zzzyx qwrt", ("Paris",), "lost")
    evaluation = evaluate(rag, [*QUESTIONS, lost], search="keyword", max_new_tokens=2)
    *others, last = evaluation.predictions
    assert not any(prediction.error for prediction in others)
    assert last.error
    assert (last.prediction, last.log_prob, last.correct) == ("", None, False)
    assert set(last.scores) == set(others[0].scores)
    assert not any(last.scores.values())
    values = evaluation.to_dict()
    assert (values["n"], values["unanswered"]) == (4, 1)
    together = [p.scores["recall_at_3"] for p in evaluation.predictions]
    assert evaluation.summary["recall_at_3"] == pytest.approx(sum(together) / 4)


@pytest.mark.parametrize("k", [1, 50])
def test_an_evaluation_goes_on_unless_none_of_the_first_8_can_be_answered(rag, k):
    lost = [Question("zzzyx qwrt", ("Paris",), f"lost {n}") for n in range(8)]
    run = evaluate(rag, [*lost[:7], *QUESTIONS], k=k, search="keyword", max_new_tokens=1).predictions
    assert [bool(each.error) for each in run] == [True] * 7 + [False] * 3
    seen = []
    with pytest.raises(InputError):
        evaluate(rag, [*lost, *QUESTIONS], k=k, search="keyword", progress=lambda *done: seen.append(done))
    assert all(done < 8 for done, *_ in seen)


def test_questions_are_answered_together_as_their_passages_allow_not_as_k_does(rag):
    seen = []
    evaluate(rag, QUESTIONS, k=1000, max_new_tokens=1, progress=lambda done, *_: seen.append(done))
    assert seen == [3]  # the base holds 8 passages


@pytest.mark.parametrize("labels", [None, ["Paris", "London"]])
def test_a_model_of_nan_is_said_to_be_one(labels):
    model, tokenizer = tiny_rag("token", "bart", n_docs=2)
    rag = RagPipeline(model, tokenizer)
    rag.retriever = rag.retriever.with_index(toy_passages())
    with torch.no_grad():
        model.generator.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(ModelError, match="hold NaN"):
        evaluate(rag, QUESTIONS[1:2], labels=labels)


def test_what_is_wrong_with_every_question_is_raised(rag):
    for options in ({"k": 0}, {"search": "psychic"}, {"where": "no such column = 1"}, {"where": "title = 'nowhere'"}):
        with pytest.raises(InputError):
            evaluate(rag, QUESTIONS, max_new_tokens=2, **options)
    with pytest.raises(TypeError):
        evaluate(rag, QUESTIONS, max_new_tokenz=2)
    with pytest.raises(InputError, match="no questions"):
        evaluate(rag, [])
    with pytest.raises(InputError, match="id 'q2'"):
        evaluate(rag, [*QUESTIONS, QUESTIONS[1]])
    with pytest.raises(InputError, match="seed=-1"):
        evaluate(rag, QUESTIONS, seed=-1)
    with pytest.raises(InputError, match=r"\(un"):
        evaluate(rag, [Question("why?", ("(un",), "1")], regex=True)


def test_labels_are_scored_as_score_of_scores_them(rag):
    labels = ["SUPPORTS", "REFUTES", "NOT ENOUGH INFO"]
    claims = [Question(q.question, (labels[n],), q.id, q.positive_ids) for n, q in enumerate(QUESTIONS)]
    evaluation = evaluate(rag, claims, labels=labels)
    answers = rag([q.question for q in claims], max_new_tokens=1)
    for prediction, answer, claim in zip(evaluation.predictions, answers, claims, strict=True):
        scores = {label: answer.score_of(label) for label in labels}
        best = max(labels, key=lambda label: scores[label].log_prob)
        assert prediction.prediction == best
        assert prediction.log_prob == pytest.approx(scores[best].log_prob, abs=1e-4)
        assert [p.posterior for p in prediction.passages] == pytest.approx(scores[best].posterior, abs=1e-4)
        total = sum(math.exp(score.log_prob) for score in scores.values())
        assert prediction.confidence == pytest.approx(math.exp(scores[best].log_prob) / total, rel=1e-3)
        assert prediction.correct == (best == claim.answers[0]) == bool(prediction.scores["accuracy"])
    assert "recall_at_1" in evaluation.predictions[0].scores
    assert "recall_at_1" not in evaluation.predictions[1].scores  # a label's word in a passage says nothing
    with pytest.raises(InputError, match="NOT ENOUGH INFO"):
        evaluate(rag, claims, labels=labels[:2])


def test_choices_come_best_first_and_must_differ(rag):
    answer = rag.choose("who wrote hamlet?", ["Marlowe", "Shakespeare", "Bacon"], k=2)
    ranked = [answer.log_prob, *(other.log_prob for other in answer.alternatives)]
    assert ranked == sorted(ranked, reverse=True)
    assert {answer.text, *(other.text for other in answer.alternatives)} == {"Marlowe", "Shakespeare", "Bacon"}
    for wrong in ([], ["a", "a"], "yes"):
        with pytest.raises(InputError, match="different strings"):
            rag.choose("who wrote hamlet?", wrong)


def test_the_scores_of_a_run_are_the_logits_of_the_prior(rag, tmp_path):
    ranked = {"q1": [("toy-3", 2.0), ("toy-0", 1.0)], "q2": [("toy-5", 0.5)]}
    evaluation = evaluate(rag, QUESTIONS, run=ranked, k=2, max_new_tokens=2)
    first, second, third = evaluation.predictions
    assert [p.id for p in first.passages] == ["toy-3", "toy-0"]
    assert [p.text for p in first.passages] == [TOY_PASSAGES[3][1], TOY_PASSAGES[0][1]]
    assert first.passages[0].prior == pytest.approx(math.e / (1 + math.e), abs=1e-5)
    assert second.passages[0].prior == pytest.approx(1.0)
    assert "q3" in third.error
    write_run(tmp_path / "out.trec", evaluation.predictions)
    assert read_run(tmp_path / "out.trec") == ranked
    assert [p.id for p in evaluate(rag, QUESTIONS[:1], run=ranked, k=1, max_new_tokens=1).predictions[0].passages] == [
        "toy-3"
    ]


def test_a_run_is_checked_before_the_first_answer(rag):
    seen = []
    run = {"q1": [("toy-0", 1.0)], "q2": [("toy-3", 2.0), ("toy-99", 1.0)], "q3": [("toy-99", 2.0), ("toy-98", 1.0)]}
    with pytest.raises(InputError, match=r"lacks 2 of the 4 passages that the run ranks, such as 'toy-99' .* 'q2'"):
        evaluate(rag, QUESTIONS, run=run, max_new_tokens=1, progress=lambda *done: seen.append(done))
    assert not seen
    few = evaluate(rag, QUESTIONS[:2], run=run, k=1, max_new_tokens=1)  # what is not read may be missing
    assert few.settings == {"method": rag.method, "k": 1, "search": "run", "prior": "search"}
    for option in ({"search": "dense"}, {"where": "title = 'Pi'"}):
        with pytest.raises(InputError, match="a run is read as it is"):
            evaluate(rag, QUESTIONS, run={}, **option)


def test_labels_leave_nothing_to_write(rag):
    claims = [Question("Paris is in France", ("yes",), "1")]
    for options in ({"max_new_tokens": 3}, {"num_beams": 2}, {"decode": "fast"}, {"extractive": False}):
        with pytest.raises(InputError, match=f"leave out {next(iter(options))}"):
            evaluate(rag, claims, labels=["yes", "no"], **options)


def test_an_answer_longer_than_the_generator_can_write_is_refused_at_once():
    rag = RagPipeline(*tiny_rag("token", "bart"))
    with pytest.raises(InputError, match="max_new_tokens=1025: the generator has 1024 positions"):
        evaluate(rag, QUESTIONS, max_new_tokens=1025)


def test_gold_passages_that_the_base_lacks_are_reported_once(rag, caplog):
    questions = [Question("capital of France", ("Paris",), "1", ("toy-3", "gone", "lost")), QUESTIONS[0]]
    with caplog.at_level(logging.WARNING, "ragstone.evaluation"):
        evaluate(rag, QUESTIONS, max_new_tokens=1)
        assert not caplog.records
        for k in (1, 2):
            evaluate(rag, questions, k=k, max_new_tokens=1)
    (record,) = caplog.records
    assert "2 of 4 gold passages are not in" in record.getMessage()
    assert "'gone'" in record.getMessage()


def test_a_run_needs_a_knowledge_base():
    bare = RagPipeline(*tiny_rag("token", "bart", n_docs=2))
    with pytest.raises(InputError, match="knowledge base"):
        evaluate(bare, QUESTIONS, run={"q1": [("toy-0", 1.0)]})


def test_generated_texts_are_measured_where_that_is_asked_for(rag):
    evaluation = evaluate(rag, QUESTIONS, generation=True, max_new_tokens=6)
    assert set(evaluation.summary) >= {"rouge_l", "q_bleu_1", "bleu_1", "distinct_trigrams"}
    assert "rouge_l" not in evaluate(rag, QUESTIONS[:1], max_new_tokens=1).summary
