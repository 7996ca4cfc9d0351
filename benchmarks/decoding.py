"""Ragstone and transformers' own RAG classes: the same weights, contexts and answers, and the time of both.

    python benchmarks/decoding.py [--generator bart|t5] [--dtype float32 default] [--works NAME …] [--json]
    python benchmarks/decoding.py --sweep k|beams|batch --out docs/
    python benchmarks/decoding.py --ask --kb KB --questions questions.jsonl

Each work is done by both in turn in one process, ``--runs`` times. Weights are random, of the shapes of DPR and BART-base or
T5-base; contexts are random tokens, which the reference gets padded to 300 as its own retriever pads them. The reference
runs in float32, its default, and Ragstone in float32 on the very same modules and, with ``--dtype default``, in what it
chooses by itself. GFLOPs are those of matrix products, counted from shapes: for the reference as it computes, for Ragstone
what the task asks for: each context encoded once, no padding, every hypothesis scored under every passage; an early stop
does less, so its share of the matrix rate is left out. ``--ask`` compares the local default, its passages cold or
cached, with its own generator given all passages in one prompt. ``--tiny`` tries everything out in seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from machine import describe
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import ragstone
from ragstone import pipeline
from ragstone.cli.console import quiet_libraries


@dataclass(frozen=True)
class Work:
    """B questions with K passages each, and answers of exactly ``tokens`` new tokens."""

    method: str
    batch: int
    k: int
    beams: int
    tokens: int
    peaked: bool = False  # the prior, and the generator's confidence
    distinct: int = 0  # hypotheses of a question, at least


WORKS = {
    "thorough-beams": Work("sequence", batch=4, k=5, beams=4, tokens=16),
    "thorough-qa": Work("sequence", batch=1, k=50, beams=1, tokens=8, distinct=10),
    "thorough-peaked": Work("sequence", batch=1, k=50, beams=1, tokens=8, distinct=10, peaked=True),
    "token-beams": Work("token", batch=4, k=5, beams=4, tokens=16),
    "token-greedy": Work("token", batch=1, k=15, beams=1, tokens=16),
}
SWEEPS, SWEPT = {"k": [1, 5, 10, 25], "beams": [1, 2, 4, 8], "batch": [1, 2, 4, 8]}, Work("", 1, 5, 1, 8)
QUESTION_TOKENS = 12
CLEAR = 1e-3  # nats by which a winner must be ahead for both sides to have to agree
# With random weights all passages lead to one answer, or each to its own chaos. So cross-attention is sharper and stronger,
# a few words have larger output embeddings than the others, each of them expects the next, and the mean of the first decoder
# states is projected out of the output: what differs between passages chooses the first word, and mostly those after it.
SHARP, STRONG = {"bart": 6.0, "t5": 3.0}, {"bart": 3.0, "t5": 2.0}
WORDS, CHAIN, OTHERS = slice(100, 114), 0.5, 0.1
# The output is then scaled until the surest passage gives its own greedy answer this much probability (flat, peaked).
CERTAINTY = 1e-3, 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", choices=["bart", "t5"], default="bart")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "default"], default=["float32"], help="of Ragstone")
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--runs", type=int, default=None, help="5 by default, 3 for sweeps")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models and contexts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sweep", choices=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the figure of a sweep")
    parser.add_argument("--ask", action="store_true", help="the local default; needs --kb and --questions")
    parser.add_argument("--kb", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--limit", type=int, default=20, help="questions of --ask")
    options = parser.parse_args()
    if options.ask and not (options.kb and options.questions):
        parser.error("--ask needs --kb and --questions")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.runs = options.runs or (3 if options.sweep else 5)
    quiet_libraries()
    (ask if options.ask else sweep if options.sweep else works)(options)


@cache
def parts(kind: str, tiny: bool, seed: int) -> tuple[Any, Any]:
    """Question encoder and generator of random weights."""
    torch.manual_seed(seed)
    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64) if tiny else {}
    layers, heads, ffn, width = (2, 2, 128, 64) if tiny else (6, 12, 3072, 768)
    if kind == "bart":
        sides = dict(layers=layers, attention_heads=heads, ffn_dim=ffn)
        shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
        # Embeddings are scaled: otherwise positions count as much as words.
        shape |= dict(d_model=width, forced_eos_token_id=None, scale_embedding=True)
        config = transformers.BartConfig(**shape, vocab_size=1000 if tiny else 50265)
        generator = transformers.BartForConditionalGeneration(config)
    else:
        shape = dict(d_model=width, d_kv=width // heads, d_ff=ffn, num_layers=layers if tiny else 12, num_heads=heads)
        config = transformers.T5Config(**shape, vocab_size=1000 if tiny else 32128, decoder_start_token_id=0)
        generator = transformers.T5ForConditionalGeneration(config)
        config.scale_decoder_outputs = False
    config.tie_word_embeddings = False  # the output's own are made by teach()
    for name, weight in generator.get_decoder().named_parameters():
        if name.endswith(("encoder_attn.q_proj.weight", "EncDecAttention.q.weight")):
            weight.data *= SHARP[kind]
        elif name.endswith(("encoder_attn.out_proj.weight", "EncDecAttention.o.weight")):
            weight.data *= STRONG[kind]
    return transformers.DPRQuestionEncoder(transformers.DPRConfig(**bert)).eval(), generator.eval()


class Passages:
    """The retriever of both sides: B questions, K random contexts each, and the scores that they are to have."""

    def __init__(self, work: Work, generator: Any, tiny: bool, seed: int, lengths: Any = (150, 175)) -> None:
        make = torch.Generator().manual_seed(seed)
        shortest, longest, self.width = (20, 25, 40) if tiny else (*lengths, 300)
        shape = work.batch, work.k
        self.questions = torch.randint(100, 900, (work.batch, QUESTION_TOKENS), generator=make)
        ids = torch.randint(100, generator.config.vocab_size, (*shape, self.width), generator=make)
        self.mask = (
            torch.arange(self.width) < torch.randint(shortest, longest + 1, (*shape, 1), generator=make)
        ).long()
        self.ids = ids.masked_fill(self.mask == 0, generator.config.pad_token_id)
        self.scores = torch.linspace(1, 0, work.k).expand(shape)
        if work.peaked:
            self.scores = torch.cat([torch.zeros(1), torch.linspace(-6, -8, work.k - 1)]).expand(shape)
            assert self.scores.softmax(dim=-1)[0, 0] > 0.9
        self.asked: list[int] = []  # questions of each call

    @property
    def lengths(self) -> list[list[int]]:
        return self.mask.sum(dim=-1).tolist()

    def __call__(self, question_input_ids: Tensor, question_hidden_states: np.ndarray, *_: Any, **__: Any) -> Any:
        self.asked.append(len(question_input_ids))
        rows = [self.questions.tolist().index(row) for row in question_input_ids.tolist()]
        scores, vectors = self.scores[rows], torch.from_numpy(question_hidden_states)
        unit = vectors / vectors.square().sum(dim=1, keepdim=True)  # q · (s q / |q|²) = s
        return {
            "context_input_ids": self.ids[rows].flatten(0, 1),
            "context_attention_mask": self.mask[rows].flatten(0, 1),
            "retrieved_doc_embeds": scores.unsqueeze(-1) * unit.unsqueeze(1),
            "retrieved_doc_mask": torch.ones_like(scores, dtype=torch.bool),
            "truncated": torch.zeros_like(scores, dtype=torch.bool),
            "doc_ids": [[f"{row}-{k}" for k in range(scores.shape[1])] for row in rows],
        }

    def tokenize_questions(self, questions: Any) -> Any:
        raise NotImplementedError("questions are given as tokens")

    def attach(self, question_encoder: Any) -> None:
        pass


@torch.no_grad()
def teach(generator: Any, passages: Passages, work: Work, seed: int) -> None:
    """Give the generator an output that tells these passages apart. A peaked prior is on the passage it is surest of."""
    make = torch.Generator().manual_seed(seed)
    longest = max(map(max, passages.lengths))
    ids, mask = (t.flatten(0, 1)[:, :longest] for t in (passages.ids, passages.mask))
    encoded = generator.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    decoder, start = generator.get_decoder(), torch.full((len(ids), 1), generator.config.decoder_start_token_id)
    first = decoder(input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=mask).last_hidden_state
    known = decoder.get_input_embeddings().weight
    rows = OTHERS * torch.randn(known.shape, generator=make)
    rows[WORDS] = torch.randn(known[WORDS].shape, generator=make) + CHAIN * known[WORDS].roll(1, dims=0) / known.std()
    if len(ids) > 1:
        common = nn.functional.normalize(first[:, 0].mean(dim=0), dim=0)
        rows -= torch.outer(rows @ common, common)
    rows[:4] = 0  # padding, EOS and the like never win
    generator.lm_head.weight = nn.Parameter(rows / known.shape[1] ** 0.5)
    greedy = dict(max_new_tokens=work.tokens, num_beams=1, do_sample=False, attention_mask=mask)
    greedy |= dict(output_logits=True, return_dict_in_generate=True)
    out = generator.generate(encoder_outputs=BaseModelOutput(last_hidden_state=encoded), **greedy)
    labels, logits = out.sequences[:, 1:], torch.stack(out.logits, dim=1)

    def certainty(scale: float) -> Tensor:
        return (scale * logits).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).sum(dim=(1, 2)).exp()

    scale = next(1.25**n for n in range(50) if certainty(1.25**n).max() >= CERTAINTY[work.peaked])
    generator.lm_head.weight.data *= scale
    if work.peaked:
        order = certainty(scale).argsort(descending=True)
        passages.ids, passages.mask = passages.ids[:, order], passages.mask[:, order]


class MaskedRagSequence(transformers.RagSequenceForGeneration):
    """The reference, whose search reads padding as if it were text, with its padding masked."""

    @property
    def generator(self) -> Any:
        inner = self.rag.generator

        def generate(ids: Tensor, **options: Any) -> Tensor:
            return inner.generate(ids, **{**options, "attention_mask": (ids != inner.config.pad_token_id).long()})

        return SimpleNamespace(config=inner.config, generate=generate)


REFERENCES = {"sequence": MaskedRagSequence, "token": transformers.RagTokenForGeneration}
OURS = {"sequence": ragstone.RagSequenceForGeneration, "token": ragstone.RagTokenForGeneration}


class Pair:
    """Both models on the same weights and passages."""

    def __init__(self, work: Work, options: Any) -> None:
        question_encoder, generator = parts(options.generator, options.tiny, options.seed)
        self.work, self.passages = work, Passages(work, generator, options.tiny, options.seed)
        self.generator, self.question_encoder = generator.config, question_encoder.config
        more = dict(n_docs=work.k, decoder_start_token_id=generator.config.decoder_start_token_id)
        if options.generator == "t5":
            more["bos_token_id"] = (
                generator.config.vocab_size
            )  # no token: T5 has none, and the reference's loss wants one
        configs = question_encoder.config, generator.config
        config = transformers.RagConfig.from_question_encoder_generator_configs(*configs, **more)
        self.theirs = REFERENCES[work.method](config, question_encoder, generator).eval()
        self.ours = OURS[work.method].from_pretrained_question_encoder_generator(
            question_encoder_model=question_encoder, generator_model=generator, n_docs=work.k
        )
        teach(generator, self.passages, work, options.seed)  # not before: models draw new output weights when built
        self.variants = {"float32": self.ours}
        if "default" in options.dtype:
            self.variants["default"] = copy.deepcopy(self.ours)
            pipeline._set_dtype(self.variants["default"], None)
        self.variants = {name: self.variants[name] for name in options.dtype}
        self.asked = dict(input_ids=self.passages.questions, n_docs=work.k, num_beams=work.beams, do_sample=False)
        for model in (self.theirs, *self.variants.values()):
            model.set_retriever(self.passages)

    def reference(self) -> Tensor:
        return self.theirs.generate(**self.asked, max_length=self.work.tokens + 1)  # RAG-Token ignores max_new_tokens

    def ragstone(self, **options: Any) -> Any:
        return self.ours.generate(**self.asked, max_new_tokens=self.work.tokens, **options)

    def margins(self) -> list[float]:
        """By how much each question's winner is ahead; in a greedy RAG-Token search the closest of its tokens."""
        if self.work.method == "token" and self.work.beams == 1:
            scores = torch.stack(self.ragstone(return_dict_in_generate=True, output_scores=True).scores, dim=1)
            best = scores.float().topk(2, dim=-1).values.diff(dim=-1).abs().amin(dim=1)
        elif self.work.k * self.work.beams == 1:
            return [math.inf] * self.work.batch  # one hypothesis
        else:
            best = self.ragstone(return_dict_in_generate=True, num_return_sequences=2).log_probs.view(-1, 2)
            best = best.diff(dim=-1).abs()
        return best.flatten().tolist()


