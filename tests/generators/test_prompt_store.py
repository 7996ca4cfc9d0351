"""Beginnings of prompts that were read before: never read again, never anything but what reading them would give."""

import copy
import pickle

import pytest
import torch

from ragstone.errors import InputError
from ragstone.generators import CausalGenerator, PromptStore, lengths
from ragstone.testing import ToyRetriever, tiny_generator, tiny_rag

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = torch.tensor([7, 5, 2, 1, 4])


@pytest.fixture
def model():
    return tiny_generator("llama", vocab_size=60)


def reads(model):
    """The number of tokens of every row of every pass from now on."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("tokens", [8, 1024], ids=["apart", "together"])
@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_kept_beginnings_change_nothing(causal, contexts, targets, padding, tokens, monkeypatch):
    monkeypatch.setattr(lengths, "_TOKENS_AT_A_TIME", {"cpu": tokens})
    ids, mask = contexts(padding)
    plain, store = CausalGenerator(causal.model), PromptStore()
    kept = CausalGenerator(causal.model, store=store)
    expected = plain.target_logits(plain.encode(ids, mask), torch.arange(5), targets)
    for _ in range(2):  # cold, then from the store
        encoded = kept.encode(ids, mask, LENGTHS)
        ours = kept.target_logits(encoded, torch.arange(5), targets)
        torch.testing.assert_close(ours, expected, **CLOSE)
        _, state = kept.start(encoded, targets[:, :0], 2)
        step = kept.step(state, targets[:, :1].repeat_interleave(2, dim=0))
        torch.testing.assert_close(step, expected[:, 1].repeat_interleave(2, dim=0), **CLOSE)
    if not any(layer for layer in store._kept):
        assert causal.model.config.model_type in ("bloom", "mistral")  # no shared keys, and a sliding window


@torch.no_grad()
def test_a_beginning_is_read_once_for_all_questions(model, contexts):
    ids, mask = contexts("right")
    generator = CausalGenerator(model, store=PromptStore())
    generator.encode(ids, mask, LENGTHS)
    seen = reads(model)
    other = ids.clone()
    other[mask.cumsum(dim=1) > LENGTHS[:, None]] = 9  # another question about the same passages
    generator.encode(other, mask, LENGTHS)
    assert seen == [(5, int((mask.sum(dim=1) - LENGTHS).max()))]
    assert (generator.store.hits, generator.store.misses) == (5, 5)


CHANGES = {
    "in place": lambda weight: weight.add_(0.1),
    "through data": lambda weight: weight.data.add_(0.1),
    "an average": lambda weight: weight.data.copy_(weight.detach().clone().mul_(0.9)),
    "other data": lambda weight: setattr(weight, "data", weight.detach() + 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_other_weights_are_other_beginnings(model, contexts, change):
    ids, mask = contexts("right")
    generator = CausalGenerator(model, store=PromptStore())
    generator.encode(ids, mask, LENGTHS)
    for weight in model.parameters():
        CHANGES[change](weight)
    ours, expected = generator.encode(ids, mask, LENGTHS), CausalGenerator(model, fast=False).encode(ids, mask)
    torch.testing.assert_close(ours.next_logits, expected.next_logits, **CLOSE)


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "disk"])
@torch.no_grad()
def test_other_adapters_are_other_beginnings(model, contexts, tmp_path, folder):
    peft = pytest.importorskip("peft")
    ids, mask = contexts("right")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(settings, "one")
    model.add_adapter(settings, "two")
    generator = CausalGenerator(model, store=PromptStore(folder=tmp_path if folder else None))
    q_proj = model.model.layers[0].self_attn.q_proj
    steps = (
        lambda: model.set_adapter("one"),
        lambda: model.set_adapter("two"),
        model.disable_adapters,
        model.enable_adapters,
        lambda: q_proj.scale_layer(3.0),
        lambda: q_proj.merge(),
    )
    for step in steps:
        step()
        ours, expected = generator.encode(ids, mask, LENGTHS), CausalGenerator(model, fast=False).encode(ids, mask)
        torch.testing.assert_close(ours.next_logits, expected.next_logits, **CLOSE)
    hits = generator.store.hits
    generator.encode(ids, mask, LENGTHS)
    assert generator.store.hits == hits + 5


@torch.inference_mode()
def test_weights_made_for_inference_alone_have_beginnings_too(contexts):
    ids, mask = contexts("right")
    model = tiny_generator("llama", vocab_size=60)
    generator = CausalGenerator(model, store=PromptStore())
    for _ in range(2):
        ours = generator.encode(ids, mask, LENGTHS)
    assert generator.store.hits == 5
    torch.testing.assert_close(ours.next_logits, CausalGenerator(model).encode(ids, mask).next_logits, **CLOSE)


def test_the_store_stays_within_its_bytes_and_drops_the_oldest():
    store = PromptStore(max_bytes=3000)
    for name in "abc":
        store.put(name, torch.zeros(250))
    assert store.get("a") is not None
    store.put("d", torch.zeros(250))
    assert [name for name in "abcd" if store.get(name) is not None] == ["a", "c", "d"]
    assert store.bytes == 3000
    store.put("huge", torch.zeros(5000))
    assert store.get("huge") is None
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert (len(other), other.max_bytes, other.folder) == (0, 3000, None)
    store.clear()
    assert (store.bytes, len(store)) == (0, 0)
    with pytest.raises(InputError, match="-1"):
        PromptStore(-1)


@torch.no_grad()
def test_a_later_process_finds_beginnings_on_disk_and_passes_over_damaged_files(model, contexts, tmp_path):
    ids, mask = contexts("right")
    CausalGenerator(model, store=PromptStore(folder=tmp_path)).encode(ids, mask, LENGTHS)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 5
    files[0].write_bytes(files[0].read_bytes()[:20])
    files[1].write_bytes(b"")
    later = CausalGenerator(model, store=PromptStore(folder=tmp_path))
    ours = later.encode(ids, mask, LENGTHS)
    assert (later.store.hits, later.store.misses) == (3, 2)
    torch.testing.assert_close(ours.next_logits, CausalGenerator(model).encode(ids, mask).next_logits, **CLOSE)


def test_files_stay_within_the_bytes_too(tmp_path):
    store = PromptStore(max_bytes=3000, folder=tmp_path)
    for n in range(9):
        store.put(f"{n}", torch.zeros(250))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3000


@pytest.mark.parametrize("method", ["token", "sequence"])
def test_a_model_that_retrieves_keeps_what_it_read(method):
    model, tokenizer = tiny_rag(method, "llama")
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    questions = ["who wrote hamlet?", "how high is everest?"]
    first = model.generate(questions=questions, n_docs=3, max_new_tokens=4, return_dict_in_generate=True)
    assert model.rag.prompt_store.misses > 0
    before = model.rag.prompt_store.misses
    second = model.generate(questions=questions, n_docs=3, max_new_tokens=4, return_dict_in_generate=True)
    assert model.rag.prompt_store.misses == before
    model.rag.prompt_store = None
    without = model.generate(questions=questions, n_docs=3, max_new_tokens=4, return_dict_in_generate=True)
    for out in (first, second):
        assert torch.equal(out.sequences, without.sequences)
        torch.testing.assert_close(out.log_probs, without.log_probs, rtol=1e-4, atol=1e-4)
