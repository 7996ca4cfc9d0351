"""A model's question encoder met with the passages of another: refused, warned of, or known to belong together."""

import pytest

from ragstone import KnowledgeBase, RagPipeline, RagRetriever
from ragstone.encoders import Encoder, EncoderSettings
from ragstone.errors import EncoderMismatchError
from ragstone.testing import question_tokenizer, tiny_question_encoder, tiny_rag, toy_passages


def encoder(seed=0, kind="bert", name="other"):
    settings = EncoderSettings(pooling="pooler", template="pair") if kind == "dpr" else EncoderSettings()
    return Encoder.from_parts(tiny_question_encoder(kind, seed=seed), question_tokenizer(), settings, name=name)


def base_of(folder, made_by):
    base = KnowledgeBase.create(folder, encoder=made_by)
    base.add(toy_passages())
    return base


def pipeline(base, kind="bert", **fields):
    model, tokenizer = tiny_rag("token", question_encoder=kind, **fields)
    return RagPipeline(model, tokenizer, base)


def warnings(caplog):
    return [record.message for record in caplog.records if record.name == "ragstone.retriever"]


def test_the_encoder_that_made_the_vectors_is_not_spoken_of(tmp_path, caplog):
    pipeline(base_of(tmp_path / "kb", encoder()))("who wrote hamlet?", k=2, max_new_tokens=1)
    assert warnings(caplog) == []


def test_other_weights_of_the_same_width_are_warned_of_once(tmp_path, caplog):
    rag = pipeline(base_of(tmp_path / "kb", encoder(seed=5)))
    for _ in range(2):
        rag("who wrote hamlet?", k=2, max_new_tokens=1)
    assert len(warnings(caplog)) == 1
    assert "its weights differ" in warnings(caplog)[0]
    assert "ragstone reindex" in warnings(caplog)[0]


def test_another_pooling_of_the_same_weights_is_warned_of(tmp_path, caplog):
    pipeline(base_of(tmp_path / "kb", encoder()), question_encoder_pooling="cls")
    assert "pooling is 'cls', not 'mean'" in warnings(caplog)[0]


def test_towers_that_are_known_to_belong_together_may_differ(tmp_path, caplog):
    made_by = encoder(seed=5)
    base = base_of(tmp_path / "kb", made_by)
    pipeline(base, passage_fingerprint=made_by.spec.fingerprint)
    pipeline(base, passage_encoder="other")
    pipeline(base_of(tmp_path / "dpr", encoder(5, "dpr")), "dpr")
    assert warnings(caplog) == []


def test_a_question_encoder_trained_with_other_passages_is_refused(tmp_path):
    base = base_of(tmp_path / "kb", encoder(seed=5))
    with pytest.raises(EncoderMismatchError, match=r"was trained with passages of MINE \(weights abc\).*reindex"):
        pipeline(base, passage_fingerprint="abc", passage_encoder="MINE")


def test_a_base_that_moves_to_another_encoder_is_noticed_at_the_next_search(tmp_path, caplog):
    made_by = encoder()
    base = base_of(tmp_path / "kb", made_by)
    rag = pipeline(base, passage_fingerprint=made_by.spec.fingerprint)
    other = KnowledgeBase.open(base.path, encoder=made_by)
    other.reencode(encoder(seed=5))
    rag("who wrote hamlet?", k=2, max_new_tokens=1)  # still the old version
    base.refresh()
    with pytest.raises(EncoderMismatchError, match="was trained with passages"):
        rag("who wrote hamlet?", k=2, max_new_tokens=1)


def test_a_model_that_is_loaded_with_its_retriever_is_checked(tmp_path, caplog):
    for seed, said in ((0, 0), (5, 1)):
        base = base_of(tmp_path / f"kb{seed}", encoder(seed=seed))
        model, tokenizer = tiny_rag("token")
        model.save_pretrained(tmp_path / "model")
        retriever = RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, base)
        loaded = type(model).from_pretrained(tmp_path / "model", retriever=retriever)
        loaded.generate(questions=["who wrote hamlet?"], n_docs=2, max_new_tokens=1)
        assert len(warnings(caplog)) == said


def test_given_vectors_and_loose_passages_are_nobodys(tmp_path, caplog):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    pipeline(base, passage_fingerprint="abc")
    model, tokenizer = tiny_rag("token", passage_fingerprint="abc")
    model.set_retriever(RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, toy_passages()))
    assert warnings(caplog) == []
