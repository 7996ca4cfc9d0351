"""Ragstone and transformers' own RAG classes: the same weights, the same contexts, the same answers, and the time of both.

    python benchmarks/decoding.py [--generator bart|t5] [--dtype float32|default] [--works NAME …] [--json]
    python benchmarks/decoding.py --sweep k|beams|batch --out docs/
    python benchmarks/decoding.py --ask --kb KB --questions questions.jsonl

Each work is done by both in turn in one process, ``--runs`` times. Weights are random, of the shapes of DPR and BART-base or
T5-base; contexts are random tokens, which the reference gets padded to 300 as its retriever pads them. The reference computes
in float32, its default, and Ragstone in float32 on the very same modules or, with ``--dtype default``, in the dtype that it
chooses by itself. GFLOPs are those of matrix products, counted from the shapes: for the reference as it runs, for Ragstone
what the task asks for, each context encoded once and without padding; an early stop does less, and then its share of the
matrix rate is an upper bound. ``--ask`` compares the local default, whose passages are cold or cached, with its own generator
asked once with all passages in one prompt. ``--tiny`` tries everything out in seconds.
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
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from machine import describe
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import ragstone
from ragstone.cli.console import quiet_libraries


@dataclass(frozen=True)
class Work:
    """What is asked: B questions with K passages each, answers of exactly ``tokens`` new tokens."""

    method: str
    batch: int
    k: int
    beams: int
    tokens: int
    peaked: bool = False
    distinct: int = 1  # hypotheses of a question, at least


WORKS = {
    "thorough-beams": Work("sequence", batch=4, k=5, beams=4, tokens=16),
    "thorough-qa": Work("sequence", batch=1, k=50, beams=1, tokens=8, distinct=10),
    "thorough-peaked": Work("sequence", batch=1, k=50, beams=1, tokens=8, distinct=10, peaked=True),
    "token-beams": Work("token", batch=4, k=5, beams=4, tokens=16),
    "token-greedy": Work("token", batch=1, k=15, beams=1, tokens=16),
}
SWEEPS = {"k": [1, 5, 15, 50], "beams": [1, 2, 4, 8], "batch": [1, 2, 4, 8]}
SWEPT = Work("token", batch=1, k=5, beams=1, tokens=8)
QUESTION_TOKENS = 12
CLEAR = 1e-3  # nats by which a winner is ahead of the second, for both sides to have to agree
# With random weights all passages lead to one answer, or each to its own chaos. So cross-attention is sharper and stronger, a
# few words have larger output embeddings than all others, each of them expects the next, and the mean of the first decoder
# states is projected out of the output: what differs between passages chooses the first word, and mostly those after it.
SHARP, STRONG, WORDS, CHAIN, OTHERS, FIRST = {"bart": 6.0, "t5": 3.0}, {"bart": 3.0, "t5": 2.0}, 14, 1.0, 0.1, 100
CERTAINTY = 0.3, 0.97  # of the surest passage's own greedy answer: by default, and of a confident generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", choices=["bart", "t5"], default="bart")
    parser.add_argument("--dtype", choices=["float32", "default"], default="float32", help="of Ragstone")
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--runs", type=int, default=None, help="5 by default, 3 for sweeps")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models and contexts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sweep", choices=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the figure of a sweep")
    parser.add_argument("--ask", action="store_true", help="the local default on real questions; needs --kb, --questions")
    parser.add_argument("--kb", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    options = parser.parse_args()
    if options.ask and not (options.kb and options.questions):
        parser.error("--ask needs --kb and --questions")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.runs = options.runs or (3 if options.sweep else 5)
    quiet_libraries()
    if options.sweep:
        sweep(options)
    elif options.ask:
        ask(options)
    else:
        works(options)


# Weights and contexts


@cache
def parts(kind: str, tiny: bool, seed: int) -> tuple[Any, Any]:
    """Question encoder and generator of random weights."""
    torch.manual_seed(seed)
    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64) if tiny else {}
    sides = dict(layers=2 if tiny else 6, attention_heads=2 if tiny else 12, ffn_dim=128 if tiny else 3072)
    if kind == "bart":
        shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
        shape |= dict(d_model=64 if tiny else 768, vocab_size=1000 if tiny else 50265)
        # Scaled embeddings: otherwise positions count as much as words.
        config = transformers.BartConfig(**shape, forced_eos_token_id=None, scale_embedding=True)
        generator = transformers.BartForConditionalGeneration(config)
    else:
        shape = dict(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=1000)
        real = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
        config = transformers.T5Config(**(shape if tiny else real), decoder_start_token_id=0)
        generator = transformers.T5ForConditionalGeneration(config)
        config.scale_decoder_outputs = False
    config.tie_word_embeddings = False  # the output's own are made below
    for name, weight in generator.get_decoder().named_parameters():
        if name.endswith(("encoder_attn.q_proj.weight", "EncDecAttention.q.weight")):
            weight.data *= SHARP[kind]
        elif name.endswith(("encoder_attn.out_proj.weight", "EncDecAttention.o.weight")):
            weight.data *= STRONG[kind]
    return transformers.DPRQuestionEncoder(transformers.DPRConfig(**bert)).eval(), generator.eval()


class Passages:
    """The retriever of both sides: B questions, K random contexts each, and the scores that they are wanted to have."""

    def __init__(self, work: Work, generator: Any, tiny: bool, seed: int) -> None:
        make = torch.Generator().manual_seed(seed)
        shortest, longest, self.width = (20, 25, 40) if tiny else (150, 175, 300)
        self.questions = torch.randint(100, 900, (work.batch, QUESTION_TOKENS), generator=make)
        self.rows = {tuple(row): n for n, row in enumerate(self.questions.tolist())}
        shape = work.batch, work.k
        ids = torch.randint(100, generator.config.vocab_size, (*shape, self.width), generator=make)
        lengths = torch.randint(shortest, longest + 1, (*shape, 1), generator=make)
        self.mask = (torch.arange(self.width) < lengths).long()
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
        rows = [self.rows[tuple(row)] for row in question_input_ids.tolist()]
        vectors = torch.from_numpy(question_hidden_states)
        unit = vectors / vectors.square().sum(dim=1, keepdim=True)  # q · (s q / |q|²) = s
        scores = self.scores[rows]
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
    """Give the generator output embeddings that tell these passages apart; the passage it is surest of comes first."""
    make = torch.Generator().manual_seed(seed)
    longest = max(map(max, passages.lengths))
    ids, mask = (t.flatten(0, 1)[:, :longest] for t in (passages.ids, passages.mask))
    encoded = generator.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    start = torch.full((len(ids), 1), generator.config.decoder_start_token_id)
    first = generator.get_decoder()(
        input_ids=start, encoder_hidden_states=encoded, encoder_attention_mask=mask
    ).last_hidden_state[:, 0]
    mean = nn.functional.normalize(first.mean(dim=0), dim=0)
    known = generator.get_decoder().get_input_embeddings().weight
    words = slice(FIRST, FIRST + WORDS)
    rows = OTHERS * torch.randn(known.shape, generator=make)
    rows[words] = torch.randn(WORDS, known.shape[1], generator=make)
    rows[words] += CHAIN * known[words].roll(1, dims=0) / known[words].std()
    rows -= torch.outer(rows @ mean, mean)
    rows[:4] = 0  # padding, EOS and the like never win
    generator.lm_head.weight = nn.Parameter(rows / known.shape[1] ** 0.5)
    out = generator.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=mask,
        max_new_tokens=work.tokens,
        num_beams=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    labels, logits = out.sequences[:, 1:], torch.stack(out.logits, dim=1)

    def certainty(scale: float) -> Tensor:
        return (scale * logits).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).sum(dim=(1, 2)).exp()

    scale = next(1.25**n for n in range(100) if certainty(1.25**n).max() >= CERTAINTY[work.peaked])
    generator.lm_head.weight.data *= scale
    if work.peaked:
        order = certainty(scale).argsort(descending=True)
        passages.ids, passages.mask = passages.ids[:, order], passages.mask[:, order]


@dataclass
class Pair:
    """Both models on the same weights and passages, and what is asked of them."""

    work: Work
    passages: Passages
    theirs: Any
    ours: Any

    def reference(self) -> Tensor:
        # RAG-Token there takes no notice of max_new_tokens.
        work = self.work
        length = {"max_length": work.tokens + 1, "num_beams": work.beams, "do_sample": False}
        return self.theirs.generate(input_ids=self.passages.questions, n_docs=work.k, **length)

    def ragstone(self, **options: Any) -> Any:
        work = self.work
        return self.ours.generate(
            input_ids=self.passages.questions,
            n_docs=work.k,
            num_beams=work.beams,
            max_new_tokens=work.tokens,
            do_sample=False,
            **options,
        )


def build(work: Work, options: Any) -> Pair:
    question_encoder, generator = parts(options.generator, options.tiny, options.seed)
    passages = Passages(work, generator, options.tiny, options.seed)
    names = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question_encoder.config,
        generator.config,
        n_docs=work.k,
        decoder_start_token_id=generator.config.decoder_start_token_id,
        max_combined_length=passages.width,
    )
    if config.generator.model_type == "t5":
        config.bos_token_id = generator.config.vocab_size  # no token: its losses ask for one, which T5 has not
    theirs = getattr(transformers, names[work.method])(config, question_encoder, generator).eval()
    ours = getattr(ragstone, names[work.method]).from_pretrained_question_encoder_generator(
        question_encoder_model=question_encoder, generator_model=generator, n_docs=work.k
    )
    teach(generator, passages, work, options.seed)  # now: a model that is put together draws new output weights
    if options.dtype == "default":
        ours = copy.deepcopy(ours)
        ragstone.pipeline._set_dtype(ours, None)
    for model in (theirs, ours):
        model.set_retriever(passages)
    return Pair(work, passages, theirs, ours)


# Matrix products


@dataclass(frozen=True)
class Shapes:
    """Multiplications and additions in matrix products, in units of 1e9."""

    width: int
    inner: int  # heads times their width
    ffn: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """The shapes of a BART, T5 or BERT config; a BERT is an encoder only."""
        if config.model_type == "t5":
            inner, layers = config.num_heads * config.d_kv, (config.num_layers, config.num_decoder_layers)
            return cls(config.d_model, inner, config.d_ff, *layers, config.vocab_size)
        if config.model_type == "bart":
            layers = config.encoder_layers, config.decoder_layers
            return cls(config.d_model, config.d_model, config.encoder_ffn_dim, *layers, config.vocab_size)
        return cls(config.hidden_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers, 0, 0)

    def encode(self, length: int) -> float:
        """A text of ``length`` tokens through the encoder."""
        token = 4 * self.width * self.inner + 2 * self.width * self.ffn + 2 * length * self.inner
        return 2e-9 * self.encoder_layers * length * token

    def cross(self, length: int) -> float:
        """Cross-attention's keys and values of an encoded text."""
        return 2e-9 * self.decoder_layers * length * 2 * self.width * self.inner

    def decode(self, first: int, last: int, length: int) -> float:
        """The tokens at positions ``first`` up to ``last`` (from 1) of one row, over an encoded text, with their logits."""
        count, seen = last - first + 1, sum(range(first, last + 1))
        token = 6 * self.width * self.inner + 2 * self.width * self.ffn + 2 * length * self.inner
        layer = count * token + 2 * self.inner * seen
        return 2e-9 * (self.decoder_layers * layer + count * self.width * self.vocabulary)