class Products:
    """GFLOPs of the matrix products of a BART or T5, or of a BERT as an encoder."""

    def __init__(self, c: Any) -> None:
        bart, t5 = c.model_type == "bart", c.model_type == "t5"
        self.width, self.vocabulary = c.hidden_size, c.vocab_size
        self.inner = c.num_heads * c.d_kv if t5 else c.hidden_size
        self.ffn = c.encoder_ffn_dim if bart else c.d_ff if t5 else c.intermediate_size
        self.encoder_layers = c.encoder_layers if bart else c.num_hidden_layers
        self.decoder_layers = c.decoder_layers if bart else c.num_decoder_layers if t5 else 0

    def encode(self, length: int) -> float:
        """A text through the encoder."""
        token = 4 * self.width * self.inner + 2 * self.width * self.ffn + 2 * length * self.inner
        return 2e-9 * self.encoder_layers * length * token

    def cross(self, length: int) -> float:
        """Cross-attention's keys and values of an encoded text."""
        return 2e-9 * self.decoder_layers * length * 2 * self.width * self.inner

    def decode(self, first: int, last: int, length: int) -> float:
        """The tokens from position ``first`` (from 1) to ``last`` over an encoded text, with their logits."""
        count, seen = last - first + 1, sum(range(first, last + 1))
        token = 6 * self.width * self.inner + 2 * self.width * self.ffn + 2 * length * self.inner
        layer = count * token + 2 * seen * self.inner
        return 2e-9 * (self.decoder_layers * layer + count * self.width * self.vocabulary)


