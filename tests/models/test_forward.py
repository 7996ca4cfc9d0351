"""The forward pass on given contexts: what is scored, what comes back, and what is refused."""

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

from ragstone.errors import InputError
from ragstone.marginal import IGNORED

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def targets(case, rows):
    """Labels (B, T), each row padded with −100."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows])


def test_nll_is_the_definition(case, method, kind):
    one = case(method, kind, batch=4, seed=3)
    rows = [[5, 6, 7, one.eos], [8], [one.eos], [9, 9, 9, 9, 9, one.eos]]
    out = one.model(**one.inputs, labels=targets(one, rows))
    expected = torch.tensor([-one.log_prob(b, row) for b, row in enumerate(rows)])
    torch.testing.assert_close(out.nll, expected, **CLOSE)
    torch.testing.assert_close(out.loss, expected.mean(), **CLOSE)
    assert out.loss.requires_grad


def test_loss_is_a_mean_or_on_request_a_sum(case, method):
    one = case(method)
    labels = targets(one, [[5, 6], [7, 8]])
    mean, total = one.model(**one.inputs, labels=labels), one.model(**one.inputs, labels=labels, reduce_loss=True)
    torch.testing.assert_close(mean.loss, mean.nll.mean())
    torch.testing.assert_close(total.loss, mean.nll.sum())
    one.model.config.reduce_loss = True
    torch.testing.assert_close(one.model(**one.inputs, labels=labels).loss, total.loss)


def test_ignored_labels_are_never_scored_wherever_they_stand(case, method, kind):
    one = case(method, kind)
    full = one.model(**one.inputs, labels=torch.tensor([[5, 6, 7, 8]] * 2))
    labels = torch.tensor([[IGNORED, 6, 7, 8], [5, 6, 7, IGNORED]])
    out = one.model(**one.inputs, labels=labels)
    assert out.scored.tolist() == [[False, True, True, True], [True, True, True, False]]
    assert out.token_log_probs[0, :, 0].abs().sum() == 0
    assert out.token_log_probs[1, :, 3].abs().sum() == 0
    torch.testing.assert_close(out.token_log_probs[1, :, :3], full.token_log_probs[1, :, :3])


def test_padding_is_scored_only_where_it_is_eos(case, method):
    bart, llama = case(method, "bart"), case(method, "llama")
    assert (bart.pad, bart.eos, llama.pad, llama.eos) == (1, 2, 0, 0)
    assert bart.model(**bart.inputs, labels=torch.tensor([[5, 2, 1]] * 2)).scored.tolist() == [[True, True, False]] * 2
    assert llama.model(**llama.inputs, labels=torch.tensor([[5, 0, 0]] * 2)).scored.all()


@pytest.mark.parametrize("labels", [torch.full((2, 3), IGNORED), torch.zeros(2, 0, dtype=torch.long)])
def test_an_empty_target_is_certain(case, method, kind, labels):
    one = case(method, kind)
    out = one.model(**one.inputs, labels=labels)
    torch.testing.assert_close(out.nll, torch.zeros(2))
    posteriors, _ = one.model.posteriors(out)
    torch.testing.assert_close(posteriors.double(), one.prior.exp())


def test_label_smoothing_is_the_definition(case, method, kind):
    """(1 − ε)·NLL + ε·NLL of a target that is each token of V by 1/V; the first label is not scored."""
    one = case(method, kind, vocabulary=8)
    one.model.config.label_smoothing = 0.2
    out = one.model(**one.inputs, labels=torch.tensor([[IGNORED, 6, 7]] * 2))
    given = [[int(one.model.rag.adapter().fill_token_id), 6, 7]] * 2
    losses = []
    for b in range(2):
        table, prior = one.table(b, given[b])[:, 1:3], one.prior[b]
        if method == "token":
            uniform = (prior[:, None, None] + table).logsumexp(dim=0).mean(dim=1).sum()
        else:
            uniform = (prior + table.mean(dim=2).sum(dim=1)).logsumexp(dim=0)
        losses.append(0.8 * out.nll[b] - 0.2 * uniform)
    torch.testing.assert_close(out.loss.double(), torch.stack(losses).mean(), **CLOSE)


def test_logits_are_returned_on_request_in_one_meaning_for_each_method(case, method, kind):
    one = case(method, kind, vocabulary=12)
    labels = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert one.model(**one.inputs, labels=labels).logits is None
    logits = one.model(**one.inputs, labels=labels, output_logits=True).logits
    for b in range(2):
        table = one.table(b, labels[b].tolist())[:, :3]
        expected = table if method == "sequence" else (one.prior[b][:, None, None] + table).logsumexp(dim=0)
        real = one.prior[b].isfinite() if method == "sequence" else slice(None)
        torch.testing.assert_close(logits[b][real].double(), expected[real], **CLOSE)


def test_results_have_the_shapes_they_promise(case, method, kind):
    @jaxtyped(typechecker=beartype)
    def check(
        loss: Float[Tensor, ""],
        nll: Float[Tensor, " B"],
        doc_scores: Float[Tensor, "B K"],
        token_log_probs: Float[Tensor, "B K T"],
        scored: Bool[Tensor, "B T"],
        posteriors: Float[Tensor, "B K"],
    ):
        return nll.shape, token_log_probs.shape

    one = case(method, kind)
    out = one.model(**one.inputs, labels=torch.tensor([[5, 6, 7, 8]] * 2))
    posteriors, by_token = one.model.posteriors(out)
    assert check(out.loss, out.nll, out.doc_scores, out.token_log_probs, out.scored, posteriors) == ((2,), (2, 3, 4))
    assert (by_token is not None) == (method == "token")


def test_posteriors_are_the_definition(case, method, kind):
    one = case(method, kind)
    rows = [[5, 6, 7], [8, one.eos]]
    posteriors, _ = one.model.posteriors(one.model(**one.inputs, labels=targets(one, rows)))
    for b, row in enumerate(rows):
        torch.testing.assert_close(posteriors[b].double(), one.posterior(b, row), **CLOSE)
    with pytest.raises(InputError, match="labels"):
        one.model.posteriors(one.model(**one.inputs))


def test_decoder_inputs_replace_the_shifted_labels(case, method):
    one = case(method, "bart")
    labels = torch.tensor([[5, 6, 7], [8, 9, 10]])
    shifted = torch.cat([torch.full((2, 1), 2), labels[:, :-1]], dim=1)
    same = one.model(**one.inputs, labels=labels, decoder_input_ids=shifted)
    torch.testing.assert_close(same.nll, one.model(**one.inputs, labels=labels).nll)
    other = one.model(**one.inputs, labels=labels, decoder_input_ids=shifted.flip(1))
    assert (other.nll - same.nll).abs().min() > 1e-3
    alone = one.model(**one.inputs, decoder_input_ids=shifted)
    assert alone.loss is None
    torch.testing.assert_close(alone.logits, one.model(**one.inputs, labels=labels, output_logits=True).logits)


def test_without_a_target_the_generator_does_not_run(case, method, monkeypatch):
    one = case(method)
    monkeypatch.setattr(one.model.generator, "forward", None)
    out = one.model(**one.inputs)
    assert torch.equal(out.doc_scores, one.inputs["doc_scores"])
    assert out.loss is out.logits is out.context_input_ids is None
    kept = one.model(**one.inputs, output_retrieved=True)
    assert torch.equal(kept.context_input_ids, one.inputs["context_input_ids"])


def test_given_scores_are_taken_as_they_are(case, method):
    one = case(method)
    labels = torch.tensor([[5, 6]] * 2)
    before = one.model(**one.inputs, labels=labels).nll
    one.model.config.score_scale = 7.0
    torch.testing.assert_close(one.model(**one.inputs, labels=labels).nll, before)


def test_a_mask_can_be_left_out_where_padding_has_a_token_of_its_own(case, method):
    one = case(method, "bart")
    ids = one.inputs["context_input_ids"].masked_fill(one.inputs["context_attention_mask"] == 0, 1)
    labels = torch.tensor([[5, 6]] * 2)
    out = one.model(context_input_ids=ids, doc_scores=one.inputs["doc_scores"], labels=labels)
    torch.testing.assert_close(out.nll, one.model(**one.inputs, labels=labels).nll)
    causal = case(method, "llama")
    with pytest.raises(InputError, match="context_attention_mask"):
        causal.model(context_input_ids=ids, doc_scores=causal.inputs["doc_scores"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type_mean_the_same(case, method, kind, dtype):
    one = case(method, kind)
    labels = torch.tensor([[5, 6]] * 2)
    mask = one.inputs["context_attention_mask"]
    ids, holes = one.inputs["context_input_ids"].flip(1), mask.flip(1)
    expected = one.model(**one.inputs | {"context_input_ids": ids, "context_attention_mask": holes}, labels=labels).nll
    ours = one.model(
        **one.inputs | {"context_input_ids": ids, "context_attention_mask": holes.to(dtype)}, labels=labels
    )
    torch.testing.assert_close(ours.nll, expected)


def test_a_context_without_a_token_is_an_empty_slot(case, method, kind):
    one = case(method, kind, empty=False)
    mask = one.inputs["context_attention_mask"].clone()
    mask[1] = 0
    out = one.model(**one.inputs | {"context_attention_mask": mask}, labels=torch.tensor([[5, 6]] * 2))
    assert out.doc_scores[0, 1] == -torch.inf
    one.inputs["doc_scores"][0, 1] = -torch.inf
    assert out.nll[0].item() == pytest.approx(-one.log_prob(0, [5, 6]), abs=1e-4)


def test_misspelt_keywords_are_type_errors(case, method):
    one = case(method)
    with pytest.raises(TypeError, match="lables"):
        one.model(**one.inputs, lables=torch.tensor([[5]]))


NAN = torch.tensor([[0.0, float("nan"), 0.0]] * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_scores": NAN}, "NaN"),
        ({"doc_scores": torch.full((2, 3), torch.inf)}, "infinity"),
        ({"doc_scores": torch.tensor([[0.0] * 3, [-torch.inf] * 3])}, "question 1"),
        ({"doc_scores": torch.zeros(6)}, r"\(6,\)"),
        ({"doc_scores": torch.zeros(2, 3, dtype=torch.long)}, "float"),
        ({"doc_scores": torch.zeros(2, 4)}, r"\(6, 7\).*8 rows"),
        ({"doc_scores": None}, "doc_scores together"),
        ({"context_input_ids": None}, "together"),
        ({"context_attention_mask": torch.ones(6, 5)}, r"\(6, 7\).*\(6, 5\)"),
        ({"context_attention_mask": torch.zeros(6, 7)}, "question 0"),
        ({"context_input_ids": torch.full((6, 7), 99)}, "context_input_ids hold the token 99.*knows 40"),
        ({"doc_scores": torch.zeros(0, 3)}, r"\(0, 3\); ask at least one"),
        ({"n_docs": 2}, "n_docs is 2.*3 columns"),
        ({"alternative": 40}, "alternative is 40.*0 to 39"),
        ({"alternative": -1}, "alternative is -1.*0 to 39"),
        ({"labels": torch.tensor([[5], [40]])}, "labels hold the token 40.*knows 40"),
        ({"labels": torch.tensor([[5], [-1]])}, "labels hold the token -1"),
        ({"labels": torch.tensor([[5]])}, r"labels has shape \(1, 1\) for 2 questions"),
        ({"labels": torch.tensor([5, 6])}, r"labels has shape \(2,\)"),
        ({"decoder_input_ids": torch.tensor([[2], [-100]])}, "decoder_input_ids hold the token -100"),
        ({"decoder_input_ids": torch.tensor([[2, 5]] * 2)}, r"\(2, 2\) but labels \(2, 1\)"),
    ],
)
def test_what_does_not_fit_is_named(case, method, changes, message):
    one = case(method)
    inputs = {**one.inputs, "labels": torch.tensor([[5], [6]]), **changes}
    with pytest.raises(InputError, match=f"(?s){message}"):
        one.model(**inputs)


def test_generate_checks_its_inputs_the_same_way(case, method):
    one = case(method)
    with pytest.raises(InputError, match="NaN"):
        one.model.generate(**{**one.inputs, "doc_scores": NAN})
    with pytest.raises(InputError, match="ask at least one question"):
        one.model.generate(**{name: value[:0] for name, value in one.inputs.items()})
    for start in (torch.tensor([[2]]), torch.tensor([2, 2])):
        with pytest.raises(InputError, match=r"decoder_input_ids has shape .* for 2 questions"):
            one.model.generate(**one.inputs, decoder_input_ids=start)
    with pytest.raises(InputError, match="no retriever"):
        one.model.generate(input_ids=torch.tensor([[5]]))


def test_the_body_reads_without_a_marginal(case, method):
    one = case(method)
    out = one.model.rag(**one.inputs, labels=torch.tensor([[5, 6]] * 2))
    assert out.logits.shape == (2, 3, 2, 40)
    whole = one.model(**one.inputs, labels=torch.tensor([[5, 6]] * 2))
    torch.testing.assert_close(out.token_log_probs, whole.token_log_probs)
    assert out.loss is None
