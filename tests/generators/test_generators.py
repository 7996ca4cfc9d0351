"""Encoding once, scoring and stepping equal one plain pass of the model, whatever the family, padding and batch."""

import copy

import pytest
import torch

from ragstone.errors import InputError, ModelError
from ragstone.generators import CausalGenerator, Seq2SeqGenerator, generator_for, trim_padding
from ragstone.testing import tiny_generator

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PADDINGS = ("right", "left", "mixed")


def sequences_of(generator, targets):
    """Targets (R, T) as ``start`` and ``target_logits`` want them: behind a start token, if there is one."""
    if generator.start_token_id is None:
        return targets
    return torch.cat([targets.new_full((len(targets), 1), generator.start_token_id), targets], dim=1)


@torch.no_grad()
def plain(generator, ids, mask, labels):
    """The reference: each row alone, without padding and without any cache, through the raw model -> (N, T, V)."""
    rows = []
    for n in range(len(ids)):
        context, target = ids[n : n + 1, mask[n].bool()], labels[n : n + 1]
        if generator.start_token_id is None:
            out = generator.model(input_ids=torch.cat([context, target], dim=1), use_cache=False).logits
            rows.append(out[:, context.shape[1] - 1 : -1])
        else:
            inputs = sequences_of(generator, target)[:, :-1]
            rows.append(generator.model(input_ids=context, decoder_input_ids=inputs, use_cache=False).logits)
    return torch.cat(rows)


