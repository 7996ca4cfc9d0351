"""The known faults of transformers' RAG classes, each as a test that ours does not have it.

Where it is quick, the test shows the fault over there first, so that it is clear what must not come back.
"""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers.models.rag.retrieval_rag import CustomHFIndex

from ragstone import RagRetriever, RagSequenceForGeneration, RagTokenForGeneration, RagTokenizer
from ragstone.encoders import Encoder
from ragstone.testing import (
    TOY_PASSAGES,
    question_tokenizer,
    seq2seq_tokenizer,
    tiny_generator,
    tiny_question_encoder,
    tiny_rag,
    toy_passages,
)

OURS = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
THEIRS = {"token": transformers.RagTokenForGeneration, "sequence": transformers.RagSequenceForGeneration}
QUESTION = "Who wrote HAMLET in Zürich?"


def pair(method, kind="bart", n_docs=2):
    """(theirs, ours) with the same weights."""
    encoder = tiny_question_encoder("dpr")
    generator = tiny_generator(kind, seed=1, **({"tie_word_embeddings": False} if kind == "bart" else {}))
    start = generator.config.decoder_start_token_id
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        encoder.config, generator.config, n_docs=n_docs, decoder_start_token_id=start, retrieval_vector_size=16
    )
    theirs = THEIRS[method](config=config, question_encoder=encoder, generator=generator).eval()
    ours = OURS[method].from_pretrained_question_encoder_generator(
        question_encoder_model=encoder, generator_model=generator, n_docs=n_docs
    )
    return theirs, ours


def contexts(passages=2, scores=None):
    make = torch.Generator().manual_seed(0)
    return {
        "context_input_ids": torch.randint(5, 100, (passages, 8), generator=make),
        "context_attention_mask": torch.ones(passages, 8, dtype=torch.long),
        "doc_scores": torch.randn(1, passages, generator=make) if scores is None else torch.tensor([scores]),
    }


def with_passages(model, found=8):
    """Give ours or theirs the toy passages; theirs finds ``found`` of them, and −1 for the others, as faiss does."""
    vectors = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    dataset = Dataset.from_dict(
        {
            "title": [title for title, _ in TOY_PASSAGES],
            "text": [text for _, text in TOY_PASSAGES],
            "embeddings": vectors.tolist(),
        }
    )
    tokenizers = question_tokenizer(), seq2seq_tokenizer()
    if not isinstance(model, tuple(THEIRS.values())):
        model.set_retriever(RagRetriever(model.config, *tokenizers, index=dataset.select(range(found))))
        return model

    def search_batch(name, questions, k):
        best = np.argsort(-(questions @ vectors.T), axis=1)[:, :k].copy()
        best[:, found:] = -1
        return None, best

    dataset.set_format("numpy", columns=["embeddings"], output_all_columns=True, dtype="float32")
    dataset.search_batch = search_batch
    index = CustomHFIndex.__new__(CustomHFIndex)  # its own constructor wants faiss
    index.vector_size, index.dataset, index._index_initialized = 16, dataset, True
    model.set_retriever(transformers.RagRetriever(model.config, *tokenizers, index=index))
    return model


def question_ids():
    return question_tokenizer()([QUESTION], return_tensors="pt")


def test_prior_counts_once_and_for_targets_of_one_token_too():
    """There it is added to the second token's scores: without a second token it is lost, and the NLL is −log K."""
    theirs, ours = pair("sequence")
    target = torch.tensor([[7]])
    for scores in ([0.0, 0.0], [5.0, -5.0]):
        assert theirs(**contexts(scores=scores), labels=target).loss.item() == pytest.approx(-np.log(2), abs=1e-4)
    each = [-ours(**contexts(scores=[s, -s]), labels=target).token_log_probs[0, :, 0] for s in (50.0, 0.0, -50.0)]
    nll = [ours(**contexts(scores=[s, -s]), labels=target).nll.item() for s in (50.0, 0.0, -50.0)]
    assert nll[0] == pytest.approx(each[0][0].item(), abs=1e-4)  # the first passage is certain
    assert nll[2] == pytest.approx(each[2][1].item(), abs=1e-4)  # the second one is
    mean = -(0.5 * (-each[1]).exp().sum()).log()
    assert nll[1] == pytest.approx(mean.item(), abs=1e-4)