def gflops(pair: Pair, candidates: list[int]) -> tuple[float, float]:
    """Of the reference and of Ragstone; ``candidates`` counts the hypotheses of each question (RAG-Sequence)."""
    work, padded, n = pair.work, pair.passages.width, pair.work.tokens
    model, asked = Products(pair.generator), Products(pair.question_encoder).encode(QUESTION_TOKENS)
    theirs = ours = work.batch * asked
    theirs += work.batch * work.k * model.encode(padded)
    theirs += work.batch * work.k * work.beams * (model.cross(padded) + model.decode(1, n, padded))
    for length in (length for lengths in pair.passages.lengths for length in lengths):
        ours += model.encode(length) + model.cross(length)
        ours += model.decode(1, 1, length) + work.beams * model.decode(2, n, length)  # all beams share the start token
    for lengths, found in zip(pair.passages.lengths, candidates, strict=False):
        once = model.encode(padded) + model.cross(padded) + model.decode(1, n + 1, padded)
        theirs += found * (asked + work.k * once)
        ours += found * sum(model.decode(1, n, length) for length in lengths)
    return theirs, ours


@cache
def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOPs a second of a square matrix product: the best of a few."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2e-9 * size**3 / min(seconds_of(lambda: a @ b)[0] for _ in range(8))


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(pair: Pair, runs: int) -> list[dict[str, Any]]:
    """Seconds of the reference and of Ragstone in each dtype, in turn, and their answers."""
    margins, spent, answers = {}, {"reference": []}, {}
    for name, model in pair.variants.items():
        pair.ours = model
        margins[name], spent[name] = pair.margins(), []  # Ragstone's first runs, not timed
    for _ in range(runs):
        pair.passages.asked.clear()
        time_taken, expected = seconds_of(pair.reference)
        spent["reference"].append(time_taken)
        candidates = pair.passages.asked[1:]  # it retrieves again for each of them
        for name, model in pair.variants.items():
            pair.ours = model
            time_taken, answers[name] = seconds_of(pair.ragstone)
            spent[name].append(time_taken)
    figures = []
    for name, model in pair.variants.items():
        pair.ours = model
        seconds = {"reference": spent["reference"], "ragstone": spent[name]}
        figures.append(compare(pair, seconds, candidates, margins[name], expected, answers[name]))
    return figures


