"""The model with a retriever: passages are chosen without gradient and scored with it."""

import logging

import numpy as np
import pytest
import torch

from ragstone.errors import InputError
from ragstone.models import Retriever
from ragstone.testing import TOY_PASSAGES, ToyRetriever, tiny_rag

KINDS = ("bart", "llama")
QUESTIONS = ["who wrote Hamlet?", "what is the capital of France, and its river?"]


@pytest.fixture(params=[(m, k) for m in ("token", "sequence") for k in KINDS], ids="-".join)
def rag(request):
    """A model with eight toy passages behind it."""
    model, tokenizer = tiny_rag(*request.param, n_docs=3)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    model.tokenizer = tokenizer
    return model


def labels_of(rag, texts=("Shakespeare", "Paris")):
    return rag.tokenizer(text_target=list(texts), padding=True, return_tensors="pt")["labels"]


def test_the_toy_retriever_is_a_retriever(rag):
    assert isinstance(rag.retriever, Retriever)
    assert rag.retriever.question_encoder is rag.question_encoder


def test_scores_are_inner_products_of_question_and_retrieved_vectors(rag):
    out = rag(questions=QUESTIONS, output_retrieved=True)
    vectors = out.question_encoder_last_hidden_state
    expected = torch.einsum("bd,bkd->bk", vectors, out.retrieved_doc_embeds)
    torch.testing.assert_close(out.doc_scores, expected)
    assert [[int(i.removeprefix("toy-")) for i in row] for row in out.retrieved_doc_ids] == best_by_hand(rag, vectors)
    assert out.context_input_ids.shape == out.context_attention_mask.shape
    assert len(out.context_input_ids) == 6


def best_by_hand(rag, vectors):
    scores = vectors.detach().numpy() @ rag.retriever.vectors.T
    return [sorted(range(len(TOY_PASSAGES)), key=lambda n: -row[n])[:3] for row in scores]


def test_tau_scales_what_is_retrieved(rag):
    plain = rag(questions=QUESTIONS).doc_scores
    rag.config.score_scale = 2.5
    torch.testing.assert_close(rag(questions=QUESTIONS).doc_scores, 2.5 * plain)


@pytest.mark.parametrize(("normalize", "tau"), [(False, 1.0), (True, 20.0)])
def test_tau_is_20_for_vectors_of_unit_length(normalize, tau):
    model, tokenizer = tiny_rag("token", question_encoder_normalize=normalize)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    out = model(questions=QUESTIONS, output_retrieved=True)
    expected = tau * torch.einsum("bd,bkd->bk", out.question_encoder_last_hidden_state, out.retrieved_doc_embeds)
    torch.testing.assert_close(out.doc_scores, expected)
    assert (out.question_encoder_last_hidden_state.norm(dim=1) - 1).abs().max() < 1e-5 or not normalize


def test_retrieving_equals_handing_over_what_was_retrieved(rag):
    labels = labels_of(rag)
    out = rag(questions=QUESTIONS, labels=labels, output_retrieved=True)
    given = rag(
        context_input_ids=out.context_input_ids,
        context_attention_mask=out.context_attention_mask,
        doc_scores=out.doc_scores,
        labels=labels,
    )
    torch.testing.assert_close(given.nll, out.nll)


def test_questions_as_text_and_as_tokens_retrieve_the_same_and_text_keeps_its_case(rag):
    batch = rag.tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    by_tokens = rag(**batch, output_retrieved=True)
    decoded = [question.replace(" ", "") for question in rag.retriever.questions]
    assert decoded == [question.lower().replace(" ", "") for question in QUESTIONS]  # WordPiece gives no better
    by_text = rag(questions=QUESTIONS, output_retrieved=True)
    both = rag(**batch, questions=QUESTIONS, output_retrieved=True)
    assert rag.retriever.questions == QUESTIONS
    assert by_tokens.retrieved_doc_ids == by_text.retrieved_doc_ids == both.retrieved_doc_ids
    torch.testing.assert_close(by_text.doc_scores, by_tokens.doc_scores)
    context = rag.tokenizer.decode(both.context_input_ids[0])
    assert "who wrote Hamlet?" in context


def test_a_mask_that_is_left_out_is_all_but_padding(rag):
    batch = rag.tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    masked, unmasked = rag(**batch), rag(input_ids=batch["input_ids"])
    torch.testing.assert_close(unmasked.doc_scores, masked.doc_scores)