def gflops(pair: Pair, candidates: list[int]) -> tuple[float, float]:
    """Of the reference and of Ragstone; ``candidates`` holds the hypotheses of each question (RAG-Sequence)."""
    work, padded, n = pair.work, pair.passages.width, pair.work.tokens
    generator, question = Shapes.of(pair.theirs.generator.config), Shapes.of(pair.theirs.question_encoder.config)
    asked = question.encode(QUESTION_TOKENS)
    rows = work.batch * work.k
    theirs = work.batch * asked + rows * generator.encode(padded)
    theirs += rows * work.beams * (generator.cross(padded) + generator.decode(1, n, padded))
    ours = work.batch * asked
    for lengths in pair.passages.lengths:
        for length in lengths:  # the start token is read once for all beams
            ours += generator.encode(length) + generator.cross(length) + generator.decode(1, 1, length)
            ours += work.beams * generator.decode(2, n, length)
    for lengths, found in zip(pair.passages.lengths, candidates, strict=False):
        scored = generator.encode(padded) + generator.cross(padded) + generator.decode(1, n + 1, padded)
        theirs += found * (asked + work.k * scored)
        ours += found * sum(generator.decode(1, n, length) for length in lengths)
    return theirs, ours


@cache
def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOPs a second of a square matrix product: the best of a few."""
    a, b = torch.randn(2, size, size).to(dtype)
    return max(2e-9 * size**3 / seconds_of(lambda: a @ b)[0] for _ in range(8))


# Measuring


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(pair: Pair, runs: int) -> dict[str, Any]:
    """Both in turn: seconds, and the answers of the last run; a first run of Ragstone, not timed, gives the margins."""
    work = pair.work
    margins = margins_of(pair)
    seconds: dict[str, list[float]] = {"reference": [], "ragstone": []}
    for _ in range(runs):
        pair.passages.asked.clear()
        spent, expected = seconds_of(pair.reference)
        candidates = pair.passages.asked[1:]
        seconds["reference"].append(spent)
        spent, found = seconds_of(pair.ragstone)
        seconds["ragstone"].append(spent)
    same = [a == b for a, b in zip(plain(expected), plain(found), strict=True)]
    clear = [equal for equal, margin in zip(same, margins, strict=True) if margin > CLEAR]
    pad = pair.theirs.generator.config.pad_token_id
    theirs, ours = (median(seconds[side]) for side in seconds)
    counted = gflops(pair, candidates)
    dtype = pair.ours.generator.dtype
    return {
        **asdict(work),
        "dtype": str(dtype).removeprefix("torch."),
        "reference": theirs,
        "ragstone": ours,
        "ratio": median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "tokens_per_second": int((found[:, 1:] != pad).sum()) / ours,
        "gflops_reference": counted[0],
        "gflops_ragstone": counted[1],
        "share_reference": counted[0] / theirs / matrix_rate(torch.float32),
        "share_ragstone": counted[1] / ours / matrix_rate(dtype),
        "hypotheses": candidates,
        "equal": sum(same),
        "clear": len(clear),
        "clear_equal": sum(clear),
        "margins": margins,
        "seconds": seconds,
    }


def margins_of(pair: Pair) -> list[float]:
    """By how much each question's winner is ahead; of a greedy RAG-Token search the closest of its tokens."""
    if pair.work.method == "token" and pair.work.beams == 1:
        scores = pair.ragstone(return_dict_in_generate=True, output_scores=True).scores
        best = torch.stack(scores, dim=1).float().topk(2, dim=-1).values
        return (best[..., 0] - best[..., 1]).amin(dim=1).tolist()
    if pair.work.k * pair.work.beams == 1:
        return [math.inf] * pair.work.batch  # one passage, one hypothesis
    best = pair.ragstone(return_dict_in_generate=True, num_return_sequences=2).log_probs.view(-1, 2)
    return (best[:, 0] - best[:, 1]).tolist()


