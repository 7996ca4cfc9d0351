"""The equations against their definitions, summed up by hand in float64."""

from itertools import product
from math import exp, inf, isnan, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragstone.marginal import (
    IGNORED,
    label_log_probs,
    log_prior,
    marginal_next_token,
    mean_log_probs,
    mean_token_posterior,
    scored_tokens,
    sequence_log_likelihood,
    sequence_posterior,
    smoothed_loss,
    token_log_likelihood,
    token_posteriors,
)

LIKELIHOODS = {"sequence": sequence_log_likelihood, "token": token_log_likelihood}


class Case:
    """Random scores (B, K), token log-probabilities (B, K, T) and masks; every row holds a passage."""

    def __init__(self, seed, *, batch=3, passages=4, tokens=5, scale=3.0, dtype=torch.float64):
        make = torch.Generator().manual_seed(seed)
        self.scores = (torch.randn(batch, passages, generator=make, dtype=torch.float64) * scale).to(dtype)
        self.real = torch.rand(batch, passages, generator=make) < 0.7
        self.real[range(batch), torch.randint(passages, (batch,), generator=make)] = True
        self.log_probs = -(torch.rand(batch, passages, tokens, generator=make, dtype=torch.float64) * 4).to(dtype)
        self.scored = torch.rand(batch, tokens, generator=make) < 0.7


def by_hand(case, method):
    """log p(y|x) of every row, by the definition in plain floats."""
    out = []
    for scores, real, table, scored in zip(
        case.scores.tolist(), case.real.tolist(), case.log_probs.tolist(), case.scored.tolist(), strict=True
    ):
        top = max(s for s, r in zip(scores, real, strict=True) if r)
        weight = [exp(s - top) if r else 0.0 for s, r in zip(scores, real, strict=True)]
        prior = [w / sum(weight) for w in weight]
        counted = [[lp for lp, c in zip(row, scored, strict=True) if c] for row in table]
        if method == "sequence":
            out.append(log(sum(p * exp(sum(row)) for p, row in zip(prior, counted, strict=True))))
        else:
            steps = zip(*counted, strict=True)
            out.append(sum(log(sum(p * exp(lp) for p, lp in zip(prior, step, strict=True))) for step in steps))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("method", LIKELIHOODS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    passages=st.integers(1, 6),
    tokens=st.integers(0, 6),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_likelihoods_equal_their_definition(method, seed, batch, passages, tokens, scale):
    case = Case(seed, batch=batch, passages=passages, tokens=tokens, scale=scale)
    ours = LIKELIHOODS[method](log_prior(case.scores, case.real), case.log_probs, case.scored)
    torch.testing.assert_close(ours, by_hand(case, method), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", LIKELIHOODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_half_precision_inputs_are_computed_in_float32(method, dtype, tolerance):
    case = Case(1, dtype=dtype)
    ours = LIKELIHOODS[method](log_prior(case.scores, case.real), case.log_probs, case.scored)
    assert ours.dtype == torch.float32
    # by_hand reads the rounded inputs, so that only our own arithmetic is measured.
    torch.testing.assert_close(ours.double(), by_hand(case, method), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", LIKELIHOODS)
def test_one_passage_leaves_the_language_model_alone(method):
    case = Case(2, passages=1)
    expected = case.log_probs[:, 0].masked_fill(~case.scored, 0.0).sum(dim=1)
    ours = LIKELIHOODS[method](log_prior(case.scores), case.log_probs, case.scored)
    torch.testing.assert_close(ours, expected)


def test_methods_agree_on_targets_of_one_token_and_differ_beyond():
    prior = log_prior(torch.tensor([[0.3, -1.2]], dtype=torch.float64))
    table = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]], dtype=torch.float64).log()
    one = [likelihood(prior, table[..., :1]) for likelihood in LIKELIHOODS.values()]
    torch.testing.assert_close(one[0], one[1])
    two = [likelihood(prior, table) for likelihood in LIKELIHOODS.values()]
    assert (two[0] - two[1]).abs() > 0.1


