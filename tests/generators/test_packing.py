"""Packed weights: the same results, and a model that is afterwards what it was before."""

import threading

import pytest
import torch

from ragstone.generators import packing
from ragstone.generators.attention import ATTENTION
from ragstone.generators.packing import accelerated, is_accelerated
from ragstone.testing import tiny_generator


def logits(model):
    ids = torch.arange(3, 11).view(1, -1)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture
def model():
    return tiny_generator("llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_weights_compute_the_same(model, dtype):
    model.to(dtype)
    expected = logits(model)
    with accelerated(model):
        assert model.config._attn_implementation == ATTENTION
        assert packing._packing_works(dtype) == any("forward" in vars(m) for m in model.modules())
        found = logits(model)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.cosine_similarity(found.float(), expected.float(), dim=-1).min() > 0.999


@torch.no_grad()
def test_outside_the_model_is_as_it_was(model):
    before = logits(model)
    with pytest.raises(ZeroDivisionError), accelerated(model), accelerated(model):
        raise ZeroDivisionError
    assert not is_accelerated(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("data", [False, True], ids=["in place", "through data"])
@torch.no_grad()
def test_changed_weights_are_packed_anew(model, data):
    with accelerated(model):
        logits(model)
    for weight in model.parameters():
        (weight.data if data else weight).mul_(1.5)
    expected = logits(model)
    with accelerated(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_training_and_gradients_are_left_alone(model):
    with accelerated(model):
        assert not is_accelerated(model)
    with torch.no_grad():
        model.train()
        with accelerated(model):
            assert not is_accelerated(model)


def test_a_thread_that_trains_meanwhile_gets_its_gradient(model):
    gradients = []

    def train():
        logits(model).square().mean().backward()
        gradients.append(model.lm_head.weight.grad.abs().sum())

    with torch.no_grad(), accelerated(model):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert gradients[0] > 0
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())