def plain(sequences: Tensor) -> list[list[int]]:
    """Sequences without what stands behind their end."""
    return [[token for token in row if token >= 4] for row in sequences.tolist()]


def works(options: Any) -> None:
    figures: list[dict[str, Any]] = []
    for name in options.works:
        pair = build(WORKS[name], options)
        figures.append({"work": name, **measure(pair, options.runs)})
        print(row(figures[-1]), file=sys.stderr, flush=True)
        least = min(figures[-1]["hypotheses"], default=math.inf)
        assert least >= WORKS[name].distinct, f"{name}: only {least} distinct hypotheses; take another seed"
    rates = {str(t).removeprefix("torch."): matrix_rate(t) for t in {torch.float32, pair.ours.generator.dtype}}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.json:
        setting = {"machine": describe(), "generator": options.generator, "runs": options.runs, "seed": options.seed}
        print(json.dumps({**setting, "gflops_per_second": rates, "peak_memory_gb": memory, "works": figures}))
        return
    size = "tiny" if options.tiny else "base"
    dtypes = f"float32 and {figures[0]['dtype']}"
    print(f"{describe()}\n{options.generator}-{size}, {dtypes}, {options.runs} runs, peak memory {memory:.1f} GB")
    print("matrix rate: " + ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    print("\n".join(map(row, figures)))
    print("\nSeconds are medians, × is the median of the pairwise ratios, shares are of the matrix rate.")


COLUMNS = [
    *("work", "reference s", "ragstone s", "×", "tokens/s", "reference GFLOPs", "ragstone GFLOPs"),
    *("reference share", "ragstone share", "hypotheses", "winners equal"),
]


def row(f: dict[str, Any]) -> str:
    """One line of the table."""
    found = ", ".join(map(str, f["hypotheses"]))
    winners = f"{f['equal']} of {f['batch']} (of which margin > {CLEAR:g}: {f['clear_equal']} of {f['clear']} equal)"
    cells = [f["work"], f"{f['reference']:.3f}", f"{f['ragstone']:.3f}", f"{f['ratio']:.1f}"]
    cells += [f"{f[name]:.1f}" for name in ("tokens_per_second", "gflops_reference", "gflops_ragstone")]
    cells += [f"{f[name]:.0%}" for name in ("share_reference", "share_ragstone")]
    return "| " + " | ".join([*cells, found, winners]) + " |"


def sweep(options: Any) -> None:
    """Both methods over the values of one quantity: a figure, and its numbers."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("A sweep draws a figure with matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    name, values = options.sweep, SWEEPS[options.sweep]
    figures: dict[str, list[dict[str, Any]]] = {"sequence": [], "token": []}
    for method, rows in figures.items():
        for value in values:
            rows.append(measure(build(replace(SWEPT, method=method, **{name: value}), options), options.runs))
            seconds = f"{rows[-1]['reference']:.3f} s and {rows[-1]['ragstone']:.3f} s"
            print(f"{method}, {name} = {value}: {seconds}, × {rows[-1]['ratio']:.1f}", file=sys.stderr, flush=True)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (method, rows) in zip(panels, figures.items(), strict=True):
        for side, label in (("reference", "transformers, float32"), ("ragstone", f"Ragstone, {rows[0]['dtype']}")):
            panel.plot(range(len(values)), [f[side] for f in rows], marker="o", label=label)
        for n, f in enumerate(rows):
            at = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            panel.annotate(f"{f['ratio']:.1f}×", (n, f["ragstone"]), **at)
        panel.set(title=f"RAG-{method.capitalize()}", yscale="log", xlabel={"k": "K"}.get(name, name))
        panel.set_xticks(range(len(values)), map(str, values))
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    fixed = ", ".join(f"{key} = {getattr(SWEPT, key)}" for key in (*SWEEPS, "tokens") if key != name)
    figure.suptitle(f"{options.generator}, {fixed}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"decoding-{name}.svg"
    figure.savefig(path)
    print(json.dumps({"machine": describe(), "figure": str(path), **figures}) if options.json else path)


# The local default


def ask(options: Any) -> None:
    """Seconds of questions asked with cold and with cached passages, and of one prompt with all passages."""
    texts = [json.loads(line)["question"] for line in options.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(texts)
    first, *texts = texts[: options.limit + 1]
    base = ragstone.KnowledgeBase.open(options.kb)
    figures: dict[str, Any] = {"machine": describe(), "questions": len(texts)}
    for method in ("token", "sequence"):
        rag = ragstone.RagPipeline.from_pretrained("local", knowledge_base=base, method=method)
        figures["dtype"] = str(rag.model.generator.dtype).removeprefix("torch.")
        seconds: dict[str, list[float]] = {"cold": [], "cached": [], "one prompt": []}
        tokens: dict[str, list[int]] = {"ragstone": [], "one prompt": []}
        for n, text in enumerate([first, *texts]):  # the first is for warming up
            if hasattr(rag, "clear_cache"):
                rag.clear_cache()
            cold, answer = seconds_of(lambda: rag(text, k=5, max_new_tokens=16))  # noqa: B023
            cached, _ = seconds_of(lambda: rag(text, k=5, max_new_tokens=16))  # noqa: B023
            alone, written = seconds_of(lambda: one_prompt(rag, base, text))  # noqa: B023
            if n:
                for name, spent in zip(seconds, (cold, cached, alone), strict=True):
                    seconds[name].append(spent)
                tokens["ragstone"].append(len(answer.tokens))
                tokens["one prompt"].append(written)
        figures[method] = {name: median(spent) for name, spent in seconds.items()}
        figures[method] |= {f"tokens, {name}": sum(counts) / len(counts) for name, counts in tokens.items()}
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{figures['machine']}\n{len(texts)} questions, K = 5, {figures['dtype']}, median seconds\n")
    print("| | " + " | ".join(figures["token"]) + " |\n" + "|---" * (len(figures["token"]) + 1) + "|")
    for method in ("token", "sequence"):
        print(f"| {method} | " + " | ".join(f"{value:.3f}" for value in figures[method].values()) + " |")


def one_prompt(rag: Any, base: Any, question: str) -> int:
    """Search, then transformers' own greedy search on one prompt with all passages: the number of new tokens."""
    form, tokenizer, generator = rag.model.config, rag.tokenizer.generator, rag.model.generator
    hits = base.search([question], k=5)[0]
    passages = "\n\n".join(f"{hit.passage.title}\n{hit.passage.text}" for hit in hits)
    messages = [
        {"role": "system", "content": form.prompt_system},
        {"role": "user", "content": passages + form.prompt_question.replace("{question}", question)},
    ]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = generator.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return out.shape[1] - inputs["input_ids"].shape[1]


if __name__ == "__main__":
    main()
