"""What all tests share: one thread, and tiny models with given contexts next to the definitions they are held to."""

import sys
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from ragstone import RagSequenceForGeneration, RagTokenForGeneration
from ragstone.testing import tiny_generator, tiny_question_encoder

KINDS = ("bart", "t5", "llama", "gpt2")
METHODS = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny tensors: threads cost more than they give. Tests of real models keep theirs."""
    torch = sys.modules.get("torch")
    if torch is None or any(request.node.get_closest_marker(name) for name in ("data", "local")):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    """A model and B questions with K contexts each; the last slot of the last question is empty if K > 1."""

    model: Any
    inputs: dict[str, torch.Tensor]
    eos: int
    pad: int

    @property
    def prior(self):
        """(B, K), in float64."""
        return self.inputs["doc_scores"].double().log_softmax(dim=1)

    def of(self, b):
        """Question b alone."""
        passages = self.inputs["doc_scores"].shape[1]
        rows = slice(b * passages, (b + 1) * passages)
        contexts = {name: self.inputs[name][rows] for name in ("context_input_ids", "context_attention_mask")}
        return Case(self.model, {**contexts, "doc_scores": self.inputs["doc_scores"][b : b + 1]}, self.eos, self.pad)

    def labels(self, sequence):
        """What the model predicted of a generated sequence: no start token, nothing behind the first EOS."""
        tokens = list(sequence)[1:] if self.model.config.is_encoder_decoder else list(sequence)
        return tokens[: tokens.index(self.eos) + 1] if self.eos in tokens else tokens

    @torch.no_grad()
    def table(self, b, tokens):
        """log p(y_t | x, z_k, y_<t) of tokens (T) under each passage alone, uncached, in float64: (K, T + 1, V)."""
        passages = self.inputs["doc_scores"].shape[1]
        generator, rows = self.model.generator, []
        for row in range(b * passages, (b + 1) * passages):
            context = self.inputs["context_input_ids"][row][self.inputs["context_attention_mask"][row].bool()][None]
            answer = torch.tensor([tokens], dtype=torch.long).view(1, -1)
            if generator.config.is_encoder_decoder:
                start = torch.tensor([[generator.generation_config.decoder_start_token_id]])
                out = generator(input_ids=context, decoder_input_ids=torch.cat([start, answer], dim=1)).logits[0]
            else:
                out = generator(input_ids=torch.cat([context, answer], dim=1)).logits[0, context.shape[1] - 1 :]
            rows.append(out.double().log_softmax(dim=-1))
        return torch.stack(rows)

    def next_token(self, b, tokens):
        """RAG-Token's log p(· | x, y_<t): (V,)."""
        return (self.prior[b][:, None] + self.table(b, tokens)[:, -1]).logsumexp(dim=0)

    def label_log_probs(self, b, tokens):
        """(K, T'), of the tokens that count: not of padding that was generated, unless it is EOS."""
        counted = [t for t, token in enumerate(tokens) if token == self.eos or token != self.pad]
        table = self.table(b, tokens)[:, : len(tokens)]
        return table.gather(2, torch.tensor(tokens, dtype=torch.long).view(1, -1, 1).expand(len(table), -1, 1))[
            :, counted, 0
        ]

    def log_prob(self, b, tokens):
        """log p(y|x) by the definition of the model's method."""
        scores, prior = self.label_log_probs(b, tokens), self.prior[b]
        if self.model.method == "token":
            return float((prior[:, None] + scores).logsumexp(dim=0).sum())
        return float((prior + scores.sum(dim=1)).logsumexp(dim=0))

    def posterior(self, b, tokens):
        """p(z|x,y): (K,), for RAG-Token the mean of the tokens' posteriors."""
        scores, prior = self.label_log_probs(b, tokens), self.prior[b]
        if self.model.method == "token":
            return (prior[:, None] + scores).softmax(dim=0).mean(dim=1)
        return (prior + scores.sum(dim=1)).softmax(dim=0)

    def strings(self, vocabulary, length):
        """Every answer of at most ``length`` tokens: those that end with EOS, and those cut off."""
        others = [token for token in range(vocabulary) if token != self.eos]
        ended = [(*begin, self.eos) for n in range(length) for begin in product(others, repeat=n)]
        return ended + list(product(others, repeat=length))


@pytest.fixture
def case():
    def make(method, kind="bart", *, seed=0, vocabulary=40, batch=2, passages=3, empty=True, **config):
        """Padding is EOS with a tiny vocabulary, so that every token is a real one."""
        ends = {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 0} if vocabulary < 10 else {}
        untied = {"tie_word_embeddings": False} if kind == "bart" else {}  # tied ones repeat their input
        generator = tiny_generator(kind, seed=seed, vocab_size=vocabulary, **ends, **untied, **config)
        model = METHODS[method].from_pretrained_question_encoder_generator(
            question_encoder_model=tiny_question_encoder(seed=seed), generator_model=generator
        )
        make = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 8, (batch * passages, 1), generator=make)
        ids = torch.randint(3, vocabulary, (batch * passages, 7), generator=make)
        scores = torch.randn(batch, passages, generator=make)
        if empty and passages > 1:
            scores[-1, -1] = -torch.inf
        mask = (torch.arange(7) < lengths).long()
        return Case(
            model,
            {"context_input_ids": ids, "context_attention_mask": mask, "doc_scores": scores},
            generator.generation_config.eos_token_id,
            generator.generation_config.pad_token_id,
        )

    return make


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=list(METHODS))
def method(request):
    return request.param
