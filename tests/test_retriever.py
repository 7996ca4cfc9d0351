"""Retrieval: where passages come from, who encodes them, and what is written down."""

import logging

import numpy as np
import pytest
import torch
import transformers

from ragstone import KnowledgeBase, Passage, RagConfig, RagRetriever, RagSequenceForGeneration
from ragstone.encoders import Encoder, load_encoder
from ragstone.errors import InputError, ModelError
from ragstone.knowledge import Hit
from ragstone.knowledge.loose import dummy_passages
from ragstone.models import Retriever
from ragstone.retriever import stack_hits
from ragstone.testing import (
    TOY_PASSAGES,
    ToyEncoder,
    question_tokenizer,
    tiny_question_encoder,
    tiny_rag,
    toy_passages,
)


@pytest.fixture
def model_and_tokenizer():
    return tiny_rag("sequence", "bart")


def retriever_of(model, tokenizer, index, **kwargs):
    return RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, index, **kwargs)


def question_vectors(model, retriever, questions):
    ids, mask = retriever.tokenize_questions(questions)
    with torch.no_grad():
        return model.rag.encode_questions(ids, mask).numpy(), ids


def test_it_is_what_the_model_expects(model_and_tokenizer):
    assert isinstance(retriever_of(*model_and_tokenizer, toy_passages()), Retriever)


