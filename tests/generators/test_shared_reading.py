"""A beginning that several contexts share is read once while learning too: same values, same gradients."""

import pytest
import torch

from ragstone.generators import attention, generator_for, lengths

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # Llama norms its states in float32
FAMILIES = ["llama", "gpt2", "opt"]


def rows(heads, tails):
    """Contexts of (which beginning, which tail), padded on the right, and the length of each beginning."""
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in (7, 4, 9)]
    ends = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in (3, 5, 1, 2)]
    whole = [texts[h] + ends[t] for h, t in zip(heads, tails, strict=True)]
    ids = torch.zeros(len(whole), 15, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(whole):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return ids, mask, torch.tensor([len(texts[h]) for h in heads])


HEADS, TAILS = [0, 1, 0, 2, 0, 1], [0, 1, 2, 3, 1, 0]  # a beginning with three rows, one with two, one alone


@pytest.fixture
def labels():
    """Of six rows (6, 4), some of which end early."""
    labels = torch.randint(5, 60, (6, 4), generator=torch.Generator().manual_seed(1))
    labels[1, 2:] = -100
    return labels


@pytest.fixture(params=[1, 10**6], ids=["part by part", "together"])
def tokens_at_a_time(request, monkeypatch):
    monkeypatch.setitem(lengths._TOKENS_AT_A_TIME, "cpu", request.param)


@pytest.fixture(params=[False, True], ids=["keys shared", "keys copied"])
def copies(request, monkeypatch):
    monkeypatch.setattr(attention, "_copying_pays", lambda *_: request.param)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_are_those_of_rows_read_alone(build, kind, training, labels, tokens_at_a_time, copies):
    model = build(kind).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train(training)
    generator = generator_for(model)
    ids, mask, ends = rows(HEADS, TAILS)

    def gradients(hidden):
        counted = hidden[labels >= 0]
        model.zero_grad()
        (counted * torch.linspace(-1, 1, counted.numel(), dtype=torch.double).view_as(counted)).sum().backward()
        return counted.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, slopes = gradients(generator.label_hidden(ids, mask, labels))
    shared = generator.shared_label_hidden(ids, mask, labels, ends)
    assert model.training is training
    found, shared_slopes = gradients(shared)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert shared_slopes.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(shared_slopes[name], slope, **CLOSE)


def test_each_beginning_is_read_once(build, labels):
    model, seen = build("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum())
        ),
        with_kwargs=True,
    )
    generator = generator_for(model)
    ids, mask, ends = rows(HEADS, TAILS)
    generator.shared_label_hidden(ids, mask, labels, ends)  # tried for the first time
    seen.clear()
    assert generator.shared_label_hidden(ids, mask, labels, ends) is not None
    tails = int(mask.sum() - ends.sum()) + labels[:, :-1].numel()
    assert sorted(seen) == sorted([7 + 4 + 9, tails])


@pytest.mark.parametrize("kind", ["mistral", "bloom", "bart"])
def test_models_that_cannot_share_say_so(build, kind, labels):
    ids, mask, ends = rows(HEADS, TAILS)
    assert generator_for(build(kind)).shared_label_hidden(ids, mask, labels, ends) is None


def test_nothing_is_taken_apart_where_little_is_shared_or_nothing_follows(build, labels):
    generator = generator_for(build("llama"))
    ids, mask, ends = rows([0, 0, 1, 2, 0, 1], TAILS)
    assert generator.shared_label_hidden(ids, mask, labels, ends) is not None
    ids, mask, ends = rows([0, 1, 2], [0, 1, 2])
    assert generator.shared_label_hidden(ids, mask, labels[:3], ends) is None
    ids, mask, ends = rows(HEADS, TAILS)
    ends[0] += 3  # its tail too
    assert generator.shared_label_hidden(ids, mask, labels, ends) is None
    generator.model.gradient_checkpointing_enable()
    ids, mask, ends = rows(HEADS, TAILS)
    assert generator.shared_label_hidden(ids, mask, labels, ends) is None


def test_dropout_of_attention_weights_is_kept(build, labels):
    """GPT-2's is 0.1: two passes differ in training mode and are equal without it."""
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and "attn" not in type(module).__name__:
            module.p = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    ids, mask, ends = rows(HEADS, TAILS)
    generator = generator_for(model)
    same = [generator.shared_label_hidden(ids, mask, labels, ends) for _ in range(2)]
    torch.testing.assert_close(*same)
    model.train()
    one, other = (generator.shared_label_hidden(ids, mask, labels, ends) for _ in range(2))
    assert not torch.allclose(one, other)
