"""A training step makes logits of the labels that count, in blocks that are not kept, and loses nothing by it."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ragstone.generators import head, lengths
from ragstone.marginal import IGNORED, label_log_probs, log_probs, marginal_next_token, mean_log_probs, scored_tokens
from ragstone.models import targets
from ragstone.models.targets import target_logits

VOCABULARY, BATCH, PASSAGES = 40, 3, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of two positions, and contexts read a few at a time."""
    monkeypatch.setattr(head, "LOGITS_PER_BLOCK", 2 * PASSAGES * VOCABULARY)
    monkeypatch.setattr(lengths, "_TOKENS_AT_A_TIME", {"cpu": 16})


@pytest.fixture(params=[0.0, 0.1], ids=["", "smoothed"])
def smoothing(request):
    return request.param


def random_labels(seed, pad, width=6):
    """(B, T): ignored labels anywhere, padding behind the end, a row that is ignored from its second label on."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCABULARY, (BATCH, width), generator=make)
    labels = labels.masked_fill(torch.rand(BATCH, width, generator=make) < 0.2, IGNORED)
    labels[1, 3:] = pad
    labels[2, 1:] = IGNORED
    return labels


def loss_of_all_logits(model, inputs, labels, smoothing):
    """The definition, out of logits (B, K, T, V)."""
    rag = model.rag.prepare(**inputs)
    adapter, prior = model.rag.adapter(), rag.log_prior
    logits = target_logits(adapter, rag, labels)
    counts = scored_tokens(labels, pad_token_id=adapter.pad_token_id, eos_token_id=list(adapter.eos_token_ids))
    ours = label_log_probs(logits, labels.unsqueeze(1).expand(logits.shape[:-1]))
    if model.method == "token":
        flat = log_probs(logits).flatten(2)
        marginal = marginal_next_token(prior, flat).view(BATCH, -1, VOCABULARY)
        nll = -(prior.unsqueeze(-1) + ours).logsumexp(dim=1).masked_fill(~counts, 0.0).sum(dim=-1)
        uniform = -marginal.mean(dim=-1).masked_fill(~counts, 0.0).sum(dim=-1)
    else:
        mask = counts.unsqueeze(1)
        nll = -(prior + ours.masked_fill(~mask, 0.0).sum(dim=-1)).logsumexp(dim=1)
        uniform = -(prior + mean_log_probs(logits).masked_fill(~mask, 0.0).sum(dim=-1)).logsumexp(dim=1)
    return ((1 - smoothing) * nll + smoothing * uniform).mean()


def gradients(model, loss):
    weights = [p for p in model.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]


def compare(model, inputs, labels, smoothing, loss_rtol=1e-6, gradient_rtol=1e-5):
    """Loss and gradients, relative to their norm, of the model and of all logits."""
    model.config.label_smoothing = smoothing
    given = {**inputs, "doc_scores": inputs["doc_scores"].clone().requires_grad_()}
    ours, expected = model(**given, labels=labels).loss, loss_of_all_logits(model, given, labels, smoothing)
    torch.testing.assert_close(ours, expected, rtol=loss_rtol, atol=1e-6)
    (slope,) = torch.autograd.grad(ours, given["doc_scores"], retain_graph=True)
    (steep,) = torch.autograd.grad(expected, given["doc_scores"], retain_graph=True)
    pairs = [(slope, steep), *zip(gradients(model, ours), gradients(model, expected), strict=True)]
    assert len(pairs) > 3
    whole = torch.stack([g.norm() for _, g in pairs]).norm()
    for found, gradient in pairs:
        assert (found - gradient).norm() <= gradient_rtol * (gradient.norm() + 0.1 * whole)


@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradients_are_those_of_all_logits(case, method, kind, smoothing, seed):
    one = case(method, kind, seed=seed, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES, empty=seed == 1)
    compare(one.model, one.inputs, random_labels(seed, one.pad), smoothing)


def test_given_logits_are_scored_the_same(case, method, kind, smoothing):
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    one.model.config.label_smoothing = smoothing
    labels = random_labels(0, one.pad)
    ours, whole = (one.model(**one.inputs, labels=labels, output_logits=want) for want in (False, True))
    assert ours.logits is None
    for name in ("loss", "nll", "token_log_probs"):
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-5, atol=1e-5)


def test_an_output_layer_that_cannot_be_taken_apart_is_left_to_the_model(case, method, smoothing):
    """Its logits are scaled behind it, which is found out and heeded."""
    one = case(method, "llama", vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    plain = one.model.generator.forward

    def scaled(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    scaled.__wrapped__ = plain  # the signature
    before = one.model(**one.inputs, labels=random_labels(0, one.pad)).loss
    one.model.generator.forward = scaled
    head._separable.pop(one.model.generator)
    compare(one.model, one.inputs, random_labels(0, one.pad), smoothing)
    assert (one.model(**one.inputs, labels=random_labels(0, one.pad)).loss - before).abs() > 0.1


class Sizes(TorchDispatchMode):
    """The largest tensor over the vocabulary that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, torch.Tensor) and part.dim() > 2 and part.shape[-1] == VOCABULARY:
                self.largest = max(self.largest, part.numel())
        return out


