"""RagTrainer on tiny models: what learns, what is drawn, what is saved, and what a kill leaves."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TrainerCallback

from ragstone import KnowledgeBase, RagPipeline, RagRetriever
from ragstone.encoders import load_encoder
from ragstone.errors import InputError, ModelError
from ragstone.marginal import any_answer_nll
from ragstone.questions import Question
from ragstone.testing import ToyEncoder, tiny_rag, toy_passages
from ragstone.training import RagTrainer, TrainingOptions, last_checkpoint
from ragstone.training.parts import fields_set
from ragstone.training.retrieval import TrainingRetriever
from ragstone.training.trainer import _SideBySide

pytest.importorskip("accelerate")
pytest.importorskip("peft")

QUESTIONS = [
    Question("who wrote Hamlet?", ("Shakespeare", "William Shakespeare"), "0", ("toy-3",)),
    Question("capital of France", ("Paris",), "1", ("toy-0",)),
    Question("how high is Mount Everest", ("8,849 metres", "8849 m"), "2", ("toy-1",)),
    Question("who discovered radium", ("Marie Curie",), "3", ("toy-2",)),
]


GENERATOR_ADAPTER = TrainingOptions(k=2, lora_rank=2, train_question_encoder=False)


@pytest.fixture
def base(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(16))
    base.add(toy_passages())
    return base


def arguments(folder, **options):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, **options},
    )


def trainer_of(
    base,
    folder,
    *,
    kind="llama",
    method="token",
    options=None,
    dev=(),
    config=None,
    dropout=True,
    base_model=None,
    **settings,
):
    model, tokenizer = tiny_rag(method, kind, **(config or {}))
    if not dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    retriever = RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, base)
    return RagTrainer(
        model,
        arguments(folder, **settings),
        tokenizer=tokenizer,
        retriever=retriever,
        questions=QUESTIONS,
        dev_questions=dev,
        options=TrainingOptions(k=3) if options is None else options,
        base_model=base_model,
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same_config(folder, model):
    """Whether the model in ``folder`` is still described as ``model`` is."""
    return type(model.config).from_pretrained(folder).base_model == model.config.base_model


def changed(before, model):
    return {name for name, value in model.named_parameters() if name in before and not torch.equal(before[name], value)}


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("method", ["token", "sequence"])
def test_both_parts_learn_from_answers_alone(base, tmp_path, kind, method):
    settings = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "dropout": False}
    trainer = trainer_of(base, tmp_path / "out", kind=kind, method=method, dev=QUESTIONS, **settings)
    before, untrained = weights(trainer.model), trainer.evaluate()["eval_loss"]
    trainer.train()
    moved = changed(before, trainer.model)
    assert any(".question_encoder." in name for name in moved)
    assert any(".generator." in name for name in moved)
    assert trainer.evaluate()["eval_loss"] < 0.85 * untrained


def test_training_has_the_prior_that_answers_have(base, tmp_path):
    options = TrainingOptions(k=3, search="hybrid", learn_score_scale=True)
    trainer = trainer_of(base, tmp_path / "out", options=options, config={"keyword_scale": 0.5}, dropout=False)
    model = trainer.model.eval()
    questions = [question.question for question in QUESTIONS]
    out = model(**trainer._prepare_inputs({"rows": QUESTIONS}))
    ids, mask = trainer.plain_retriever.tokenize_questions(questions)
    vectors = model.rag.encode_questions(ids, mask)
    hits = trainer.plain_retriever.retrieve(vectors.detach().numpy(), 3, questions=questions, search="hybrid")
    assert any(hit.keyword_score for row in hits for hit in row)
    for vector, row, scores in zip(vectors, hits, out.doc_scores, strict=True):
        expected = [model.config.tau * float(vector @ torch.from_numpy(h.vector)) + 0.5 * h.keyword_score for h in row]
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert model.rag.log_score_scale.grad.abs() > 0


@pytest.mark.parametrize("recomputing", [False, True])
def test_steps_leave_out_the_attention_whose_gradient_may_be_nan(base, tmp_path, recomputing):
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if recomputing else {}
    trainer = trainer_of(base, tmp_path / "out", max_steps=1, gradient_checkpointing=recomputing, **settings)
    seen = []
    trainer.model.generator.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    trainer.model.generator.get_input_embeddings().weight.register_hook(
        lambda _: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    trainer.train()
    assert len(seen) >= 2
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() is before is True


@pytest.mark.parametrize("frozen", ["question_encoder", "generator"])
def test_a_frozen_part_stays_as_it_is(base, tmp_path, frozen):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, **{f"train_{frozen}": False}))
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved
    assert not any(f".{frozen}." in name for name in moved)


def test_the_score_scale_is_learnt_and_written_back(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, learn_score_scale=True))
    before = trainer.model.config.tau
    trainer.train()
    tau = float(trainer.model.rag.log_score_scale.exp())
    assert tau != pytest.approx(before, abs=1e-4)
    trainer.save_model(tmp_path / "saved")
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert loaded.config.tau == pytest.approx(tau)
    assert loaded.rag.log_score_scale is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "t5"])
def test_adapters_are_saved_beside_the_name_of_their_base_and_load_into_it(base, tmp_path, kind):
    start, tokenizer = tiny_rag("token", kind)
    start.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = TrainingOptions(k=3, test_k=2, lora_rank=2, question_encoder_lora_rank=2, learn_score_scale=True)
    trainer = trainer_of(base, tmp_path / "out", kind=kind, options=options, max_steps=4)
    trainer.base_model = str(tmp_path / "base")
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    files = {str(f.relative_to(tmp_path / "trained")) for f in (tmp_path / "trained").rglob("*.safetensors")}
    for file in (tmp_path / "trained").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), (
            "a folder that is moved names no place of the machine it came from"
        )
    assert files == {f"adapters/{part}/adapter_model.safetensors" for part in ("generator", "question_encoder")}
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "trained"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    rag = RagPipeline.from_pretrained(tmp_path / "elsewhere" / "trained", knowledge_base=base, dtype="float32")
    assert rag.model.config.n_docs == 2
    batch = tokenizer.prepare_seq2seq_batch(["capital of France"], ["Paris"], return_tensors="pt")
    trainer.model.eval()
    expected = trainer.model(**batch, questions=["capital of France"], n_docs=3)
    found = rag.model(**batch, questions=["capital of France"], n_docs=3)
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-4, atol=1e-4)
    untrained = start.eval()
    untrained.set_retriever(rag.retriever)
    assert abs(float(untrained(**batch, questions=["capital of France"], n_docs=3).nll - found.nll)) > 1e-2


def test_a_run_can_begin_with_the_adapters_of_another(base, tmp_path):
    first = trainer_of(base, tmp_path / "out", options=GENERATOR_ADAPTER)
    first.base_model = "anywhere"
    first.train()
    first.save_model(tmp_path / "first")
    options = {"k": 3, "adapters": str(tmp_path / "first"), "question_encoder_lora_rank": 2}
    second = trainer_of(base, tmp_path / "out2", options=TrainingOptions(lora_rank=2, **options))
    trained = weights(first.model)
    names = [name for name in trained if "lora_B" in name and ".generator." in name]
    assert names
    for name, value in weights(second.model).items():
        if name in names:
            assert torch.equal(value, trained[name])
    for kind, rank in (("llama", 4), ("gpt2", 2)):
        with pytest.raises(ModelError, match="cannot be gone on with"):
            trainer_of(base, tmp_path / "out3", kind=kind, options=TrainingOptions(lora_rank=rank, **options))


def test_adapters_go_on_with_the_scale_they_were_trained_with(base, tmp_path):
    first = trainer_of(base, tmp_path / "out", options=replace(GENERATOR_ADAPTER, lora_alpha=32), base_model="anywhere")
    first.train()
    first.save_model(tmp_path / "first")
    adapters = replace(GENERATOR_ADAPTER, adapters=str(tmp_path / "first"))
    second = trainer_of(base, tmp_path / "out2", options=adapters)
    batch = {"questions": [q.question for q in QUESTIONS], "n_docs": 2}
    batch["labels"] = first._batch([], ["Paris"] * len(QUESTIONS))["labels"]
    torch.testing.assert_close(second.model.eval()(**batch).nll, first.model.eval()(**batch).nll)
    with pytest.raises(InputError, match=r"lora_alpha is 8, but .* was trained with 32"):
        trainer_of(base, tmp_path / "out3", options=replace(adapters, lora_alpha=8))


def test_a_checkpoint_of_more_than_adapters_is_started_from_as_a_model(base, tmp_path):
    first = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, lora_rank=2), base_model="anywhere")
    first.train()  # the question encoder learns whole
    first.save_model(tmp_path / "first")
    with pytest.raises(InputError, match=r"holds more than adapters .*name it as the model to start from"):
        trainer_of(base, tmp_path / "out2", options=replace(GENERATOR_ADAPTER, adapters=str(tmp_path / "first")))


def test_nothing_of_an_earlier_run_is_loaded_with_the_new_weights(base, tmp_path):
    model, tokenizer = tiny_rag("token", "llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for options in (
        TrainingOptions(k=2, lora_rank=2),  # and the whole question encoder
        TrainingOptions(k=2, lora_rank=2, question_encoder_lora_rank=2),
        GENERATOR_ADAPTER,
    ):
        trainer = trainer_of(base, tmp_path / "out", options=options, base_model=str(tmp_path / "model"))
        trainer.train()
        trainer.save_model(tmp_path / "trained")
    loaded = RagPipeline.from_pretrained(tmp_path / "trained", knowledge_base=base).model
    question_encoder = weights(model.question_encoder)
    assert not changed(question_encoder, loaded.question_encoder)
    assert changed(weights(model.generator), loaded.generator)


def test_adapters_are_not_written_over_their_model(base, tmp_path):
    model, tokenizer = tiny_rag("token", "llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = trainer_of(base, tmp_path / "out", options=GENERATOR_ADAPTER, base_model=str(tmp_path / "model"))
    with pytest.raises(InputError, match="they need the model in it; name another folder"):
        trainer.save_model(tmp_path / "model")
    assert same_config(tmp_path / "model", model)
    (tmp_path / "itself").mkdir()
    with fields_set(model.config, base_model="."):
        model.config.save_pretrained(tmp_path / "itself")
    with pytest.raises(ModelError, match="names itself as the model it was trained on"):
        type(model).from_pretrained(tmp_path / "itself")


def test_how_a_model_searches_for_answers_is_saved_with_adapters(base, tmp_path):
    model, tokenizer = tiny_rag("token", "llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = trainer_of(base, tmp_path / "out", options=GENERATOR_ADAPTER, base_model=str(tmp_path / "model"))
    trainer.model.generation_config.num_beams = 4
    trainer.save_model(tmp_path / "trained")
    assert type(model).from_pretrained(tmp_path / "trained").generation_config.num_beams == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_that_diverges_ends_and_writes_nothing(base, tmp_path, frozen):
    options = TrainingOptions(k=2, train_question_encoder=not frozen)
    settings = {"max_steps": 20, "learning_rate": 1e12, "max_grad_norm": 0.0}
    trainer = trainer_of(base, tmp_path / "out", options=options, **settings)
    with pytest.raises(ModelError, match="diverged"):
        trainer.train()
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"hold NaN or infinity.*nothing is written"):
        trainer.save_model(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


def test_adapters_without_a_base_are_merged_into_a_whole_checkpoint(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, lora_rank=2))
    trainer.train()
    batch = trainer._prepare_inputs({"rows": QUESTIONS[:2]})
    expected = trainer.model.eval()(**batch).nll
    trainer.save_model(tmp_path / "whole")
    loaded = type(trainer.model).from_pretrained(tmp_path / "whole", retriever=trainer.model.retriever)
    torch.testing.assert_close(loaded(**batch, n_docs=3).nll, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_base_is_gone_says_so(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, lora_rank=2))
    (tmp_path / "base").mkdir()
    trainer.base_model = str(tmp_path / "base")
    trainer.save_model(tmp_path / "trained")
    (tmp_path / "base").rmdir()
    with pytest.raises(ModelError, match="was trained on the model in"):
        RagPipeline.from_pretrained(tmp_path / "trained")


def test_all_answers_are_marginalised_and_one_is_drawn_anew_each_step(base, tmp_path):
    options = TrainingOptions(k=3, answers="all")
    trainer = trainer_of(base, tmp_path / "out", options=options)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs({"rows": QUESTIONS[:2]}))
    nll = []
    for answers in QUESTIONS[0].answers, QUESTIONS[1].answers:
        question = QUESTIONS[0 if len(answers) == 2 else 1].question
        batch = trainer.rag_tokenizer.prepare_seq2seq_batch([question] * len(answers), answers, return_tensors="pt")
        nll.append(-torch.logsumexp(-trainer.model(**batch, questions=[question] * len(answers)).nll, dim=0))
    torch.testing.assert_close(loss, torch.stack(nll).mean())
    sampled = trainer_of(base, tmp_path / "out2")
    drawn = []
    for step in range(16):
        sampled.state.global_step = step
        drawn += sampled._answers(QUESTIONS[0])
    assert set(drawn) == set(QUESTIONS[0].answers)


def test_any_answer_has_no_gradient_trouble_with_impossible_answers():
    nll = torch.tensor([1.0, torch.inf, torch.inf], requires_grad=True)
    any_answer_nll(nll, torch.tensor([0, 0, 0])).sum().backward()
    torch.testing.assert_close(nll.grad, torch.tensor([1.0, 0.0, 0.0]))


def test_gold_passages_take_the_last_place_where_they_were_not_found(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=1, with_positives=True))
    batch = trainer._prepare_inputs({"rows": QUESTIONS})
    out = trainer.model(**batch, output_retrieved=True)
    assert out.retrieved_doc_ids == [list(q.positive_ids) for q in QUESTIONS]


def test_passages_of_the_batch_take_the_place_of_a_search_but_not_on_the_dev_set(base, tmp_path):
    options = TrainingOptions(k=2, test_k=4, in_batch=True)
    trainer = trainer_of(base, tmp_path / "out", options=options, dev=QUESTIONS[:2], dropout=False)
    searched = []
    search = trainer.plain_retriever.retrieve
    trainer.plain_retriever.retrieve = lambda *args, **kwargs: searched.append(args[1]) or search(*args, **kwargs)
    trainer.train()
    assert not searched
    trainer.evaluate()
    assert searched == [4]
    questions = [q.question for q in QUESTIONS[:3]]
    out = trainer.model(questions=questions, n_docs=2, output_retrieved=True)
    gold = [q.positive_ids[0] for q in QUESTIONS[:3]]
    assert all(own in row and set(row) <= set(gold) for own, row in zip(gold, out.retrieved_doc_ids, strict=True))
    vectors = torch.tensor(np.stack([base.vectors(id_)[0] for id_ in gold]))
    best = (out.question_encoder_last_hidden_state @ vectors.T).argsort(dim=1, descending=True, stable=True)
    for own, row, order in zip(gold, out.retrieved_doc_ids, best.tolist(), strict=True):
        wanted = [gold[n] for n in order[:2]]
        assert row == (wanted if own in wanted else [wanted[0], own])
    out = trainer.model(questions=questions[:1], n_docs=2)
    assert torch.isneginf(out.doc_scores[:, 1]).all()  # there is no other passage in such a batch


def test_questions_of_the_same_words_share_their_gold_passages_and_answers(base, tmp_path):
    same = [Question("who?", ("Shakespeare",), "0", ("toy-0",)), Question("who?", ("Curie",), "1", ("toy-3",))]
    options = TrainingOptions(k=8, with_positives=True, decline_weight=1.0)
    retriever = trainer_of(base, tmp_path / "out", options=options).plain_retriever
    training = TrainingRetriever(retriever, options, same)
    assert training.positives == {"who?": ("toy-0", "toy-3")}
    assert training.answers == {"who?": ("Shakespeare", "Curie")}


def test_the_dev_loss_is_over_what_is_found_though_gold_passages_are_put_in_while_training(base, tmp_path):
    losses = []
    for gold in (False, True):
        options = TrainingOptions(k=1, with_positives=gold)
        losses.append(trainer_of(base, tmp_path / "out", options=options, dev=QUESTIONS, dropout=False).evaluate())
    assert losses[0]["eval_loss"] == losses[1]["eval_loss"]


def test_gold_passages_are_looked_up_before_the_first_step(base, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "QUESTIONS", [*QUESTIONS, Question("who?", ("nobody",), "4", ("toy-0", "nope"))])
    for options in (TrainingOptions(with_positives=True), TrainingOptions(in_batch=True)):
        with pytest.raises(InputError, match=r"lacks 1 of 5 gold passages, such as 'nope' of the question 'who\?'"):
            trainer_of(base, tmp_path / "out", options=options)
    monkeypatch.setitem(globals(), "QUESTIONS", [Question("who?", ("nobody",), "4")])
    with pytest.raises(InputError, match="no question names one"):
        trainer_of(base, tmp_path / "out", options=TrainingOptions(with_positives=True))


def test_questions_for_which_no_passage_is_found_are_left_out(base, tmp_path, monkeypatch, caplog):
    lost = Question("zzzzqq", ("nobody",), "4", ("toy-0",))
    monkeypatch.setitem(globals(), "QUESTIONS", [*QUESTIONS, lost])
    options = TrainingOptions(k=2, search="keyword")
    trainer = trainer_of(base, tmp_path / "out", options=options, dev=[QUESTIONS[0], lost], max_steps=3)
    assert trainer.train_dataset == QUESTIONS[:-1]
    assert trainer.eval_dataset == QUESTIONS[:1]
    assert "1 of 5 questions are left out" in caplog.text
    assert "'zzzzqq'" in caplog.text
    trainer.train()
    gold = replace(options, with_positives=True)
    kept = trainer_of(base, tmp_path / "out", options=gold, dev=[QUESTIONS[0], lost], max_steps=3)
    assert kept.train_dataset == QUESTIONS
    assert kept.eval_dataset == QUESTIONS[:1]
    kept.train()
    kept.evaluate()


def test_answers_that_are_cut_are_counted(base, tmp_path, caplog):
    trainer_of(base, tmp_path / "out", options=TrainingOptions(max_target_length=64))
    assert "are cut" not in caplog.text
    trainer_of(base, tmp_path / "out", options=TrainingOptions(max_target_length=2, answers="all", max_answers=1))
    assert "of 6 answers have more than 2 tokens" in caplog.text
    assert "2 questions have more than max_answers=1 answers" in caplog.text


def test_dev_questions_are_classified_where_labels_are_given(base, tmp_path):
    questions = [Question("is Paris a city?", ("yes",), "0"), Question("is Hamlet a city?", ("no",), "1")]
    options = TrainingOptions(k=2, dev_metric="accuracy", labels=("yes", "no"))
    trainer = trainer_of(base, tmp_path / "out", options=options, dev=questions)
    rag = RagPipeline(trainer.model.eval(), trainer.rag_tokenizer, base)
    chosen = [answer.text for answer in rag.choose([q.question for q in questions], ("yes", "no"), k=2)]
    expected = sum(text == q.answers[0] for text, q in zip(chosen, questions, strict=True)) / 2
    trainer.model.set_retriever(TrainingRetriever(trainer.plain_retriever, options, questions))
    assert trainer.evaluate()["eval_accuracy"] == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dev_metric": "foo"}, "choose one of loss, "),
        ({"dev_metric": "recall_at_7"}, "recall_at_3"),
        ({"dev_metric": "accuracy"}, "give labels"),
        ({"dev_metric": "f1", "labels": ("yes", "no")}, "take 'accuracy'"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "below 1"),
        ({"lora_rank": 2, "lora_dropout": -1.0}, "at least 0"),
        ({"lora_alpha": 4}, "no rank is given"),
        ({"lora_dropout": 0.1}, "no rank is given"),
        ({"lora_rank": 2, "train_generator": False}, "lora_rank is 2, but train_generator is False"),
    ],
)
def test_options_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        TrainingOptions(**wrong)


def test_less_is_better_of_losses_and_errors():
    assert TrainingOptions(dev_metric="recall_at_5").greater_is_better
    assert TrainingOptions(dev_metric="f1").greater_is_better
    for metric in ("loss", "calibration_error", "reading_errors", "retrieval_errors"):
        assert not TrainingOptions(dev_metric=metric).greater_is_better


def test_questions_without_a_gold_passage_cannot_share_those_of_their_batch(base, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "QUESTIONS", [*QUESTIONS, Question("who?", ("nobody",), "4")])
    with pytest.raises(InputError, match=r"'who\?' names no gold passage, which in_batch needs for each"):
        trainer_of(base, tmp_path / "out", options=TrainingOptions(in_batch=True))
    with pytest.raises(InputError, match="in_batch searches nothing"):
        TrainingOptions(in_batch=True, where="title = 'a'")


@pytest.mark.parametrize(("count", "size"), [(10, 4), (12, 4), (3, 4), (7, 1)])
def test_batches_hold_neighbours_and_an_epoch_holds_every_question_once(count, size):
    sampler, orders = _SideBySide(count, size, seed=3), []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        assert sorted(order) == list(range(count))
        for start in range(0, count, size):
            batch = order[start : start + size]
            assert all((b - a) % count == 1 for a, b in itertools.pairwise(batch))
        orders.append(tuple(order))
    assert len(set(orders)) > 1


def test_the_dev_loss_is_the_mean_nll_at_the_k_of_the_test(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=3, test_k=2), dev=QUESTIONS)
    found = trainer.evaluate()["eval_loss"]
    batch = trainer._prepare_inputs({"rows": [Question(q.question, q.answers[:1], q.id) for q in QUESTIONS]})
    assert found == pytest.approx(float(trainer.model(**batch, n_docs=2).nll.mean()), rel=1e-5)
    assert trainer.model.config.n_docs == 3


def test_gradient_checkpointing_changes_no_weight(base, tmp_path):
    found = []
    for n, extra in enumerate([{}, {"gradient_checkpointing": True}]):
        trainer = trainer_of(base, tmp_path / str(n), kind="bart", **extra)
        trainer.train()
        found.append(weights(trainer.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_question_encoder_may_have_a_learning_rate_of_its_own(base, tmp_path):
    options = TrainingOptions(k=3, question_encoder_learning_rate=0.0)
    trainer = trainer_of(base, tmp_path / "out", options=options)
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved
    assert all(".generator." in name for name in moved)


def test_labels_are_smoothed_or_all_answers_count_but_not_both(base, tmp_path):
    with pytest.raises(InputError, match="label_smoothing"):
        trainer_of(base, tmp_path, options=TrainingOptions(answers="all"), config={"label_smoothing": 0.1})


def test_a_run_that_trains_nothing_is_refused():
    with pytest.raises(InputError, match="Nothing is left to train"):
        TrainingOptions(train_question_encoder=False, train_generator=False)


def test_an_estimate_leaves_every_weight_as_it_is(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", num_train_epochs=3, max_steps=-1)
    before = weights(trainer.model)
    estimate = trainer.estimate()
    assert not changed(before, trainer.model)
    assert estimate.steps == 6
    assert estimate.seconds_per_step > 0


RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trainer import trainer_of, TrainingOptions
from ragstone import KnowledgeBase
from ragstone.testing import ToyEncoder
from ragstone.training import last_checkpoint
out = Path(sys.argv[1])
trainer = trainer_of(
    KnowledgeBase.open({kb!r}, encoder=ToyEncoder(16)), out, options=TrainingOptions(k=3, lora_rank=2),
    kind="bart", max_steps=12, save_strategy="steps", save_steps=3,
)
trainer.train(resume_from_checkpoint=last_checkpoint(out))
torch.save({{n: p for n, p in trainer.model.named_parameters() if p.requires_grad}}, out / "end.pt")
"""


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(base, tmp_path):
    """Dropout, answers drawn at random, the order of questions and the schedule are all taken up where they were."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent), kb=str(base.path)))
    command = [sys.executable, str(script)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").is_file():
        assert killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "end.pt").exists()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    whole, resumed = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_that_was_cut_short_is_passed_over(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "out" / "checkpoint-2" / "trained.safetensors").write_bytes(b"cut")
    assert Path(last_checkpoint(tmp_path / "out")).name == "checkpoint-1"
    assert last_checkpoint(tmp_path / "nowhere") is None


STEP = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_trainer import trainer_of
from ragstone import KnowledgeBase
from ragstone.testing import ToyEncoder
world = int(os.environ.get("WORLD_SIZE", 1))
out = {out!r} + str(world)
trainer = trainer_of(
    KnowledgeBase.open({kb!r}, encoder=ToyEncoder(16)), out, max_steps=1, per_device_train_batch_size=4 // world,
    optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=0.1, dropout=False,
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(dict(trainer.model.named_parameters()), out + ".pt")
"""