def test_fewer_hits_than_slots_leave_empty_slots_that_count_for_nothing(rag):
    labels = labels_of(rag)
    rag.retriever.found = 2
    three = rag(questions=QUESTIONS, labels=labels, n_docs=3)
    two = rag(questions=QUESTIONS, labels=labels, n_docs=2)
    assert three.doc_scores[:, 2].isneginf().all()
    torch.testing.assert_close(three.nll, two.nll)
    torch.testing.assert_close(rag.posteriors(three)[0][:, :2], rag.posteriors(two)[0])
    options = {"questions": QUESTIONS, "max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True}
    wide, narrow = rag.generate(n_docs=3, **options), rag.generate(n_docs=2, **options)
    assert torch.equal(wide.sequences, narrow.sequences)
    torch.testing.assert_close(wide.log_probs, narrow.log_probs)
    assert (wide.posteriors[:, 2] == 0).all()


def test_no_hit_at_all_is_an_error_that_says_so(rag):
    rag.retriever.found = 0
    with pytest.raises(InputError, match=r"question 'who wrote Hamlet\?'"):
        rag(questions=QUESTIONS)


def test_retrieval_happens_once_however_many_hypotheses_there_are(rag):
    rag.generate(questions=QUESTIONS, num_beams=4, num_return_sequences=4, max_new_tokens=5)
    assert rag.retriever.calls == 1


def test_n_docs_is_the_configured_number_unless_it_is_given(rag):
    assert rag(questions=QUESTIONS).doc_scores.shape == (2, 3)
    assert rag(questions=QUESTIONS, n_docs=5).doc_scores.shape == (2, 5)


def test_cut_contexts_are_reported_and_warned_of_once(rag, caplog):
    lengths = rag(questions=QUESTIONS, n_docs=8, output_retrieved=True).context_attention_mask.sum(dim=1)
    rag.config.max_combined_length = int(lengths.median())
    with caplog.at_level(logging.WARNING, "ragstone"):
        out = rag(questions=QUESTIONS, n_docs=8)
    assert out.truncated.any()
    assert not out.truncated.all()
    assert len(caplog.records) == 1
    assert f"{int(out.truncated.sum())} of 16" in caplog.text
    assert out.truncated.shape == (2, 8)


def test_a_lone_question_is_a_batch_of_one_and_none_is_refused(rag):
    question = QUESTIONS[0]
    torch.testing.assert_close(rag(questions=question).doc_scores, rag(questions=[question]).doc_scores)
    assert rag.retriever.questions == [question]
    one, other = (rag.generate(questions=asked, max_new_tokens=4) for asked in (question, [question]))
    assert torch.equal(one, other)
    for ask in (rag, rag.generate):
        with pytest.raises(InputError, match="questions is empty; ask at least one"):
            ask(questions=[])
        with pytest.raises(InputError, match="input_ids is empty"):
            ask(input_ids=torch.zeros(0, 4, dtype=torch.long))


def test_without_a_retriever_the_error_says_what_to_do(rag):
    rag.set_retriever(None)
    with pytest.raises(InputError, match="set_retriever"):
        rag(questions=QUESTIONS)
    rag.set_retriever(ToyRetriever(rag.config, rag.tokenizer))
    with pytest.raises(InputError, match="questions="):
        rag()


def test_gradient_reaches_the_question_encoder_and_the_generator(rag):
    rag(questions=QUESTIONS, labels=labels_of(rag)).loss.backward()
    for part in (rag.question_encoder, rag.generator):
        total = sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None)
        assert 0 < total < torch.inf


def test_the_question_encoder_learns_to_prefer_the_passage_that_helps(rag):
    """d NLL / d s_k = Σ_t (prior_k − p(z_k|x,y_≤t)), for RAG-Sequence with one posterior for the whole target."""
    out = rag(questions=QUESTIONS, labels=labels_of(rag), reduce_loss=True)
    out.doc_scores.retain_grad()
    out.loss.backward()
    prior, (posterior, by_token) = out.doc_scores.softmax(dim=1), rag.posteriors(out)
    expected = prior - posterior
    if by_token is not None:
        expected = out.scored.sum(dim=1, keepdim=True) * prior - by_token.sum(dim=2)
    torch.testing.assert_close(out.doc_scores.grad, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_dpr_question_encoder_gives_its_pooled_vector():
    model, tokenizer = tiny_rag("token", question_encoder="dpr")
    assert model.config.question_encoder_pooling == "pooler"
    batch = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.question_encoder(**batch).pooler_output
        torch.testing.assert_close(model.rag.encode_questions(**batch), expected)
    model.config.question_encoder_pooling = None  # as transformers writes it
    torch.testing.assert_close(model.rag.encode_questions(**batch), expected)


def test_retrieved_vectors_may_be_of_half_precision(rag):
    rag.to(torch.bfloat16)
    out = rag(questions=QUESTIONS, labels=labels_of(rag))
    assert out.nll.dtype == torch.float32
    assert out.loss.isfinite()
    assert isinstance(rag.retriever.vectors, np.ndarray)
    found = rag.generate(questions=QUESTIONS, max_new_tokens=4, num_beams=2, return_dict_in_generate=True)
    assert found.log_probs.isfinite().all()
    torch.testing.assert_close(found.posteriors.sum(dim=1).float(), torch.ones(2))