def compare(
    pair: Pair, seconds: dict[str, list[float]], candidates: list[int], margins: list[float], expected: Any, found: Any
) -> dict[str, Any]:
    """The figures of one work in one dtype."""
    # Padding and EOS are below 4, words are not.
    words = [[[t for t in row if t >= 4] for row in sequences.tolist()] for sequences in (expected, found)]
    equal = [a == b for a, b in zip(*words, strict=True)]
    clear = [same for same, margin in zip(equal, margins, strict=True) if margin > CLEAR]
    theirs, ours = (median(spent) for spent in seconds.values())
    dtype, counted = pair.ours.generator.dtype, gflops(pair, candidates)
    f = asdict(pair.work) | dict(dtype=str(dtype).removeprefix("torch."), reference=theirs, ragstone=ours)
    f["ratio"] = median(a / b for a, b in zip(*seconds.values(), strict=True))
    f["tokens_per_second"] = sum(map(len, words[1])) / ours
    f["gflops_reference"], f["gflops_ragstone"] = counted
    f["share_reference"] = counted[0] / theirs / matrix_rate(torch.float32)
    f["share_ragstone"] = counted[1] / ours / matrix_rate(dtype)
    f |= dict(hypotheses=candidates, equal=sum(equal), clear=len(clear), clear_equal=sum(clear))
    return f | dict(margins=margins, seconds=seconds)