def test_a_step_on_two_processes_is_a_step_on_one(base, tmp_path):
    script = tmp_path / "step.py"
    script.write_text(STEP.format(tests=str(Path(__file__).parent), kb=str(base.path), out=str(tmp_path / "world")))
    command = [sys.executable, str(script)]
    subprocess.run(command, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [{**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    one, two = (torch.load(tmp_path / f"world{n}.pt", weights_only=False) for n in (1, 2))
    start = weights(trainer_of(base, tmp_path / "start").model)
    assert any(not torch.equal(start[name], one[name]) for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture
def shared(tmp_path):
    """A base whose encoder is the tiny model's question encoder."""
    from ragstone.testing import question_tokenizer, tiny_question_encoder

    tiny_question_encoder().save_pretrained(tmp_path / "encoder")
    question_tokenizer().save_pretrained(tmp_path / "encoder")
    base = KnowledgeBase.create(tmp_path / "shared", encoder=tmp_path / "encoder", dtype="float32")
    base.add(toy_passages())
    return base


def test_fresh_vectors_score_the_passages_and_have_a_gradient(shared, tmp_path):
    options = TrainingOptions(k=3, candidates=2, train_passage_encoder=True)
    trainer = trainer_of(shared, tmp_path / "out", options=options, dropout=False)
    encoder = trainer.model.question_encoder
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    out = trainer.model(**trainer._prepare_inputs({"rows": QUESTIONS[:2]}), output_retrieved=True)
    for row, ids in enumerate(out.retrieved_doc_ids):
        fresh = trainer.shared_encoder(shared.get(ids))
        assert not torch.allclose(fresh, torch.from_numpy(shared.vectors(ids)), atol=1e-2)
        torch.testing.assert_close(out.doc_scores[row], fresh @ out.question_encoder_last_hidden_state[row])
    whole = torch.autograd.grad(out.doc_scores.sum(), encoder.embeddings.word_embeddings.weight, retain_graph=True)[0]
    passages_only = torch.autograd.grad(out.retrieved_doc_embeds.sum(), encoder.embeddings.word_embeddings.weight)[0]
    assert whole.abs().sum() > 0
    assert passages_only.abs().sum() > 0


@pytest.mark.parametrize("rank", [0, 2])
def test_the_base_is_encoded_anew_while_training_goes_on(shared, tmp_path, rank):
    options = TrainingOptions(k=3, train_passage_encoder=True, refresh_every=2, question_encoder_lora_rank=rank)
    trainer = trainer_of(
        shared, tmp_path / "out", options=options, max_steps=10**6, save_strategy="steps", save_steps=1
    )
    version = shared.version

    class Until(TrainerCallback):
        """Ends the run with the first step after the base has moved on."""

        def on_step_begin(self, args, state, control, **kwargs):
            control.should_training_stop = shared.version > version

    trainer.args.save_total_limit = 1
    trainer.add_callback(Until())
    trainer.train()
    assert shared.version > version
    recorded = json.loads(Path(last_checkpoint(tmp_path / "out"), "knowledge_base.json").read_text())
    assert recorded["version"] == shared.version
    assert (tmp_path / "out" / "encoders" / recorded["encoder"]).is_dir()
    trainer.save_model(tmp_path / "saved")
    assert trainer.model.config.passage_encoder is None, "what the saved folder says of itself is no path from here"
    encoder = load_encoder(tmp_path / "saved" / "passage_encoder", dtype="float32")
    trainer.model.eval()
    expected = trainer.shared_encoder(toy_passages()).detach().numpy()
    np.testing.assert_allclose(
        encoder.encode_passages([(p.title, p.text) for p in toy_passages()]), expected, atol=1e-4
    )


def test_a_passage_encoder_that_is_another_model_cannot_learn_as_one(base, tmp_path):
    with pytest.raises(InputError, match="another encoder than the model's question encoder"):
        trainer_of(base, tmp_path / "out", options=TrainingOptions(train_passage_encoder=True))


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
def test_passages_without_an_answer_learn_to_decline(base, tmp_path, kind):
    trainer = trainer_of(
        base, tmp_path / "a", kind=kind, options=TrainingOptions(k=3, decline_weight=2.0), dropout=False
    )
    plain = trainer_of(base, tmp_path / "b", kind=kind, options=TrainingOptions(k=3), dropout=False)
    batch = {"rows": QUESTIONS[:2]}
    trainer.model.eval(), plain.model.eval()
    added = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)) - plain.compute_loss(
        plain.model, plain._prepare_inputs(batch)
    )
    # By definition: the empty answer as a target of its own, under each passage that lacks the answers.
    empty = trainer.rag_tokenizer(text_target=["", ""], return_tensors="pt")["labels"]
    trainer.model.set_retriever(trainer.plain_retriever)
    out = trainer.model(questions=[q.question for q in QUESTIONS[:2]], labels=empty, n_docs=3, output_retrieved=True)
    texts = {id_: base.get(id_)[0].text for row in out.retrieved_doc_ids for id_ in row}
    expected = 0.0
    for b, row in enumerate(out.retrieved_doc_ids):
        for k, id_ in enumerate(row):
            if id_ not in QUESTIONS[b].positive_ids and not any(a in texts[id_] for a in QUESTIONS[b].answers):
                expected -= out.token_log_probs[b, k].sum()
    torch.testing.assert_close(added, 2.0 * expected / 6)
    assert expected > 0
    assert trainer.model.config.min_answer_tokens == len(empty[0])


def test_a_trained_model_answers_in_the_way_of_the_one_it_started_from_unless_told_otherwise(base, tmp_path):
    for before, told, after in ((True, None, True), (False, None, False), (True, False, False), (False, True, True)):
        options = TrainingOptions(k=2, extractive=told)
        trainer = trainer_of(base, tmp_path / "out", options=options, config={"extractive": before}, max_steps=1)
        assert trainer.model.config.extractive is after


def test_weights_under_an_adapter_are_narrow_in_bf16_training_unless_they_will_be_written(base, tmp_path):
    options = TrainingOptions(k=2, lora_rank=2, decline_weight=1.0, dev_metric="exact_match", max_new_tokens=3)
    for name, under in (("base", torch.bfloat16), (None, torch.float32)):
        trainer = trainer_of(base, tmp_path / str(name), options=options, bf16=True, dev=QUESTIONS[:1], base_model=name)
        trainer.train()
        assert 0 <= trainer.evaluate()["eval_exact_match"] <= 1
        kinds = {w.requires_grad: w.dtype for w in trainer.model.generator.parameters()}
        assert kinds == {True: torch.float32, False: under}


@pytest.mark.parametrize(("settings", "narrow"), [({"bf16": True}, True), ({}, False)])
def test_adapters_take_narrow_inputs_as_they_come_in_bf16_training(base, tmp_path, settings, narrow):
    trainer = trainer_of(base, tmp_path / "out", options=TrainingOptions(k=2, lora_rank=2), max_steps=1, **settings)
    layers = [m for m in trainer.model.generator.modules() if hasattr(m, "cast_input_dtype_enabled")]
    seen = []
    trainer.model.generator.register_forward_pre_hook(
        lambda *_: seen.append({layer.cast_input_dtype_enabled for layer in layers})
    )
    trainer.train()
    assert layers
    assert all(flags == {not narrow} for flags in seen)
    assert {layer.cast_input_dtype_enabled for layer in layers} == {True}


def test_an_answer_has_the_least_number_of_tokens_that_the_config_asks_for(base, tmp_path):
    model, _ = tiny_rag("token", "llama")
    model.config.min_answer_tokens = 3
    model.set_retriever(trainer_of(base, tmp_path).plain_retriever)
    model.generation_config.eos_token_id = list(range(1, 40))
    written = model.generate(questions=["who?"], max_new_tokens=6)
    assert not set(written[0, :3].tolist()) & set(range(1, 40))
    config = GenerationConfig(min_new_tokens=0, max_new_tokens=6, eos_token_id=list(range(1, 40)))
    assert (
        model.generate(questions=["who?"], generation_config=config).tolist()
        == model.generate(questions=["who?"], max_new_tokens=6, min_new_tokens=0).tolist()
    )
    free = model.generate(questions=["who?"], max_new_tokens=6, min_new_tokens=0)
    assert free.shape[1] <= 6
