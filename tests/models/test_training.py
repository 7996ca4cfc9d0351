"""Gradients of the whole model, and transformers' Trainer around it."""

import pytest
import torch
from torch.utils.data import Dataset

from ragstone import RagSequenceForGeneration, RagTokenForGeneration, RagTokenizer
from ragstone.testing import (
    ToyRetriever,
    question_tokenizer,
    seq2seq_tokenizer,
    tiny_generator,
    tiny_question_encoder,
)

METHODS = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}

QUESTIONS = ["who wrote Hamlet?", "capital of France", "how high is Mount Everest", "who discovered radium"]
ANSWERS = ["Shakespeare", "Paris", "8,849 metres", "Marie Curie"]


@pytest.fixture(params=METHODS)
def rag(request):
    """A model in float64 and without dropout, which would make every pass another."""
    model = METHODS[request.param].from_pretrained_question_encoder_generator(
        question_encoder_model=tiny_question_encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        generator_model=tiny_generator("bart", dropout=0.0),
        n_docs=3,
    )
    model.tokenizer = RagTokenizer(question_tokenizer(), seq2seq_tokenizer())
    model.set_retriever(ToyRetriever(model.config, model.tokenizer))
    return model.double()


def batch_of(rag, rows=slice(None)):
    return rag.tokenizer.prepare_seq2seq_batch(QUESTIONS[rows], ANSWERS[rows], return_tensors="pt")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("part", ["question_encoder", "generator"])
def test_gradients_are_those_of_finite_differences(rag, part, smoothing):
    """Along random directions in the space of all weights of a part; retrieval itself stays the same."""
    rag.config.label_smoothing = smoothing
    batch = batch_of(rag)
    weights = [p for p in getattr(rag, part).parameters() if p.requires_grad]

    def loss():
        out = rag(**batch, output_retrieved=True)
        return out.loss, out.retrieved_doc_ids

    value, chosen = loss()
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    for seed in range(3):
        make = torch.Generator().manual_seed(seed)
        direction = [torch.randn(p.shape, generator=make, dtype=p.dtype) for p in weights]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
        step, sides = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(weights, direction, strict=True):
                    p += sign * step * d
                side, still = loss()
                for p, d in zip(weights, direction, strict=True):
                    p -= sign * step * d
            assert still == chosen
            sides.append(side)
        assert slope.abs() > 1e-3
        torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), slope, rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_are_those_of_one_larger_batch(rag):
    rag(**batch_of(rag)).loss.backward()
    whole = [p.grad.clone() for p in rag.parameters() if p.grad is not None]
    rag.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        (rag(**batch_of(rag, rows)).loss / 2).backward()
    parts = [p.grad for p in rag.parameters() if p.grad is not None]
    assert len(parts) == len(whole)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-8)


class Rows(Dataset):
    """Questions and answers of equal length, as the Trainer's default collator wants them."""

    def __init__(self, rag):
        self.batch = batch_of(rag)

    def __len__(self):
        return len(QUESTIONS)

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.batch.items()}


def trained(model, folder, **options):
    """The weights after two steps of plain gradient descent by the Trainer, and the losses it logged."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = Rows(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()["eval_loss"]
    return [p.detach().clone() for p in model.parameters()], losses, evaluated


def test_the_trainer_trains_evaluates_and_scales_accumulated_losses_rightly(rag, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    start = {name: value.clone() for name, value in rag.state_dict().items()}
    whole, losses, evaluated = trained(rag, tmp_path, per_device_train_batch_size=4)
    assert evaluated < losses[0]
    rag.load_state_dict(start)
    parts, accumulated, _ = trained(rag, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert accumulated == pytest.approx(losses, rel=1e-3)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-8)


def test_losses_are_not_rescaled_by_the_trainer(rag):
    assert rag.accepts_loss_kwargs is False