@torch.no_grad()
def stepwise(generator, ids, mask, labels):
    """The same logits one token at a time from encoded contexts."""
    start = sequences_of(generator, labels)[:, : sequences_of(generator, labels).shape[1] - labels.shape[1]]
    logits, state = generator.start(generator.encode(ids, mask), start)
    out = [logits]
    for t in range(labels.shape[1] - 1):
        out.append(generator.step(state, labels[:, t : t + 1]))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_one_pass_equals_the_model_alone(generator, contexts, targets, padding):
    ids, mask = contexts(padding)
    ours = generator.logits(ids, mask, targets)
    torch.testing.assert_close(ours, plain(generator, ids, mask, targets), **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_scoring_encoded_contexts_equals_the_model_alone(generator, contexts, targets, padding):
    ids, mask = contexts(padding)
    rows = torch.arange(5)
    ours = generator.target_logits(generator.encode(ids, mask), rows, sequences_of(generator, targets))
    torch.testing.assert_close(ours, plain(generator, ids, mask, targets), **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_stepping_equals_the_model_alone(generator, contexts, targets, padding):
    ids, mask = contexts(padding)
    torch.testing.assert_close(stepwise(generator, ids, mask, targets), plain(generator, ids, mask, targets), **CLOSE)


@torch.no_grad()
def test_any_context_can_be_scored_with_any_target_in_any_order(generator, contexts, targets):
    ids, mask = contexts()
    rows = torch.tensor([3, 0, 0, 4, 1, 3])
    chosen = targets[torch.tensor([1, 2, 0, 4, 4, 3])]
    ours = generator.target_logits(generator.encode(ids, mask), rows, sequences_of(generator, chosen))
    torch.testing.assert_close(ours, plain(generator, ids[rows], mask[rows], chosen), **CLOSE)


@torch.no_grad()
def test_selected_contexts_are_contexts_of_their_own(generator, contexts, targets):
    ids, mask = contexts()
    rows = torch.tensor([4, 1, 1])
    chosen = generator.encode(ids, mask).select(rows)
    assert chosen.rows == 3
    ours = generator.target_logits(chosen, torch.arange(3), sequences_of(generator, targets[:3]))
    torch.testing.assert_close(ours, plain(generator, ids[rows], mask[rows], targets[:3]), **CLOSE)


@torch.no_grad()
def test_a_state_can_be_selected_in_the_middle(generator, contexts, targets):
    ids, mask = contexts()
    _, state = generator.start(generator.encode(ids, mask), sequences_of(generator, targets)[:, :-6])
    generator.step(state, targets[:, :1])
    rows = torch.tensor([2, 2, 0])
    part = state.select(rows)
    ours = generator.step(part, targets[rows, 1:2])
    torch.testing.assert_close(ours, plain(generator, ids[rows], mask[rows], targets[rows])[:, 2], **CLOSE)
    # The state it was taken from goes on undisturbed.
    rest = generator.step(state, targets[:, 1:2])
    torch.testing.assert_close(rest, plain(generator, ids, mask, targets)[:, 2], **CLOSE)


@torch.no_grad()
def test_beams_of_one_context_can_be_reordered(generator, contexts, targets):
    """Two beams of each of two contexts; their pasts change places, their contexts stay."""
    ids, mask = (x[[0, 0, 1, 1]] for x in contexts())
    past = targets[:4, :3]
    _, state = generator.start(generator.encode(ids, mask), sequences_of(generator, past)[:, :-3])
    for t in range(2):
        generator.step(state, past[:, t : t + 1])
    order = torch.tensor([1, 0, 2, 2])
    state.reorder(order)
    ours = generator.step(state, past[order, 2:3])
    following = torch.cat([past[order], past[:, :1]], dim=1)
    torch.testing.assert_close(ours, plain(generator, ids, mask, following)[:, 3], **CLOSE)


@torch.no_grad()
def test_a_context_is_read_once_however_often_it_is_used(generator, contexts, targets):
    """The encoder (of a causal model: the model itself, on the prompt) runs a single time."""
    read = []
    reader = generator.model.get_encoder() if generator.start_token_id is not None else generator.model
    ids, mask = contexts()

    def hook(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == ids.shape[1]:
            read.append(kwargs["input_ids"])

    handle = reader.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        encoded = generator.encode(ids, mask)
        for _ in range(2):
            generator.target_logits(encoded, torch.arange(5), sequences_of(generator, targets))
            _, state = generator.start(encoded, sequences_of(generator, targets)[:, :-6])
            generator.step(state, targets[:, :1])
    finally:
        handle.remove()
    assert len(read) == 1


@torch.no_grad()
def test_nothing_is_written_into_encoded_contexts(generator, contexts, targets):
    ids, mask = contexts()
    encoded = generator.encode(ids, mask)
    before = copy.deepcopy(encoded)
    generator.target_logits(encoded, torch.tensor([0, 0, 3]), sequences_of(generator, targets[:3]))
    _, state = generator.start(encoded, sequences_of(generator, targets)[:, :-6])
    for t in range(3):
        generator.step(state, targets[:, t : t + 1])
    state.reorder(torch.tensor([0, 0, 0, 0, 0]))
    state.select(torch.tensor([1, 2]))
    for name in ("attention_mask", "hidden", "next_logits"):
        after = getattr(encoded, name)
        assert after is None or torch.equal(after, getattr(before, name)), name
    for now, then in zip(layers_of(encoded), layers_of(before), strict=True):
        assert torch.equal(now.keys, then.keys)
        assert torch.equal(now.values, then.values)


def layers_of(encoded):
    """All layers of keys and values that are kept of contexts."""
    cache = encoded.cache
    caches = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in caches if part is not None for layer in part.layers] or cache.layers


@pytest.mark.parametrize("length", [0, 1])
@torch.no_grad()
def test_targets_of_no_and_of_one_token(generator, contexts, targets, length):
    ids, mask = contexts()
    labels = targets[:, :length]
    expected = plain(generator, ids, mask, targets)[:, :length]
    torch.testing.assert_close(generator.logits(ids, mask, labels), expected, **CLOSE)
    encoded = generator.encode(ids, mask)
    ours = generator.target_logits(encoded, torch.arange(5), sequences_of(generator, labels))
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_ignored_labels_at_the_end_change_nothing_before_them(generator, contexts, targets):
    ids, mask = contexts()
    labels = targets.clone()
    labels[:, 4:] = -100
    with torch.no_grad():
        ours = generator.logits(ids, mask, labels)[:, :5]
    torch.testing.assert_close(ours, plain(generator, ids, mask, targets)[:, :5], **CLOSE)


def test_gradient_reaches_the_weights(generator, contexts, targets):
    ids, mask = contexts()
    generator.logits(ids, mask, targets).square().mean().backward()
    gradient = generator.model.get_input_embeddings().weight.grad
    generator.model.zero_grad()
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_the_adapter_fits_the_model(generator):
    kind = Seq2SeqGenerator if generator.model.config.is_encoder_decoder else CausalGenerator
    assert isinstance(generator_for(generator.model), kind)


def test_special_tokens_come_from_the_generation_config_first():
    model = tiny_generator("bart")
    generator = generator_for(model)
    assert (generator.pad_token_id, generator.start_token_id, tuple(generator.eos_token_ids)) == (1, 2, (2,))
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.decoder_start_token_id = 5
    assert (generator.start_token_id, tuple(generator.eos_token_ids)) == (5, (2, 7))
    assert generator.labels_of(torch.tensor([[5, 8, 9]])).tolist() == [[8, 9]]


def test_fill_token_without_padding_is_the_end_and_without_end_zero():
    model = tiny_generator("llama", pad_token_id=None, eos_token_id=3)
    assert generator_for(model).fill_token_id == 3
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert generator_for(model).fill_token_id == 0


def test_a_seq2seq_model_without_start_token_says_what_to_set():
    model = tiny_generator("bart", decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        _ = generator_for(model).start_token_id


def test_a_causal_generator_takes_no_decoder_inputs(contexts, targets):
    generator = generator_for(tiny_generator("llama", vocab_size=60))
    with pytest.raises(InputError, match="decoder_input_ids"):
        generator.logits(*contexts(), targets, targets)


def test_a_recurrent_model_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        generator_for(model)


def test_trimming_drops_columns_that_are_padding_in_every_row():
    ids = torch.tensor([[5, 1, 6, 1], [7, 1, 1, 1]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    trimmed = trim_padding(ids, mask)
    assert [x.tolist() for x in trimmed] == [[[5, 6], [7, 1]], [[1, 1], [1, 0]]]
