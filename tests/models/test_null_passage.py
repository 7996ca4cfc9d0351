"""The null passage, one more slot without a passage (paper, appendix F), and passage dropout."""

import pytest
import torch

from ragstone import RagModel, RagSequenceForGeneration, RagTokenForGeneration
from ragstone.errors import InputError, ModelError
from ragstone.models.body import drop_passages
from ragstone.testing import ToyRetriever, tiny_generator, tiny_question_encoder, tiny_rag

FORMS = ("bias", "embedding", "network")
CLASSES = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
QUESTIONS = ["who wrote Hamlet?", "what is the capital of France, and its river?"]
TARGETS = ["Shakespeare", "Paris"]


def randomise(model, seed=0):
    """Null passages as after training: no weight is 0."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.rag.null_passage.parameters():
            weight.copy_(torch.randn(weight.shape, generator=make) * 0.7)
    return model


def model_of(method="token", kind="bart", form="bias", **config):
    model, tokenizer = tiny_rag(method, kind, n_docs=3, null_passage=form, **config)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    model.tokenizer = tokenizer
    return model if form is None else randomise(model)


def labels_of(model, texts=TARGETS):
    return model.tokenizer(text_target=list(texts), padding=True, return_tensors="pt")["labels"]


@pytest.fixture(params=[(m, k, f) for m in CLASSES for k in ("bart", "llama") for f in FORMS], ids="-".join)
def rag(request):
    return model_of(*request.param)


def null_logits(model, vectors):
    """s_∅ (B,) by the definition of each form, in float64."""
    weights = {name: value.detach().double() for name, value in model.rag.null_passage.named_parameters()}
    q = vectors.detach().double()
    if model.config.null_passage == "bias":
        return weights["bias"].expand(len(q))
    if model.config.null_passage == "embedding":
        return model.config.tau * (q * weights["embedding"]).sum(dim=1)
    standard = (q - q.mean(dim=1, keepdim=True)) / (q.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = torch.tanh(standard @ weights["hidden_weight"].T + weights["hidden_bias"])
    return hidden @ weights["output_weight"] + weights["bias"]


def alone(model, context, tokens):
    """log p(y_t | x, z, y_<t) of ``tokens`` in one context (S,), uncached, in float64: (T,)."""
    answer = torch.tensor([tokens])
    if model.config.causal:
        logits = model.generator(torch.cat([context[None], answer], dim=1)).logits[0, len(context) - 1 : -1]
    else:
        start = torch.tensor([[model.generator.config.decoder_start_token_id, *tokens[:-1]]])
        logits = model.generator(input_ids=context[None], decoder_input_ids=start).logits[0]
    return logits.double().log_softmax(dim=1).gather(1, answer.T).squeeze(1)


@torch.no_grad()
def test_the_marginal_is_the_sum_over_k_passages_and_none(rag):
    rag.config.score_scale = 1.7
    labels = labels_of(rag)
    out = rag(questions=QUESTIONS, labels=labels, output_retrieved=True)
    assert out.doc_scores.shape == (2, 4)
    assert [len(row) for row in out.retrieved_doc_ids] == [3, 3]
    vectors, embeds = out.question_encoder_last_hidden_state, out.retrieved_doc_embeds
    real = 1.7 * (vectors.double()[:, None] * embeds.double()).sum(dim=2)
    scores = torch.cat([real, null_logits(rag, vectors)[:, None]], dim=1)
    torch.testing.assert_close(out.doc_scores.double(), scores, rtol=1e-4, atol=1e-4)
    prior = scores.softmax(dim=1)
    contexts = [ids[mask.bool()] for ids, mask in zip(out.context_input_ids, out.context_attention_mask, strict=True)]
    posteriors = rag.posteriors(out)[0]
    for b in range(2):
        tokens = labels[b][labels[b] >= 0].tolist()
        table = torch.stack([alone(rag, contexts[4 * b + k], tokens) for k in range(4)]).exp()
        joint = prior[b][:, None] * (table if rag.method == "token" else table.prod(dim=1, keepdim=True))
        assert float(out.nll[b]) == pytest.approx(-float(joint.sum(dim=0).log().sum()), rel=1e-4)
        expected = (joint / joint.sum(dim=0)).mean(dim=1)
        torch.testing.assert_close(posteriors[b].double(), expected, rtol=1e-3, atol=1e-5)


def test_the_last_context_is_the_question_without_a_passage(rag):
    out = rag(questions=QUESTIONS, output_retrieved=True)
    texts = [
        rag.tokenizer.generator.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(out.context_input_ids, out.context_attention_mask, strict=True)
    ]
    written = "\n\nQuestion: {}\nAnswer:\n" if rag.config.causal else " / // {}"
    assert [texts[3], texts[7]] == [written.format(question) for question in QUESTIONS]
    assert out.truncated.shape == (2, 4)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_generate_reports_is_what_scoring_says(rag, beams):
    options = {"max_new_tokens": 5, "num_beams": beams, "return_dict_in_generate": True}
    found = rag.generate(questions=QUESTIONS, **options)
    assert found.posteriors.shape == (2, 4)
    labels = rag.rag.adapter().labels_of(found.sequences)
    eos, ended = rag.generator.generation_config.eos_token_id, labels.clone()
    for row in ended:
        if eos in row.tolist():
            row[row.tolist().index(eos) + 1 :] = -100
    out = rag(questions=QUESTIONS, labels=ended)
    torch.testing.assert_close(found.log_probs, -out.nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.posteriors, rag.posteriors(out)[0], rtol=1e-3, atol=1e-4)
    rag.rag.fast = False
    assert torch.equal(rag.generate(questions=QUESTIONS, **options).sequences, found.sequences)


def test_a_causal_model_keeps_null_prompts_in_its_store_and_answers_the_same():
    model = model_of("token", "llama", "bias")
    options = {"questions": QUESTIONS, "max_new_tokens": 4, "return_dict_in_generate": True}
    model.rag.null_passage, null = None, model.rag.null_passage
    model.generate(**options)  # the passages are in the store already when the null prompt comes alone
    model.rag.null_passage = null
    first, second = model.generate(**options), model.generate(**options)
    passages = {i for row in model(questions=QUESTIONS, output_retrieved=True).retrieved_doc_ids for i in row}
    store = model.rag.prompt_store
    assert store.misses == len(store) == len(passages) + 1  # both null prompts begin alike
    assert store.hits == 2 * len(passages) + 1
    model.rag.prompt_store = None
    without = model.generate(**options)
    for out in (first, second):
        assert torch.equal(out.sequences, without.sequences)
        torch.testing.assert_close(out.log_probs, without.log_probs, rtol=1e-4, atol=1e-4)


def test_a_question_without_a_hit_is_answered_from_the_null_passage(rag):
    rag.retriever.found = 0
    labels = labels_of(rag)
    out = rag(questions=QUESTIONS, labels=labels, output_retrieved=True)
    assert out.doc_scores[:, :3].isneginf().all()
    torch.testing.assert_close(rag.posteriors(out)[0], torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2))
    null = {name: getattr(out, name)[3::4] for name in ("context_input_ids", "context_attention_mask")}
    only = rag(**null, doc_scores=torch.zeros(2, 1), labels=labels)
    torch.testing.assert_close(out.nll, only.nll, rtol=1e-4, atol=1e-4)
    assert rag.generate(questions=QUESTIONS, max_new_tokens=3).shape[0] == 2


def test_given_contexts_get_no_null_slot(rag):
    out = rag(questions=QUESTIONS, labels=labels_of(rag), output_retrieved=True)
    contexts = {name: getattr(out, name) for name in ("context_input_ids", "context_attention_mask", "doc_scores")}
    given = rag(**contexts, labels=labels_of(rag))
    assert given.doc_scores.shape == (2, 4)
    torch.testing.assert_close(given.nll, out.nll)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_null_passage_loads_with_either_class_from_a_moved_folder(form, tmp_path):
    model = model_of("sequence", "bart", form)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    before = model(questions=QUESTIONS, labels=labels_of(model))
    names = [name for name in model.state_dict() if "null" in name]
    assert names
    assert all(name.startswith("rag.null_passage.") for name in names)
    for kind in (*CLASSES.values(), RagModel):
        loaded = kind.from_pretrained(tmp_path / "moved")
        assert loaded.config.null_passage == form
        loaded.set_retriever(ToyRetriever(loaded.config, model.tokenizer))
        out = loaded(questions=QUESTIONS, labels=labels_of(model))
        torch.testing.assert_close(out.doc_scores, before.doc_scores)
        if kind is RagSequenceForGeneration:
            torch.testing.assert_close(out.nll, before.nll)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_without_one_can_be_given_one_and_a_damaged_one_is_refused(form, tmp_path):
    from safetensors.torch import load_file, save_file

    model_of(form=None).save_pretrained(tmp_path)
    torch.manual_seed(0)
    added = RagTokenForGeneration.from_pretrained(tmp_path, null_passage=form)
    weights = dict(added.rag.null_passage.named_parameters())
    hidden = weights.pop("hidden_weight", None)
    assert all((weight == 0).all() for weight in weights.values())
    assert hidden is None or 0.2 < hidden.std() < 0.3  # 16 ** -0.5
    added.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "null_passage" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="null_passage"):
        RagTokenForGeneration.from_pretrained(tmp_path)


def test_without_a_null_passage_nothing_is_added():
    model = model_of(form=None)
    assert model.rag.null_passage is None
    assert not [name for name in model.state_dict() if "null" in name]
    assert model(questions=QUESTIONS).doc_scores.shape == (2, 3)


@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_null_passage_are_those_of_finite_differences(method, form):
    model = CLASSES[method].from_pretrained_question_encoder_generator(
        question_encoder_model=tiny_question_encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        generator_model=tiny_generator("bart", dropout=0.0),
        n_docs=3,
        null_passage=form,
        passage_dropout=0.3,
    )
    model.tokenizer = tiny_rag()[1]
    model.set_retriever(ToyRetriever(model.config, model.tokenizer))
    randomise(model.double().train())
    batch = model.tokenizer.prepare_seq2seq_batch(QUESTIONS, TARGETS, return_tensors="pt")

    def loss():
        torch.manual_seed(3)  # the same passages are dropped
        return model(**batch).loss

    parts = {"null passage": model.rag.null_passage, "question encoder": model.question_encoder}
    for part in parts.values():
        weights = list(part.parameters())
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
        make = torch.Generator().manual_seed(0)
        directions = [torch.randn(p.shape, generator=make, dtype=p.dtype) for p in weights]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(weights, directions, strict=True):
                    p += step * d
                sides.append(loss())
        with torch.no_grad():
            for p, d in zip(weights, directions, strict=True):
                p += 1e-6 * d
        assert slope.abs() > 1e-3
        torch.testing.assert_close((sides[0] - sides[1]) / 2e-6, slope, rtol=1e-5, atol=1e-7)
    null_gradients = torch.autograd.grad(loss(), list(model.rag.null_passage.parameters()))
    assert all((gradient != 0).any() for gradient in null_gradients)


@pytest.mark.parametrize("form", FORMS)
def test_it_starts_at_a_cosine_of_two_fifths_or_where_questions_put_it(form):
    model, tokenizer = tiny_rag("token", null_passage=form, question_encoder_normalize=True)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    start = model(questions=QUESTIONS).doc_scores[:, -1]
    torch.testing.assert_close(start, torch.full((2,), 0.0 if form == "embedding" else 8.0))
    model.config.score_scale = 3.0
    model.rag.start_null_passage(QUESTIONS, prior=0.25)
    scores = model(questions=QUESTIONS).doc_scores
    odds = scores[:, -1] - scores[:, :-1].logsumexp(dim=1)
    wanted = torch.tensor([0.25]).logit()
    if form == "embedding":  # fits as many questions as it has dimensions
        torch.testing.assert_close(odds, wanted.expand(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(odds.mean(), wanted[0], rtol=1e-3, atol=1e-3)


def test_starting_it_needs_one_and_something_to_find():
    with pytest.raises(InputError, match="no null passage"):
        model_of(form=None).rag.start_null_passage(QUESTIONS)
    model = model_of()
    with pytest.raises(InputError, match="prior is 1"):
        model.rag.start_null_passage(QUESTIONS, prior=1)
    model.retriever.found = 0
    with pytest.raises(InputError, match="No passage was found"):
        model.rag.start_null_passage(QUESTIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"null_passage": "zero"}, "'zero'"), ({"passage_dropout": 1.0}, "1.0"), ({"passage_dropout": -0.1}, "-0.1")],
)
def test_values_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        tiny_rag("token", **fields)


def test_a_dpr_encoder_s_vectors_have_their_own_width():
    model, tokenizer = tiny_rag("token", question_encoder="dpr", null_passage="embedding")
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    assert model(questions=QUESTIONS).doc_scores.shape == (2, model.config.n_docs + 1)
    assert model.rag.null_passage.embedding.shape == (16,)


def test_in_half_precision_the_null_passage_trains_too():
    model = model_of("token", "bart", "network").to(torch.bfloat16)
    out = model(questions=QUESTIONS, labels=labels_of(model))
    assert out.doc_scores.dtype == torch.float32
    out.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.rag.null_passage.parameters())


@pytest.mark.parametrize("all_may_fall", [False, True])
def test_each_passage_is_dropped_with_the_given_probability(all_may_fall):
    torch.manual_seed(0)
    scores = torch.randn(20_000, 3)
    scores[::2, 2] = -torch.inf
    kept = ~drop_passages(scores, 0.4, all_may_fall=all_may_fall).isneginf()
    whole = kept[1::2]
    if all_may_fall:
        assert abs(whole.float().mean(dim=0) - 0.6).max() < 0.015  # three standard errors: 0.0147
        assert abs(float((~whole).all(dim=1).float().mean()) - 0.4**3) < 0.0075
    else:
        assert kept.any(dim=1).all()
        # A passage stays by the draw, or as the best of a row that would be empty.
        assert abs(float(whole.float().mean()) - (0.6 + 0.4**3 / 3)) < 0.009
    assert not kept[::2, 2].any()


def test_the_best_of_a_row_stays_where_all_would_fall():
    scores = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf, -5.0, -torch.inf], [-torch.inf] * 3])
    left = drop_passages(scores, 1 - 1e-12, all_may_fall=False)
    assert left.tolist() == [[-torch.inf, 3.0, -torch.inf], [-torch.inf, -5.0, -torch.inf], [-torch.inf] * 3]
    assert drop_passages(scores, 1 - 1e-12, all_may_fall=True).isneginf().all()


@pytest.mark.parametrize("form", [None, "bias"])
def test_dropout_is_for_training_alone_and_follows_the_seed(form):
    model = model_of("token", "bart", form, passage_dropout=0.5)
    torch.manual_seed(5)
    whole = model(questions=QUESTIONS).doc_scores
    assert whole.isfinite().all()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))  # nothing was drawn
    full = model(questions=QUESTIONS, output_retrieved=True)
    contexts = {name: getattr(full, name) for name in ("context_input_ids", "context_attention_mask")}
    model.rag.training = True  # but not its parts, whose own dropout would change the scores
    draws = []
    for seed in (1, 1, *range(2, 10)):
        torch.manual_seed(seed)
        draws.append(model(questions=QUESTIONS, labels=labels_of(model), output_retrieved=True))
    assert torch.equal(draws[0].doc_scores, draws[1].doc_scores)
    assert torch.equal(draws[0].nll, draws[1].nll)
    assert len({str(draw.doc_scores.isneginf().tolist()) for draw in draws}) > 3
    for draw in draws:
        left = ~draw.doc_scores.isneginf()
        assert torch.equal(draw.doc_scores[left], whole[left])
        assert left.any(dim=1).all()
        assert form is None or left[:, -1].all()
        # What fell is not read, and the loss is that of what is left.
        lengths = draw.context_attention_mask.sum(dim=1).view(left.shape)
        assert (lengths[~left] == 1).all()
        assert (lengths[left] > 1).all()
        expected = model(**contexts, doc_scores=whole.masked_fill(~left, -torch.inf), labels=labels_of(model))
        torch.testing.assert_close(draw.nll, expected.nll, rtol=1e-4, atol=1e-4)