@pytest.mark.parametrize("method", OURS)
def test_the_first_label_is_scored(method):
    """There labels are decoder inputs, whose first one nothing predicts."""
    theirs, ours = pair(method)
    labels = [torch.tensor([[first]]) for first in (7, 8)]
    assert theirs(**contexts(), labels=labels[0]).loss == theirs(**contexts(), labels=labels[1]).loss
    losses = [ours(**contexts(), labels=each).nll.item() for each in labels]
    assert all(loss > 0 for loss in losses)
    assert losses[0] != pytest.approx(losses[1], abs=1e-2)


def test_rag_sequence_takes_labels_with_a_t5_generator():
    theirs, ours = pair("sequence", "t5")
    labels = torch.tensor([[5, 6, 1]])
    with pytest.raises(AttributeError, match="bos_token_id"):
        theirs(**contexts(), labels=labels)
    assert ours(**contexts(), labels=labels).nll.item() > 0


@pytest.mark.parametrize("passages", [1, 3])
def test_generating_and_rescoring_use_the_same_n_docs(passages):
    """There hypotheses are made with n_docs passages and scored with config.n_docs."""
    theirs, ours = pair("sequence")
    with pytest.raises((AssertionError, RuntimeError)):
        theirs.generate(**contexts(passages), n_docs=passages, num_beams=2, max_length=6)
    out = ours.generate(**contexts(passages), n_docs=passages, num_beams=2, max_length=6, return_dict_in_generate=True)
    assert out.posteriors.shape == (1, passages)
    labels = out.sequences[:, 1:]
    assert out.log_probs.item() == pytest.approx(-ours(**contexts(passages), labels=labels).nll.item(), abs=1e-4)


def test_rag_token_heeds_max_new_tokens():
    theirs, ours = pair("token")
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    assert theirs.generate(**contexts(), **options).shape[1] > 4
    assert ours.generate(**contexts(), **options).shape[1] == 4


def test_rag_token_samples_as_many_sequences_as_asked_for():
    theirs, ours = pair("token")
    options = {"do_sample": True, "num_return_sequences": 3, "max_length": 6}
    assert len(theirs.generate(**contexts(), **options)) == 1
    assert len(ours.generate(**contexts(), **options)) == 3


def test_rag_sequence_returns_a_dictionary_and_samples():
    theirs, ours = pair("sequence")
    with pytest.raises(AttributeError):
        theirs.generate(**contexts(), return_dict_in_generate=True, max_length=6)
    with pytest.raises(RuntimeError):
        theirs.generate(**contexts(), do_sample=True, num_return_sequences=3, max_length=6)
    options = {"do_sample": True, "num_return_sequences": 3, "max_length": 6}
    assert len(ours.generate(**contexts(), return_dict_in_generate=True, **options).log_probs) == 3


def test_missing_hits_do_not_become_passages():
    """There a slot without a hit is a passage of score 0, the text being the last one's; with a negative score it wins."""
    theirs, ours = pair("token")
    found = with_passages(theirs, found=1)(**question_ids(), output_retrieved=True)
    assert found.doc_scores[0, 1] == 0
    assert TOY_PASSAGES[-1][1] in seq2seq_tokenizer().decode(found.context_input_ids[1])
    out = with_passages(ours, found=1)(questions=[QUESTION], labels=torch.tensor([[7, 8]]), output_retrieved=True)
    assert out.doc_scores[0, 1] == -torch.inf
    assert len(out.retrieved_doc_ids[0]) == 1
    assert ours.posteriors(out)[0].tolist() == [[1.0, 0.0]]
    alone = ours(questions=[QUESTION], labels=torch.tensor([[7, 8]]), n_docs=1)
    torch.testing.assert_close(out.nll, alone.nll)


def test_targets_are_tokenised_in_the_generators_vocabulary():
    tokenizers = question_tokenizer(), seq2seq_tokenizer()
    theirs, ours = transformers.RagTokenizer(*tokenizers), RagTokenizer(*tokenizers)
    assert theirs(text_target="Paris")["input_ids"] == tokenizers[0]("Paris")["input_ids"]
    assert ours(text_target="Paris")["labels"] == tokenizers[1]("Paris")["input_ids"]


@pytest.mark.parametrize("method", OURS)
def test_a_plain_bert_can_be_the_question_encoder(method):
    """There its token states are taken for the question's vector."""
    generator = tiny_generator("bart")
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        tiny_question_encoder("bert").config, generator.config, n_docs=2, retrieval_vector_size=16
    )
    theirs = THEIRS[method](config=config, question_encoder=tiny_question_encoder("bert"), generator=generator)
    with pytest.raises(ValueError, match="ambiguous"):
        with_passages(theirs)(**question_ids())
    ours = with_passages(tiny_rag(method, "bart", question_encoder="bert", n_docs=2)[0])
    assert ours(**question_ids()).doc_scores.shape == (1, 2)