@pytest.mark.parametrize("method", LIKELIHOODS)
def test_an_empty_target_is_certain(method):
    prior = log_prior(torch.tensor([[0.3, -1.0, 2.0], [0.0, -torch.inf, 5.0]]))
    short = LIKELIHOODS[method](prior, torch.zeros(2, 3, 0))
    ignored = LIKELIHOODS[method](prior, torch.full((2, 3, 4), -7.0), torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(short, torch.zeros(2))
    torch.testing.assert_close(ignored, torch.zeros(2))


@pytest.mark.parametrize("method", LIKELIHOODS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores_neither_overflow_nor_vanish(method, size):
    table = torch.tensor([[[-1.0, -2.0], [-3.0, -0.5]]])
    ours = LIKELIHOODS[method](log_prior(torch.tensor([[size, size - 1e4]])), table)
    torch.testing.assert_close(ours, torch.tensor([-3.0]))  # the first passage has the whole prior
    shifted = LIKELIHOODS[method](log_prior(torch.tensor([[size, size + 0.5]])), table)
    torch.testing.assert_close(shifted, LIKELIHOODS[method](log_prior(torch.tensor([[0.0, 0.5]])), table))


@pytest.mark.parametrize("method", LIKELIHOODS)
@pytest.mark.parametrize("length", [1, 3])
def test_probabilities_of_all_strings_sum_to_one(method, length):
    """Every string of at most ``length`` tokens before EOS, or of exactly ``length``: together they are certain."""
    vocabulary, passages, eos = 3, 2, 0
    make = torch.Generator().manual_seed(3)
    prefixes = [p for n in range(length) for p in product(range(vocabulary), repeat=n)]
    model = {
        p: torch.randn(passages, vocabulary, generator=make, dtype=torch.float64).log_softmax(dim=-1) for p in prefixes
    }
    prior = log_prior(torch.randn(1, passages, generator=make, dtype=torch.float64))
    ended = [(*p, eos) for p in prefixes if eos not in p]
    cut = [p for p in product(range(1, vocabulary), repeat=length)]
    total = 0.0
    for string in ended + cut:
        table = torch.stack([model[string[:t]][:, token] for t, token in enumerate(string)], dim=-1)
        total += LIKELIHOODS[method](prior, table.unsqueeze(0)).exp().item()
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", LIKELIHOODS)
def test_gradients_pass_gradcheck(method):
    case = Case(4, passages=4)

    def likelihood(scores, log_probs):
        return LIKELIHOODS[method](log_prior(scores, case.real), log_probs, case.scored)

    inputs = (case.scores.requires_grad_(), case.log_probs.requires_grad_())
    assert not case.real.all()
    assert torch.autograd.gradcheck(likelihood, inputs)


@pytest.mark.parametrize("method", LIKELIHOODS)
def test_gradients_stay_finite_where_probabilities_are_zero(method):
    scores = torch.tensor([[1.0, -inf, 0.0], [-inf, -inf, -inf], [0.5, 0.2, 0.1]], requires_grad=True)
    table = torch.full((3, 3, 2), -1.0)
    table[0, 2, 1] = -inf  # one passage cannot write the second token
    table[2, :, 1] = -inf  # none can
    table.requires_grad_()
    value = LIKELIHOODS[method](log_prior(scores), table)
    assert value.isneginf().tolist() == [False, True, True]
    value[0].backward(retain_graph=True)
    value.masked_fill(value.isneginf(), 0.0).sum().backward()
    for gradient in (scores.grad, table.grad):
        assert gradient.isfinite().all()
    assert scores.grad[0, 0] != 0
    assert scores.grad[1].abs().sum() == 0


def test_prior_is_a_softmax_over_real_passages():
    scores = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, -inf]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    prior = log_prior(scores, mask)
    torch.testing.assert_close(prior.exp().sum(dim=1), torch.ones(2))
    assert prior[:, 2].isneginf().all()
    torch.testing.assert_close(prior[0], prior[1])
    assert (prior[0, 1] - prior[0, 0]).item() == pytest.approx(1.0)


def test_a_row_without_passages_has_no_prior_no_answer_and_no_posterior():
    prior = log_prior(torch.tensor([[5.0, 1.0]]), torch.tensor([[False, False]]))
    table = torch.zeros(1, 2, 3)
    assert prior.isneginf().all()
    for likelihood in LIKELIHOODS.values():
        assert likelihood(prior, table).item() == -inf
    assert marginal_next_token(prior, torch.zeros(1, 2, 4)).isneginf().all()
    assert sequence_posterior(prior, table).tolist() == [[0.0, 0.0]]
    assert token_posteriors(prior, table).abs().sum() == 0


@pytest.mark.parametrize("seed", range(5))
def test_posteriors_equal_bayes_rule(seed):
    case = Case(seed)
    prior = log_prior(case.scores, case.real)
    counted = case.log_probs.masked_fill(~case.scored.unsqueeze(1), 0.0)
    joint = prior.exp() * counted.sum(dim=-1).exp()
    posterior = sequence_posterior(prior, case.log_probs, case.scored)
    torch.testing.assert_close(posterior, joint / joint.sum(dim=1, keepdim=True))
    assert (posterior[~case.real] == 0).all()

    summands = prior.exp().unsqueeze(-1) * case.log_probs.exp()
    by_token = token_posteriors(prior, case.log_probs)
    torch.testing.assert_close(by_token, summands / summands.sum(dim=1, keepdim=True))
    mean, masked = mean_token_posterior(prior, case.log_probs, case.scored)
    for row in range(3):
        chosen = by_token[row][:, case.scored[row]]
        torch.testing.assert_close(mean[row], chosen.mean(dim=1) if chosen.numel() else prior[row].exp())
    assert (masked.sum(dim=1) - case.scored.double()).abs().max() < 1e-12


def test_posterior_of_an_empty_target_is_the_prior():
    prior = log_prior(torch.tensor([[0.0, 1.0, -inf]]))
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    torch.testing.assert_close(mean_token_posterior(prior, torch.zeros(1, 3, 2), nothing)[0], prior.exp())
    torch.testing.assert_close(sequence_posterior(prior, torch.zeros(1, 3, 2), nothing), prior.exp())


def test_marginal_next_token_is_a_distribution():
    make = torch.Generator().manual_seed(5)
    prior = log_prior(torch.tensor([[0.0, 1.0, -inf]]))
    log_probs = torch.randn(1, 3, 7, generator=make).log_softmax(dim=-1)
    expected = (prior.exp().unsqueeze(-1) * log_probs.exp()).sum(dim=1)
    ours = marginal_next_token(prior, log_probs).exp()
    torch.testing.assert_close(ours, expected)
    assert ours.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_padding_is_never_scored_unless_it_is_the_end():
    labels = torch.tensor([[5, 2, 1, IGNORED]])
    assert scored_tokens(labels, pad_token_id=1, eos_token_id=2).tolist() == [[True, True, False, False]]
    assert scored_tokens(labels, pad_token_id=2, eos_token_id=2).tolist() == [[True, True, True, False]]
    assert scored_tokens(labels, pad_token_id=2, eos_token_id=[7, 2]).tolist() == [[True, True, True, False]]
    assert scored_tokens(labels, pad_token_id=None, eos_token_id=None).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_label_log_probs_are_those_of_log_softmax(dtype):
    logits = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64).mul(5).to(dtype)
    labels = torch.randint(6, (2, 3, 4), generator=torch.Generator().manual_seed(7))
    wide = logits if dtype == torch.float64 else logits.float()
    full = wide.log_softmax(dim=-1)
    torch.testing.assert_close(label_log_probs(logits, labels), full.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(mean_log_probs(logits), full.mean(dim=-1))
    labels[0, 0, 0] = IGNORED
    assert not isnan(label_log_probs(logits, labels)[0, 0, 0].item())


@pytest.mark.parametrize("method", LIKELIHOODS)
def test_label_smoothing_of_one_passage_is_that_of_cross_entropy(method):
    """The marginals of more passages are smoothed in tests/models/test_forward.py."""
    logits = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, IGNORED], [4, 3, 2, 0]])
    scored = labels != IGNORED
    prior = torch.zeros(2, 1, dtype=torch.float64)
    nll, uniform = (
        -LIKELIHOODS[method](prior, values, scored)
        for values in (label_log_probs(logits, labels.unsqueeze(1)), mean_log_probs(logits))
    )
    expected = torch.nn.functional.cross_entropy(
        logits[:, 0].transpose(1, 2), labels, label_smoothing=0.1, reduction="none"
    ).sum(dim=1)
    torch.testing.assert_close(smoothed_loss(nll, uniform, 0.1), expected)
