"""An encoder learns from gold passages; what it saves is what Ragstone loads."""

import re

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ragstone.encoders import load_encoder
from ragstone.errors import InputError, MissingExtraError
from ragstone.knowledge import KnowledgeBase
from ragstone.questions import Question
from ragstone.testing import question_tokenizer, tiny_question_encoder, toy_passages
from ragstone.training import train_encoder
from ragstone.training.contrastive import hard_negatives_of

CODES = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
"""A word that no passage holds, for each toy passage: the link between the two has to be learnt."""


OPENINGS = ["what is", "where is", "tell me", "who is", "is it", "why was"]


def questions(*openings):
    return [
        Question(f"{opening} {code}?", ("no passage holds this",), f"{opening} {code}", (f"toy-{n}",))
        for n, code in enumerate(CODES)
        for opening in openings
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A BERT of random weights."""
    folder = tmp_path_factory.mktemp("start")
    options = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)
    tiny_question_encoder(hidden_size=32, intermediate_size=64, **options).save_pretrained(folder)
    question_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """The folder of a trained encoder, the report, and what progress was told."""
    told = []
    report = train_encoder(
        questions(*OPENINGS),
        toy_passages(),
        encoder=start,
        out=tmp_path_factory.mktemp("trained") / "encoder",
        epochs=15,
        batch_size=8,
        learning_rate=3e-3,
        device="cpu",
        progress=lambda *step: told.append(step),
    )
    return report, told


def recall_at_1(encoder, asked, path):
    kb = KnowledgeBase.create(path, encoder=encoder)
    kb.add(toy_passages())
    hits = kb.search([question.question for question in asked], k=1)
    return np.mean([row[0].passage.id in question.positive_ids for row, question in zip(hits, asked, strict=True)])


def test_recall_rises_from_chance_to_high_also_for_questions_worded_differently(start, trained, tmp_path):
    learnt, unseen = questions(*OPENINGS), questions("who was", "where was")
    assert recall_at_1(start, learnt, tmp_path / "before") < 0.4
    assert recall_at_1(trained[0].folder, learnt, tmp_path / "learnt") > 0.9
    assert recall_at_1(trained[0].folder, unseen, tmp_path / "unseen") > 0.7


def test_the_report_and_progress_count_what_was_done(trained):
    report, told = trained
    assert (report.questions, report.pairs, report.steps) == (48, 48, 90)
    assert 0 < report.loss < np.log(16)  # of choosing at random among 8 gold passages and 8 hard negatives
    assert told[0] == (0, 48, "questions")
    assert told[-1] == (90, 90, "steps")


def test_what_is_saved_gives_the_same_vectors_in_sentence_transformers_and_ragstone(trained):
    texts = ["who wrote hamlet?", "bees", "a longer question about the river in paris"]
    vectors = load_encoder(trained[0].folder, dtype="float32").encode_questions(texts)
    np.testing.assert_allclose(vectors, SentenceTransformer(trained[0].folder).encode(texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_base_can_be_trained_from_and_prompts_length_and_pooling_are_kept(start, tmp_path):
    declared = SentenceTransformer(str(start), prompts={"query": "q: ", "document": "p: "})
    declared.max_seq_length = 40
    declared[1].pooling_mode = "cls"
    declared.save_pretrained(str(tmp_path / "declared"))
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=4)
    kb.add(toy_passages(), vectors=np.ones((8, 4)))
    options = dict(epochs=3, batch_size=4, learning_rate=1e-3, device="cpu")
    train_encoder(questions("what is"), kb, encoder=tmp_path / "declared", out=tmp_path / "out", **options)
    before, after = load_encoder(tmp_path / "declared").spec, load_encoder(tmp_path / "out").spec
    for name in ("question_prompt", "passage_prompt", "max_length", "pooling", "width"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.question_prompt, after.max_length) == ("q: ", 40)
    assert after.fingerprint != before.fingerprint


def test_the_same_seed_gives_the_same_encoder(start, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = dict(encoder=start, out=tmp_path / name, seed=seed, learning_rate=1e-3, batch_size=4, device="cpu")
        train_encoder(questions("what is"), toy_passages(), **options)
    a, b, c = (load_encoder(tmp_path / name).spec.fingerprint for name in "abc")
    assert a == b != c


# Negatives


def test_hard_negatives_are_neither_gold_nor_hold_an_answer_and_each_comes_once():
    passages = toy_passages()  # Paris is 3; Hamlet is 0
    question = Question("capital of france?", ("Seine", "Shakespeare"), "q", ("toy-1",))
    found = [passages[n] for n in (3, 1, 5, 0, 5)]
    assert [p.id for p in hard_negatives_of(question, found, passages, 3)] == ["toy-5", "toy-2", "toy-4"]
    assert hard_negatives_of(question, found, passages, 0) == []


def test_too_few_negatives_are_an_error_that_names_the_question(start, tmp_path):
    with pytest.raises(InputError, match=r"'what is ab' there are 7 .* not hard_negatives=8"):
        train_encoder(questions("what is"), toy_passages(), encoder=start, out=tmp_path / "out", hard_negatives=8)


# Errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(questions=[]), "no question to learn from"),
        (
            dict(questions=[Question("x", ("y",), "n1"), Question("z", ("y",), "n2")]),
            r"'n1' has no positive_ids \(2 of",
        ),
        (dict(questions=[Question("x", ("y",), "n1", ("toy-99",))]), "'toy-99'"),
        (dict(hard_negatives=-1), "hard_negatives=-1"),
        (dict(epochs=0), "epochs=0"),
        (dict(batch_size=1), "batch_size=1"),
    ],
)
def test_what_cannot_be_learnt_from_is_named_and_nothing_is_written(start, tmp_path, change, said):
    arguments = {"questions": questions("what is"), **change}
    with pytest.raises(InputError, match=said):
        train_encoder(arguments.pop("questions"), toy_passages(), encoder=start, out=tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(start, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} is not empty")):
        train_encoder(questions("what is"), toy_passages(), encoder=start, out=tmp_path)


def test_a_dpr_encoder_is_refused(tmp_path):
    tiny_question_encoder("dpr").save_pretrained(tmp_path / "dpr")
    question_tokenizer().save_pretrained(tmp_path / "dpr")
    with pytest.raises(InputError, match="start from one that pools by mean"):
        train_encoder(questions("what is"), toy_passages(), encoder=tmp_path / "dpr", out=tmp_path / "out")


def test_without_the_extra_the_error_says_how_to_install_it(start, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"ragstone\[training\]"):
        train_encoder(questions("what is"), toy_passages(), encoder=start, out=tmp_path / "out")