def test_no_logits_are_kept_and_no_more_than_a_block_of_them_exists(case, method, kind, smoothing):
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    one.model.config.label_smoothing = smoothing
    labels, kept = torch.full((BATCH, 6), 5), []

    def step(**options):
        """The size of the largest logits of a step, and how often its forward pass keeps some for the backward pass."""
        kept.clear()
        with Sizes() as sizes:
            with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
                out = one.model(**one.inputs, labels=labels, **options)
            out.loss.backward()
        return sizes.largest, sum(len(shape) > 2 and shape[-1] == VOCABULARY for shape in kept)

    step()  # the first finds out whether the output layer can be taken apart
    assert step() == (head.LOGITS_PER_BLOCK, 0)
    largest, saved = step(output_logits=True)  # the check can fail
    assert largest == BATCH * PASSAGES * 6 * VOCABULARY
    assert saved > 0


def test_only_labels_that_count_are_projected(case, method, kind, monkeypatch):
    """Nor do columns behind the last of them reach the decoder."""
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    labels = torch.full((BATCH, 6), IGNORED)
    labels[0, :2], labels[1, 1:3] = 5, 6
    expected = one.model(**one.inputs, labels=labels[:, :3]).nll
    rows, widths = [], []
    monkeypatch.setattr(
        targets, "label_log_probs", lambda logits, labels: rows.append(len(logits)) or label_log_probs(logits, labels)
    )
    decoder = one.model.generator.get_decoder() if one.model.config.is_encoder_decoder else one.model.generator
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = one.model(**one.inputs, labels=labels)
    torch.testing.assert_close(out.nll, expected)
    assert out.token_log_probs.shape == (BATCH, PASSAGES, 6)
    assert sum(rows) == 4
    assert max(widths) == (3 if one.model.config.is_encoder_decoder else 7 + 2)


def test_questions_are_read_no_further_than_the_longest(case, method):
    one = case(method)
    ids = torch.tensor([[2, 7, 8, 3, 0, 0, 0], [2, 7, 3, 0, 0, 0, 0]])
    widths = []
    one.model.question_encoder.embeddings.register_forward_hook(lambda m, args, out: widths.append(out.shape[:2]))
    short = one.model.rag.encode_questions(ids[:, :4])
    torch.testing.assert_close(one.model.rag.encode_questions(ids), short)
    torch.testing.assert_close(one.model.rag.encode_questions(ids, (ids != 0).long()), short)
    assert widths == [(2, 4)] * 3


def test_gradient_checkpointing_changes_nothing(case, method, kind, smoothing):
    names = {"bart": ["dropout"], "t5": ["dropout_rate"], "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"]}
    still = dict.fromkeys(names.get(kind, []), 0.0)
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES, **still)
    one.model.train()
    one.model.generator.gradient_checkpointing_enable()
    compare(one.model, one.inputs, random_labels(0, one.pad), smoothing)


def test_autocast_costs_precision_alone(case, method, kind, smoothing):
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    with torch.autocast("cpu", torch.bfloat16):
        compare(one.model, one.inputs, random_labels(0, one.pad), smoothing, loss_rtol=1e-2, gradient_rtol=0.05)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapted", ["inside", "output layer", "output layer saved whole"])
@pytest.mark.parametrize("kind", ["bart", "llama", "gpt2"])
def test_a_generator_with_adapters_is_trained_alike(case, method, smoothing, kind, adapted):
    peft = pytest.importorskip("peft")
    untied = {} if kind == "bart" else {"tie_word_embeddings": False}  # bart is so already
    one = case(method, kind, vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES, **untied)
    modules = {"gpt2": ["c_attn"]}.get(kind, ["q_proj", "v_proj"]) + (["lm_head"] if adapted == "output layer" else [])
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if kind == "bart" else "CAUSAL_LM",
        target_modules=modules,
        modules_to_save=["lm_head"] if adapted == "output layer saved whole" else None,
        init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2",
    )
    plain = one.model(**one.inputs, labels=random_labels(0, one.pad)).loss
    wrapped = copy.deepcopy(one.model)
    wrapped.rag._modules["generator"] = peft.get_peft_model(wrapped.generator, config).eval()
    assert (wrapped(**one.inputs, labels=random_labels(0, one.pad)).loss - plain).abs() > 1e-3
    compare(wrapped, one.inputs, random_labels(0, one.pad), smoothing)
    trained = [n for n, p in wrapped.generator.named_parameters() if p.requires_grad]
    assert any("lora" in name for name in trained)
    adapter = wrapped.rag.adapter()
    rag = wrapped.rag.prepare(**one.inputs)
    labels = torch.full((BATCH * PASSAGES, 3), 5)
    hidden = adapter.label_hidden(rag.context_input_ids, rag.context_attention_mask, labels)
    assert hidden.shape[:2] == labels.shape


def test_distributed_training_gets_the_same_gradients(case, method, smoothing, tmp_path):
    """One process, whose reducer wants every weight's gradient exactly once, step after step; one batch has no label."""
    from torch import distributed

    one = case(method, "bart", vocabulary=VOCABULARY, batch=BATCH, passages=PASSAGES)
    one.model.config.label_smoothing = smoothing
    one.model.question_encoder.requires_grad_(False)  # contexts are given
    labels = random_labels(0, one.pad)
    one.model(**one.inputs, labels=labels).loss.backward()
    expected = [p.grad.clone() for p in one.model.parameters() if p.grad is not None]
    for p in one.model.parameters():
        p.requires_grad_(p.grad is not None)  # untied BART has embeddings that nothing uses
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(one.model)
        for given in (torch.full_like(labels, IGNORED), labels, labels):
            model.zero_grad()
            model(**one.inputs, labels=given).loss.backward()
    finally:
        distributed.destroy_process_group()
    found = [p.grad for p in one.model.parameters() if p.requires_grad]
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
