"""The output layer apart from the body: found out rightly, and computed in blocks without a difference."""

import threading

import pytest
import torch
import transformers
from torch import nn

from ragstone.generators import generator_for, head
from ragstone.generators.head import project, score_in_blocks, without_head
from ragstone.marginal import label_log_probs, log_probs, marginal_next_token
from ragstone.testing import tiny_generator

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("padding", ["right", "left", "mixed"])
def test_what_the_output_layer_would_be_given_makes_the_logits(generator, contexts, targets, padding):
    """Twice: the first time it is found out whether it may be taken apart."""
    ids, mask = contexts(padding)
    expected = generator.logits(ids, mask, targets)
    for _ in range(2):
        hidden = generator.label_hidden(ids, mask, targets)
        assert hidden.shape[:2] == targets.shape  # answer positions, not the prompt's
        torch.testing.assert_close(project(generator.model, hidden), expected, **CLOSE)


def test_the_prompt_never_reaches_the_output_layer_of_a_causal_model(contexts, targets):
    generator = generator_for(tiny_generator("llama", vocab_size=60))
    lengths = []
    generator.model.lm_head.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    generator.label_hidden(*contexts(), targets)
    generator.label_hidden(*contexts(), targets)
    assert lengths == [targets.shape[1]] * 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Gemma2", {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 30.0}),
        ("Granite", {"num_key_value_heads": 1, "logits_scaling": 2.0}),
        ("Cohere", {"num_key_value_heads": 1, "logit_scale": 0.25}),
    ],
)
def test_logits_that_are_bounded_or_rescaled_behind_the_output_layer_are_left_to_the_model(
    contexts, targets, name, values
):
    """Even where they are still so small that a bound of 30 does not show."""
    config = getattr(transformers, f"{name}Config")(**SMALL, **values, vocab_size=60, pad_token_id=0)
    generator = generator_for(getattr(transformers, f"{name}ForCausalLM")(config).eval())
    assert generator.logits(*contexts(), targets).abs().max() < 3
    for _ in range(2):
        assert generator.label_hidden(*contexts(), targets) is None


def test_dropout_in_an_adapted_output_layer_does_not_hide_that_it_can_be_taken_apart(contexts, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(tiny_generator("llama", vocab_size=60), config).train()
    assert generator_for(model).label_hidden(*contexts(), targets) is not None


def test_a_thread_without_its_output_layer_leaves_others_theirs(contexts, targets):
    generator, found = generator_for(tiny_generator("bart", vocab_size=60)), []
    expected = generator.logits(*contexts(), targets)
    with without_head(generator.model) as seen:
        other = threading.Thread(target=lambda: found.append(generator.logits(*contexts(), targets)))
        other.start()
        other.join()
        assert not seen
        assert generator.logits(*contexts(), targets).shape == (5, 0, 60)
    assert len(seen) == 1
    torch.testing.assert_close(found[0], expected)


class Model(nn.Module):
    """Nothing but an output layer."""

    def __init__(self, layer, extra=False):
        super().__init__()
        self.head = layer
        self.register_buffer("final_logits_bias", torch.randn(1, VOCABULARY).double() if extra else None)

    def get_output_embeddings(self):
        return self.head


class Adapted(nn.Linear):
    """A linear layer with more to it, as adapters and quantised layers are."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.sin() @ self.weight.t()


POSITIONS, PASSAGES, WIDTH, VOCABULARY = 7, 3, 4, 11
LAYERS = {
    "linear": lambda: Model(nn.Linear(WIDTH, VOCABULARY, bias=False)),
    "with bias": lambda: Model(nn.Linear(WIDTH, VOCABULARY)),
    "with two": lambda: Model(nn.Linear(WIDTH, VOCABULARY), extra=True),
    "with a buffer": lambda: Model(nn.Linear(WIDTH, VOCABULARY, bias=False), extra=True),
    "adapted": lambda: Model(Adapted(WIDTH, VOCABULARY)),
}


def score(logits, labels, prior):
    """A passage's own log-probability, and the mean of the marginal: what RAG-Token with smoothing needs."""
    found = label_log_probs(logits, labels.unsqueeze(1).expand(logits.shape[:2]))
    return found, marginal_next_token(prior, log_probs(logits)).mean(dim=-1)


@pytest.fixture(params=[1, 2, 100], ids=lambda positions: f"blocks of {positions}")
def blocks(request, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_PER_BLOCK", request.param * PASSAGES * VOCABULARY)
    return request.param


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def values(positions=POSITIONS):
    make = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCABULARY, (positions,), generator=make)
    hidden = torch.randn(positions, PASSAGES, WIDTH, generator=make, dtype=torch.double, requires_grad=True)
    prior = torch.randn(positions, PASSAGES, generator=make, dtype=torch.double).log_softmax(dim=-1).requires_grad_()
    return hidden, labels, prior


def test_scores_in_blocks_have_the_gradients_of_finite_differences(layer, blocks):
    hidden, labels, prior = values()
    weights = tuple(layer.parameters())

    def run(hidden, prior, *_):
        return score_in_blocks(layer, score, hidden, labels, prior)

    assert torch.autograd.gradcheck(run, (hidden, prior, *weights))


def test_scores_in_blocks_are_those_of_all_logits_at_once(layer, blocks):
    hidden, labels, prior = values()
    ours = score_in_blocks(layer, score, hidden, labels, prior)
    for found, expected in zip(ours, score(project(layer, hidden), labels, prior), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert all(map(torch.equal, score_in_blocks(layer, score, hidden, labels, prior), ours))


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(layer, blocks):
    def gradient(frozen):
        layer.requires_grad_(not frozen)
        hidden, labels, prior = values()
        sum(part.sum() for part in score_in_blocks(layer, score, hidden, labels, prior.detach())).backward()
        return hidden.grad

    torch.testing.assert_close(gradient(True), gradient(False))
    layer.zero_grad()
    gradient(True)
    assert all(weight.grad is None for weight in layer.parameters())


def test_no_positions_are_certain_and_leave_every_weight_a_gradient_of_zero(layer, blocks):
    """As distributed training wants it: a batch may hold no label that counts."""
    found, mean = score_in_blocks(layer, score, *values(0))
    assert (found.shape, mean.shape) == ((0, PASSAGES), (0,))
    (found.sum() + mean.sum()).backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in layer.parameters())


def test_under_autocast_a_weight_keeps_its_gradient_for_what_comes_after():
    """A cast made without gradient would be remembered, and the gradient of the second use lost."""
    torch.manual_seed(0)
    model, (hidden, labels, prior) = Model(nn.Linear(WIDTH, VOCABULARY)), values()
    hidden, prior = hidden.detach().float().requires_grad_(), prior.detach().float()
    exact = torch.autograd.grad(score(project(model, hidden), labels, prior)[0].sum(), model.head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        first = score_in_blocks(model, score, hidden, labels, prior)[0]
        second = score(project(model, hidden), labels, prior)[0]
    for found in (first, second):
        gradient = torch.autograd.grad(found.sum(), model.head.weight, retain_graph=True)[0]
        assert found.dtype == gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 0.02 * exact.norm()