COLUMNS = ["work", "dtype", "reference s", "ragstone s", "×", "tokens/s", "reference GFLOPs", "ragstone GFLOPs"]
COLUMNS += ["reference share", "ragstone share", "hypotheses", "winners equal"]


def row(f: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f["work"], f["dtype"], f"{f['reference']:.3f}", f"{f['ragstone']:.3f}", f"{f['ratio']:.1f}"]
    cells += [f"{f[name]:.1f}" for name in ("tokens_per_second", "gflops_reference", "gflops_ragstone")]
    cells += [
        f"{f['share_reference']:.0%}",
        "" if f["peaked"] else f"{f['share_ragstone']:.0%}",
        ", ".join(map(str, f["hypotheses"])),
    ]
    winners = f"{f['equal']} of {f['batch']} (of which margin > {CLEAR:g}: {f['clear_equal']} of {f['clear']} equal)"
    return f"| {' | '.join(cells)} | {winners} |"


def works(options: Any) -> None:
    """The table."""
    figures: list[dict[str, Any]] = []
    for name in options.works:
        pair = Pair(WORKS[name], options)
        for measured in measure(pair, options.runs):
            figures.append({"work": name, **measured})
            print(row(figures[-1]), file=sys.stderr, flush=True)
        least = min(figures[-1]["hypotheses"], default=0)
        assert least >= WORKS[name].distinct, f"{name}: {least} distinct hypotheses are too few; take another seed"
    dtypes = {torch.float32, *(model.generator.dtype for model in pair.variants.values())}
    rates = {str(t).removeprefix("torch."): matrix_rate(t) for t in dtypes}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    setting = {"generator": options.generator + ("-tiny" if options.tiny else "-base"), "runs": options.runs}
    setting |= {"seed": options.seed, "gflops_per_second": rates, "peak_memory_gb": memory}
    if options.json:
        print(json.dumps({"machine": describe(), **setting, "works": figures}))
        return
    print(describe(), setting, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", sep="\n")
    print(*map(row, figures), sep="\n")
    print("\nReference in float32; median seconds, median of the pairwise ratios.")


def sweep(options: Any) -> None:
    """Both methods over the values of one quantity: a figure, and its numbers."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("A sweep draws with matplotlib, which is not installed: pip install matplotlib")
    name, values = options.sweep, SWEEPS[options.sweep]
    pyplot.switch_backend("Agg")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    figures: dict[str, list[dict[str, Any]]] = {"sequence": [], "token": []}
    for panel, (method, rows) in zip(panels, figures.items(), strict=True):
        for value in values:
            measured = measure(Pair(replace(SWEPT, method=method, **{name: value}), options), options.runs)[-1]
            rows.append({"work": f"{method}, {name} = {value}", **measured})
            print(row(rows[-1]), file=sys.stderr, flush=True)
        for side, label in (("reference", "transformers, float32"), ("ragstone", f"Ragstone, {rows[0]['dtype']}")):
            panel.plot(range(len(values)), [f[side] for f in rows], marker="o", label=label)
        for n, f in enumerate(rows):
            below = dict(xytext=(0, -14), textcoords="offset points", ha="center")
            panel.annotate(f"{f['ratio']:.1f}×", (n, f["ragstone"]), **below)
        panel.set(title=f"RAG-{method.capitalize()}", yscale="log", xlabel={"k": "passages K"}.get(name, name))
        panel.set_xticks(range(len(values)), map(str, values))
        panel.margins(x=0.08, y=0.12)  # room for the ratios
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    fixed = ", ".join(f"{key} = {getattr(SWEPT, key)}" for key in (*SWEEPS, "tokens") if key != name)
    figure.suptitle(f"{options.generator}, {fixed}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decoding-{name}.svg"
    figure.savefig(path)
    print(json.dumps({"machine": describe(), "figure": str(path), **figures}) if options.json else path)


def ask(options: Any) -> None:
    """Seconds of questions with cold and with cached passages, and of one prompt with all passages."""
    texts = [json.loads(line)["question"] for line in options.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(texts)
    base = ragstone.KnowledgeBase.open(options.kb)
    figures: dict[str, Any] = {"machine": describe(), "questions": options.limit, "k": 5, "max_new_tokens": 16}
    for method in ("token", "sequence"):
        rag = ragstone.RagPipeline.from_pretrained("local", knowledge_base=base, method=method)
        figures["dtype"] = str(rag.model.generator.dtype).removeprefix("torch.")
        rows = [asked_three_ways(rag, base, text) for text in texts[: options.limit + 1]][1:]  # the first warms up
        figures[method] = {name: (mean if "tokens" in name else median)(r[name] for r in rows) for name in rows[0]}
    if options.json:
        print(json.dumps(figures))
        return
    names = list(figures["token"])
    print(figures.pop("machine"), {k: v for k, v in figures.items() if k not in ("token", "sequence")}, "", sep="\n")
    print("| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", sep="\n")
    for method in ("token", "sequence"):
        print(f"| {method} | " + " | ".join(f"{figures[method][name]:.3f}" for name in names) + " |")


def asked_three_ways(rag: Any, base: Any, question: str) -> dict[str, float]:
    """Seconds (search included) and new tokens."""
    rag.clear_cache()
    cold, answer = seconds_of(lambda: rag(question, k=5, max_new_tokens=16))
    cached, _ = seconds_of(lambda: rag(question, k=5, max_new_tokens=16))
    alone, written = seconds_of(lambda: one_prompt(rag, base, question))
    ratios = {"cold / one prompt": cold / alone, "cached / one prompt": cached / alone}
    tokens = {"tokens": len(answer.tokens), "tokens, one prompt": written}
    return {"cold s": cold, "cached s": cached, "one prompt s": alone, **ratios, **tokens}


def one_prompt(rag: Any, base: Any, question: str) -> int:
    """Search, then transformers' greedy search on one prompt with all passages: the number of new tokens."""
    form, tokenizer = rag.model.config, rag.tokenizer.generator
    found = [f"{hit.passage.title}\n{hit.passage.text}" for hit in base.search([question], k=5)[0]]
    asked = "\n\n".join(found) + form.prompt_question.replace("{question}", question)
    messages = [{"role": "system", "content": form.prompt_system}, {"role": "user", "content": asked}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    greedy = dict(max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return rag.model.generator.generate(**inputs, **greedy).shape[1] - inputs["input_ids"].shape[1]


if __name__ == "__main__":
    main()