def test_a_question_given_as_text_keeps_its_case_and_its_unknown_words():
    theirs, ours = pair("token")
    read = seq2seq_tokenizer().decode
    found = with_passages(theirs)(**question_ids(), output_retrieved=True)
    assert QUESTION not in read(found.context_input_ids[0])
    out = with_passages(ours)(**question_ids(), questions=[QUESTION], output_retrieved=True)
    assert read(out.context_input_ids[0], skip_special_tokens=True).endswith(f" // {QUESTION}")


@pytest.mark.parametrize("method", OURS)
def test_contexts_are_encoded_and_retrieved_once_however_many_candidates_there_are(method, monkeypatch):
    def count(model):
        model.generate(**question_ids(), max_length=3)  # what Ragstone finds out of a model at its first use
        read, retrieved = [], []
        encoder, retriever = model.generator.get_encoder(), model.retriever
        handle = encoder.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(len(kwargs.get("input_ids", args[0] if args else ()))),
            with_kwargs=True,
        )
        search = retriever.retrieve
        monkeypatch.setattr(
            retriever, "retrieve", lambda *args, **kwargs: retrieved.append(1) or search(*args, **kwargs)
        )
        model.generate(**question_ids(), num_beams=3, max_length=6)
        handle.remove()
        return sum(read), len(retrieved)

    theirs, ours = map(with_passages, pair(method))
    if method == "sequence":
        contexts_read, retrievals = count(theirs)
        assert contexts_read > 2
        assert retrievals == 2  # of as many copies of the question as there are candidates, the second time
    assert count(ours) == (2, 1)


def test_saved_folders_hold_no_absolute_path(tmp_path):
    model, tokenizer = tiny_rag("token", "bart", n_docs=2)
    tiny_question_encoder().save_pretrained(tmp_path / "encoder")
    tokenizer.question_encoder.save_pretrained(tmp_path / "encoder")
    model.config.passage_encoder = str(tmp_path / "encoder")
    retriever = RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, index=toy_passages())
    model.set_retriever(retriever)
    before = model(questions=[QUESTION]).doc_scores
    for part in (model, tokenizer, retriever):
        part.save_pretrained(tmp_path / "rag")
    for file in (tmp_path / "rag").rglob("*config.json"):
        assert str(tmp_path) not in file.read_text()
    (tmp_path / "rag").rename(tmp_path / "moved")
    (tmp_path / "encoder").rename(tmp_path / "gone")
    loaded = RagTokenForGeneration.from_pretrained(
        tmp_path / "moved", retriever=RagRetriever.from_pretrained(tmp_path / "moved")
    )
    torch.testing.assert_close(loaded(questions=[QUESTION]).doc_scores, before)
    assert isinstance(loaded.retriever.passage_encoder, Encoder)


@pytest.mark.parametrize("method", OURS)
def test_misspelt_keywords_are_errors(method):
    theirs, ours = pair(method)
    assert theirs(**contexts(), lables=torch.tensor([[5, 6]])).loss is None
    with pytest.raises(TypeError, match="lables"):
        ours(**contexts(), lables=torch.tensor([[5, 6]]))
    with pytest.raises(TypeError, match="max_lenght"):
        ours.generate(**contexts(), max_lenght=4)
    with pytest.raises(TypeError, match="n_dosc"):
        OURS[method].from_pretrained_question_encoder_generator(
            question_encoder_model=ours.question_encoder, generator_model=ours.generator, n_dosc=4
        )


def test_logits_have_one_meaning():
    """There RAG-Token's are each passage's own (B·K, T, V) or, by a flag, the marginal's (B, T, V)."""
    theirs, ours = pair("token")
    labels = torch.tensor([[5, 6]])
    shapes = [tuple(theirs(**contexts(), labels=labels, do_marginalize=flag).logits.shape) for flag in (False, True)]
    assert shapes == [(2, 2, 400), (1, 2, 400)]
    for flag in (False, True):
        ours.config.do_marginalize = flag
        logits = ours(**contexts(), labels=labels, output_logits=True).logits
        assert logits.shape == (1, 2, 400)
        torch.testing.assert_close(logits.exp().sum(dim=-1), torch.ones(1, 2))
    sequence = pair("sequence")[1]
    assert sequence(**contexts(), labels=labels, output_logits=True).logits.shape == (1, 2, 2, 400)