def test_dummy_passages_are_whole_and_their_vectors_are_cached(model_and_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGSTONE_CACHE", str(tmp_path))
    model, tokenizer = model_and_tokenizer
    assert len(dummy_passages()) == 200
    assert all(80 <= len(p.text.split()) <= 120 for p in dummy_passages())
    model.config.use_dummy_dataset, model.config.index_name = True, "exact"

    def scores():
        model.set_retriever(retriever_of(model, tokenizer, None))
        return model(questions=["who wrote hamlet?"]).doc_scores

    first = scores()
    (cache,) = (tmp_path / "dummy").iterdir()
    monkeypatch.setattr(Encoder, "encode_passages", lambda *a, **k: pytest.fail("encoded again"))
    assert torch.equal(scores(), first)
    monkeypatch.undo()
    monkeypatch.setenv("RAGSTONE_CACHE", str(tmp_path))
    cache.write_bytes(cache.read_bytes()[:100])  # a damaged cache is only a cache
    assert torch.allclose(scores(), first)


def test_hits_are_the_best_by_inner_product_whatever_holds_the_passages(model_and_tokenizer, tmp_path):
    from datasets import Dataset

    model, tokenizer = model_and_tokenizer
    loose = retriever_of(model, tokenizer, toy_passages())
    loose.attach(model.question_encoder)
    vectors = loose.encode_passages(toy_passages())
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    base.add(toy_passages(), vectors=vectors)
    rows = {"title": [t for t, _ in TOY_PASSAGES], "text": [t for _, t in TOY_PASSAGES], "embeddings": vectors.tolist()}
    dataset = Dataset.from_dict({**rows, "id": [p.id for p in toy_passages()]})
    asked, _ = question_vectors(model, loose, ["who wrote hamlet?", "how high is everest?"])
    expected = np.argsort(-(asked @ vectors.T), axis=1)[:, :3]
    for index in (toy_passages(), base, dataset, str(tmp_path / "kb")):
        hits = retriever_of(model, tokenizer, index)
        hits.attach(model.question_encoder)
        found = hits.retrieve(asked, 3)
        assert [[int(h.passage.id.removeprefix("toy-")) for h in row] for row in found] == expected.tolist()


def test_transformers_call_form(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    retriever = retriever_of(model, tokenizer, toy_passages())
    model.set_retriever(retriever)
    vectors, ids = question_vectors(model, retriever, ["who wrote hamlet?"])
    out = retriever(ids.numpy(), vectors, n_docs=2, return_tensors="pt")
    scores = torch.bmm(torch.from_numpy(vectors).unsqueeze(1), out["retrieved_doc_embeds"].transpose(1, 2)).squeeze(1)
    given = model(
        context_input_ids=out["context_input_ids"],
        context_attention_mask=out["context_attention_mask"],
        doc_scores=scores,
        labels=torch.tensor([[5, 6, 2]]),
    )
    retrieved = model(ids, labels=torch.tensor([[5, 6, 2]]), n_docs=2)
    assert torch.allclose(given.nll, retrieved.nll, atol=1e-5)
    assert isinstance(retriever(ids.numpy(), vectors, n_docs=2)["context_input_ids"], list)


def test_fewer_passages_than_asked_for_leave_empty_slots(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.set_retriever(retriever_of(model, tokenizer, toy_passages()[:2]))
    out = model(questions=["hamlet?"], labels=torch.tensor([[5, 6, 2]]), n_docs=4, output_retrieved=True)
    exact = model(questions=["hamlet?"], labels=torch.tensor([[5, 6, 2]]), n_docs=2)
    assert torch.isneginf(out.doc_scores[0, 2:]).all()
    assert torch.allclose(out.nll, exact.nll, atol=1e-5)
    assert [len(row) for row in out.retrieved_doc_ids] == [2]


def test_question_text_wins_over_decoding_and_is_lowered_only_where_the_config_says_so(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    retriever = retriever_of(model, tokenizer, toy_passages())
    model.set_retriever(retriever)
    vectors, ids = question_vectors(model, retriever, ["Who wrote HAMLET in Zürich?"])

    def context(**kwargs):
        out = retriever(ids, vectors, n_docs=1, return_tensors="pt", **kwargs)
        return tokenizer.generator.decode(out["context_input_ids"][0], skip_special_tokens=True)

    assert context(questions=["Who wrote HAMLET in Zürich?"]).endswith(" // Who wrote HAMLET in Zürich?")
    assert "HAMLET" not in context()
    model.config.lowercase_questions = True
    assert context(questions=["Who wrote HAMLET in Zürich?"]).endswith(" // who wrote hamlet in zürich?")


def test_scale_applies_to_what_is_retrieved_and_never_to_given_scores(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.set_retriever(retriever_of(model, tokenizer, toy_passages()))
    plain = model(questions=["hamlet?"], n_docs=3, output_retrieved=True)
    model.config.score_scale = 7.0
    scaled = model(questions=["hamlet?"], n_docs=3)
    assert torch.allclose(scaled.doc_scores, 7 * plain.doc_scores, rtol=1e-5)
    contexts = {
        "context_input_ids": plain.context_input_ids,
        "context_attention_mask": plain.context_attention_mask,
        "doc_scores": plain.doc_scores,
    }
    assert torch.equal(model(**contexts).doc_scores, plain.doc_scores)


def test_default_scale_is_20_for_unit_vectors_and_1_for_inner_products():
    assert RagConfig(question_encoder_normalize=True).tau == 20.0
    assert RagConfig(question_encoder_normalize=False).tau == 1.0
    assert RagConfig(question_encoder_normalize=True, score_scale=3.0).tau == 3.0


def test_a_question_that_is_no_text_is_named(model_and_tokenizer):
    retriever = retriever_of(*model_and_tokenizer, toy_passages())
    with pytest.raises(InputError, match=r"The question 'caf\\udce9\?' is not valid Unicode at character 3"):
        retriever.tokenize_questions(["pi?", "caf\udce9?"])


@pytest.mark.parametrize("width", [1, 8])
def test_hits_of_another_width_are_refused(width):
    hit = Hit(Passage("a"), 1.0, np.ones(width, np.float32))
    with pytest.raises(InputError, match=f"question vectors have width 16, the passages' {width};"):
        stack_hits([[hit]], 2, 16)


@pytest.mark.parametrize("name", ["legacy", "compressed", "custom", "exact"])
def test_an_index_that_needs_importing_says_what_to_do(model_and_tokenizer, name):
    model, tokenizer = model_and_tokenizer
    model.config.index_name = name
    with pytest.raises(InputError, match=r"pass index=KnowledgeBase.open"):
        retriever_of(model, tokenizer, None)


def test_own_passages_travel_with_the_folder(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    model.set_retriever(retriever_of(model, tokenizer, toy_passages()))
    before = model(questions=["hamlet?"], n_docs=3, output_retrieved=True)
    model.save_pretrained(tmp_path / "rag")
    model.retriever.save_pretrained(tmp_path / "rag")
    (tmp_path / "rag").rename(tmp_path / "moved")
    retriever = RagRetriever.from_pretrained(tmp_path / "moved")
    again = RagSequenceForGeneration.from_pretrained(tmp_path / "moved", retriever=retriever)
    after = again(questions=["hamlet?"], n_docs=3, output_retrieved=True)
    assert after.retrieved_doc_ids == before.retrieved_doc_ids
    assert torch.allclose(after.doc_scores, before.doc_scores, atol=1e-5)


def test_a_knowledge_base_is_named_only_if_it_lies_inside_the_folder(model_and_tokenizer, tmp_path, caplog):
    model, tokenizer = model_and_tokenizer
    for place, inside in ((tmp_path / "rag" / "kb", True), (tmp_path / "elsewhere", False)):
        base = KnowledgeBase.create(place, encoder=None, width=16)
        base.add(toy_passages(), vectors=np.ones((len(TOY_PASSAGES), 16)))
        retriever = retriever_of(model, tokenizer, base)
        with caplog.at_level(logging.WARNING):
            retriever.save_pretrained(tmp_path / "rag")
        assert RagConfig.from_pretrained(tmp_path / "rag").knowledge_base == ("kb" if inside else None)
        assert ("lies outside" in caplog.text) is not inside


def test_encoder_of_last_resort_warns_once_for_dpr(caplog):
    model, tokenizer = tiny_rag("token", "bart", question_encoder="dpr")
    retriever = retriever_of(model, tokenizer, toy_passages())
    with pytest.raises(ModelError, match="set_retriever"):
        retriever.encode_passages(toy_passages())
    model.set_retriever(retriever)
    with caplog.at_level(logging.WARNING):
        retriever.encode_passages(toy_passages())
        retriever.encode_passages(toy_passages())
    assert caplog.text.count("DPR's question encoder") == 1
    assert retriever.passage_encoder.spec.template == "pair"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (42, "cannot be a int"),
        ([], "nothing to search"),
        ([Passage("a", "", "b")], "width 8, the passages' 4"),
    ],
)
def test_unusable_indexes_get_one_sentence(model_and_tokenizer, index, message):
    def retrieve():
        retriever = retriever_of(*model_and_tokenizer, index, passage_encoder=ToyEncoder(4))
        retriever.retrieve(np.ones((1, 8), np.float32), 2)

    with pytest.raises(InputError, match=message):
        retrieve()


def test_a_dataset_must_have_its_columns():
    from datasets import Dataset

    model, tokenizer = tiny_rag("token", "bart")
    with pytest.raises(InputError, match="no column embeddings"):
        retriever_of(model, tokenizer, Dataset.from_dict({"title": ["a"], "text": ["b"]}))
    broken = Dataset.from_dict({"title": ["a"], "text": ["b"], "embeddings": [[float("nan")] * 16]})
    with pytest.raises(InputError, match="finite"):
        retriever_of(model, tokenizer, broken)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_saved_passage_encoder_makes_the_same_vectors(model_and_tokenizer, tmp_path, pooling):
    model, tokenizer = model_and_tokenizer
    tiny_question_encoder(seed=3).save_pretrained(tmp_path / "encoder")
    question_tokenizer().save_pretrained(tmp_path / "encoder")
    encoder = load_encoder(tmp_path / "encoder", pooling=pooling, normalize=True, passage_prompt="p: ", dtype="float32")
    retriever = retriever_of(model, tokenizer, toy_passages(), passage_encoder=encoder)
    model.save_pretrained(tmp_path / "saved")
    retriever.save_pretrained(tmp_path / "saved")
    loaded = RagRetriever.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        loaded.encode_passages(toy_passages()), retriever.encode_passages(toy_passages()), atol=1e-2
    )
    assert loaded.passage_encoder.spec.normalize
    assert loaded.passage_encoder.spec.pooling == pooling


def save(model, tokenizer, retriever, folder):
    """As the model card does it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    retriever.save_pretrained(folder)


def test_saving_a_retriever_keeps_what_the_model_has_written(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    model.config.score_scale = 2.0
    model.set_retriever(retriever_of(model, tokenizer, ["one", "two"]))
    save(model, tokenizer, model.retriever, tmp_path / "a")
    retriever = RagRetriever.from_pretrained(tmp_path / "a", index=["three", "four"])
    loaded = RagSequenceForGeneration.from_pretrained(tmp_path / "a", retriever=retriever)
    loaded.config.score_scale = 3.0
    save(loaded, tokenizer, retriever, tmp_path / "b")
    config = RagConfig.load(tmp_path / "b")
    assert (config.score_scale, config.passages_path) == (3.0, "passages.parquet")
    assert [p.text for p in RagRetriever.from_pretrained(tmp_path / "b").index.passages] == ["three", "four"]


def test_a_passage_encoder_that_was_never_used_is_saved_too(tmp_path):
    place = tmp_path / "encoder"
    tiny_question_encoder().save_pretrained(place)
    question_tokenizer().save_pretrained(place)
    model, tokenizer = tiny_rag("sequence", "bart", passage_encoder=str(place), use_dummy_dataset=True)
    vectors = load_encoder(place).encode_passages([("", "one")])
    save(model, tokenizer, retriever_of(model, tokenizer, None), tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    place.rename(tmp_path / "gone")
    assert RagConfig.load(tmp_path / "moved").passage_encoder == "passage_encoder"
    loaded = RagRetriever.from_pretrained(tmp_path / "moved")
    assert np.allclose(loaded.encode_passages([Passage("1", text="one")]), vectors, atol=1e-6)


def test_a_saved_dpr_model_keeps_its_context_encoder(tmp_path, caplog):
    places = [tmp_path / f"dpr-{tower}_encoder" for tower in ("question", "ctx")]
    towers = tiny_question_encoder("dpr"), transformers.DPRContextEncoder(tiny_question_encoder("dpr").config)
    for place, tower in zip(places, towers, strict=True):
        tower.save_pretrained(place)
        question_tokenizer().save_pretrained(place)
    tiny_rag("sequence", "bart")[0].generator.save_pretrained(tmp_path / "bart")
    build = RagSequenceForGeneration.from_pretrained_question_encoder_generator
    model, tokenizer = build(places[0], tmp_path / "bart"), tiny_rag("sequence", "bart")[1]
    retriever = retriever_of(model, tokenizer, ["one", "two"])
    model.set_retriever(retriever)
    save(model, tokenizer, retriever, tmp_path / "saved")
    for place in places:
        place.rename(f"{place}-gone")
    loaded = RagRetriever.from_pretrained(tmp_path / "saved")
    RagSequenceForGeneration.from_pretrained(tmp_path / "saved", retriever=loaded)
    passages = toy_passages()
    assert np.allclose(loaded.encode_passages(passages), retriever.encode_passages(passages), atol=1e-6)
    assert "context encoder is not at hand" not in caplog.text


def test_it_takes_a_config_of_transformers(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    config = transformers.RagConfig.from_dict(model.config.to_dict())
    assert type(config) is transformers.RagConfig
    retriever = RagRetriever(config, tokenizer.question_encoder, tokenizer.generator, toy_passages())
    questions = ["who wrote hamlet?"]
    vectors, ids = question_vectors(model, retriever, questions)
    expected = retriever_of(model, tokenizer, toy_passages())
    expected.attach(model.question_encoder)
    retriever.attach(model.question_encoder)
    assert retriever(ids, vectors, n_docs=2)["doc_ids"] == expected(ids, vectors, n_docs=2)["doc_ids"]


@pytest.mark.parametrize("name", ["legacy", "custom"])
def test_the_built_in_passages_are_a_remedy_whatever_index_is_named(model_and_tokenizer, name):
    model, tokenizer = model_and_tokenizer
    model.config.index_name = name
    with pytest.raises(InputError, match="use_dummy_dataset=True"):
        retriever_of(model, tokenizer, None)
    model.config.use_dummy_dataset = True
    assert len(retriever_of(model, tokenizer, None).index) == 200
