"""On a GPU everything gives what it gives on the CPU. Skipped where there is none."""

import copy

import pytest
import torch

from ragstone import KnowledgeBase, RagPipeline, RagRetriever
from ragstone.questions import Question
from ragstone.testing import ToyEncoder, tiny_rag, toy_passages
from ragstone.training import RagTrainer, TrainingOptions
from ragstone.training.kernels import sound_attention

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch knows as cuda")

QUESTIONS = [
    Question("who wrote Hamlet?", ("Shakespeare", "William Shakespeare"), "0", ("toy-0",)),
    Question("capital of France", ("Paris",), "1", ("toy-3",)),
    Question("how high is Mount Everest", ("8,849 metres", "8849 m"), "2", ("toy-1",)),
    Question("who discovered radium", ("Marie Curie",), "3", ("toy-4",)),
]
SEARCHES = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"prefix_allowed_tokens_fn": lambda b, tokens: [3 + b, 4, 5, 2]},
]


def moved(tensors, device):
    return {name: value.to(device) for name, value in tensors.items()}


@pytest.fixture
def base(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(16))
    base.add(toy_passages())
    return base


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beams", "penalties", "constrained"])
def test_answers_and_their_probabilities_are_those_of_the_cpu(case, method, kind, options):
    c = case(method, kind)
    there = copy.deepcopy(c.model).to(DEVICE)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, **options}
    expected, found = c.model.generate(**c.inputs, **options), there.generate(**moved(c.inputs, DEVICE), **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("log_probs", "posteriors"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decode", ["thorough", "fast"])
def test_both_ways_to_decode_a_sequence(case, kind, decode):
    c = case("sequence", kind)
    there = copy.deepcopy(c.model).to(DEVICE)
    options = {"max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True, "decode": decode}
    expected, found = c.model.generate(**c.inputs, **options), there.generate(**moved(c.inputs, DEVICE), **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(found.log_probs.cpu(), expected.log_probs, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_cpu(case, method, kind):
    c = case(method, kind)
    there = copy.deepcopy(c.model).to(DEVICE)
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100]])
    for model, device in ((c.model, "cpu"), (there, DEVICE)):
        model.eval()
        model(**moved(c.inputs, device), labels=labels.to(device)).loss.backward()
    there_grads = {name: weight.grad for name, weight in there.named_parameters()}
    for name, weight in c.model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(there_grads[name].cpu(), weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("search", ["dense", "exact", "keyword", "hybrid"])
@pytest.mark.parametrize("extractive", [False, True])
def test_a_pipeline_answers_as_on_the_cpu(base, method, search, extractive):
    model, tokenizer = tiny_rag(method, "llama")
    there = RagPipeline(copy.deepcopy(model).to(DEVICE).eval(), tokenizer, base)
    here = RagPipeline(model.eval(), tokenizer, base)
    questions = [question.question for question in QUESTIONS]
    options = {"k": 3, "search": search, "max_new_tokens": 6, "extractive": extractive}
    for found, expected in zip(there(questions, **options), here(questions, **options), strict=True):
        assert found.text == expected.text
        assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-3)
        assert [e.passage.id for e in found.passages] == [e.passage.id for e in expected.passages]
        assert found.score_of("Paris").log_prob == pytest.approx(expected.score_of("Paris").log_prob, abs=1e-3)
    assert [a.text for a in there.choose(questions, ["yes", "no"])] == [
        a.text for a in here.choose(questions, ["yes", "no"])
    ]
    assert "".join(there.stream(questions[0], max_new_tokens=6)) == "".join(here.stream(questions[0], max_new_tokens=6))


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "in_batch": True,
            "decline_weight": 1.0,
            "lora_rank": 2,
            "question_encoder_lora_rank": 2,
            "learn_score_scale": True,
        },
        {"answers": "all", "with_positives": True, "search": "hybrid"},
    ],
    ids=["plain", "in-batch", "all-answers"],
)
def test_a_step_is_that_of_the_cpu(base, tmp_path, kind, options):
    weights = []
    for device in ("cpu", DEVICE):
        trainer = trained(base, tmp_path / device, device, kind, TrainingOptions(k=2, **options))
        weights.append({n: w.detach().cpu() for n, w in trainer.model.named_parameters() if w.requires_grad})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)


def test_a_run_in_bfloat16_goes_on_from_its_checkpoint(base, tmp_path):
    options = TrainingOptions(k=2, in_batch=True, decline_weight=1.0, lora_rank=2)
    trained(base, tmp_path / "out", DEVICE, "llama", options, bf16=True, save_strategy="steps", save_steps=1)
    trainer = trained(
        base, tmp_path / "out", DEVICE, "llama", options, bf16=True, max_steps=4, resume=tmp_path / "out/checkpoint-2"
    )
    assert trainer.state.global_step == 4
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_gradients_of_masked_attention_are_numbers():
    """192 keys under a mask, all with very negative logits: where cuDNN's kernel gives NaN on some GPUs."""
    query, key = (torch.randn(2, 3, 192, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    query[..., 0], key[..., 0] = 1.0, -1000.0
    mask = torch.ones(192, 192, dtype=torch.bool, device=DEVICE).tril()
    query.requires_grad_()
    with sound_attention():
        torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask).sum().backward()
    assert query.grad.isfinite().all()


def trained(base, folder, device, kind, options, *, resume=None, **settings):
    from transformers import TrainingArguments

    model, tokenizer = tiny_rag("sequence", kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if kind == "bart":
        for part in model.generator.modules():
            if isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
    settings = {"max_steps": 2, "save_strategy": "no", "optim": "sgd", "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        **settings,
    )
    retriever = RagRetriever(model.config, tokenizer.question_encoder, tokenizer.generator, base)
    trainer = RagTrainer(
        model.to(device),
        arguments,
        tokenizer=tokenizer,
        retriever=retriever,
        questions=QUESTIONS,
        options=options,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer
