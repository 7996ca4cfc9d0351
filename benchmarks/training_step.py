"""A training step of Ragstone and of transformers' own RAG classes: the same weights and batch, time and peak memory.

    python benchmarks/training_step.py [--method token|sequence …] [--runs N] [--json]

A step is retrieval (a lookup here), forward pass and backward pass, dropout on, gradients freed before it; no optimiser.
Weights are random, of the shapes of DPR (BERT-base) and BART-base; 4 questions with 5 contexts of 140 to 160 random tokens
each, which the reference gets padded to 300 as its own retriever pads them, and targets of 16 tokens. The reference gets the
start token in front of its labels and as decoder input, without which its loss leaves the first label out; both losses,
dropout off, must then be equal. Time: all sides in turn in one process, medians of ``--runs``, ratios by pairs. Memory: each
side in a process of its own, in which the kernel's high-water mark of resident memory is set back once model and batch are
there: the peak of two steps less what was resident then, so that gradients count and weights do not (Linux only). ``--tiny``
tries everything out in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from decoding import OURS, Passages, Work
from machine import describe
from torch import Tensor

from ragstone.cli.console import quiet_libraries

THEIRS = {"sequence": transformers.RagSequenceForGeneration, "token": transformers.RagTokenForGeneration}
# Ragstone's by dtype (bfloat16 is autocast); checkpointed: activations are computed again for their gradient.
SIDES = ("reference", "float32", "bfloat16", "bfloat16, checkpointed")
BATCH, PASSAGES, TOKENS = 4, 5, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny models and contexts")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    quiet_libraries()
    if options.memory_of:
        print(json.dumps(memory(Step(options.method[0], options.memory_of, options))))
        return
    figures = [figure for method in options.method for figure in measure(method, options)]
    setting = {"runs": options.runs, "seed": options.seed, "tiny": options.tiny}
    setting |= {"batch": BATCH, "k": PASSAGES, "tokens": TOKENS}
    if options.json:
        print(json.dumps({"machine": describe(), **setting, "steps": figures}))
        return
    print(describe(), setting, "", sep="\n")
    print("| | seconds | of the reference's | peak memory MB, of which gradients | of the reference's | loss |")
    print("|---|---|---|---|---|---|")
    for f in figures:
        used = "| |" if f["peak"] is None else f"{f['peak']:.0f}, {f['gradients']:.0f} | {f['peak_ratio']:.2f} |"
        print(f"| RAG-{f['method']}, {f['side']} | {f['median']:.3f} | {f['ratio']:.2f} | {used} {f['loss']:.4f} |")


class Step:
    """One side: a model and its batch."""

    def __init__(self, method: str, side: str, options: Any, parts: Any = None) -> None:
        question_encoder, generator = self.parts = parts or new_parts(options.tiny, options.seed)
        self.reference, self.half = side == "reference", side.startswith("bfloat16")
        self.checkpointed = side.endswith("checkpointed")
        if self.reference:
            configs = question_encoder.config, generator.config
            more = dict(n_docs=PASSAGES, decoder_start_token_id=generator.config.decoder_start_token_id)
            config = transformers.RagConfig.from_question_encoder_generator_configs(*configs, **more)
            self.model = THEIRS[method](config, question_encoder, generator)
        else:
            self.model = OURS[method].from_pretrained_question_encoder_generator(
                question_encoder_model=question_encoder, generator_model=generator, n_docs=PASSAGES
            )
        work = Work(method, BATCH, PASSAGES, beams=1, tokens=TOKENS)
        passages = Passages(work, generator, options.tiny, options.seed, lengths=(140, 160))
        self.model.set_retriever(passages)
        make = torch.Generator().manual_seed(options.seed)
        labels = torch.randint(100, generator.config.vocab_size, (BATCH, TOKENS), generator=make)
        self.batch = dict(input_ids=passages.questions, labels=labels)
        if self.reference:
            start = labels.new_full((BATCH, 1), generator.config.decoder_start_token_id)
            shifted = torch.cat([start, labels], dim=1)
            mask = torch.ones_like(passages.questions)
            self.batch |= dict(attention_mask=mask, labels=shifted, decoder_input_ids=shifted)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext():
            return self.model(**self.batch).loss.mean()

    def __call__(self) -> float:
        """Seconds."""
        self.model.train().zero_grad()
        if self.checkpointed:  # all sides share their parts, so this is for one step
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        start = time.perf_counter()
        self.loss().backward()
        seconds = time.perf_counter() - start
        if self.checkpointed:
            self.model.gradient_checkpointing_disable()
        return seconds


def new_parts(tiny: bool, seed: int) -> tuple[Any, Any]:
    """Question encoder and generator of random weights; BART's output layer is its embeddings, as ever."""
    torch.manual_seed(seed)
    bert = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64) if tiny else {}
    layers, heads, ffn, width = (2, 2, 128, 64) if tiny else (6, 12, 3072, 768)
    sides = dict(layers=layers, attention_heads=heads, ffn_dim=ffn)
    shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    config = transformers.BartConfig(**shape, d_model=width, vocab_size=1000 if tiny else 50265)
    return (
        transformers.DPRQuestionEncoder(transformers.DPRConfig(**bert)),
        transformers.BartForConditionalGeneration(config),
    )


def measure(method: str, options: Any) -> list[dict[str, Any]]:
    """The figures of all sides."""
    peaks = {side: peak_of(method, side, options) for side in SIDES}
    parts = new_parts(options.tiny, options.seed)
    steps = {side: Step(method, side, options, parts) for side in SIDES}
    for step in steps.values():
        step.model.eval()
    with torch.no_grad():
        losses = {side: float(step.loss()) for side, step in steps.items()}
    assert abs(losses["float32"] / losses["reference"] - 1) < 1e-4, f"the losses differ: {losses}"
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    for run in range(options.runs + 1):
        for side, step in steps.items():
            seconds = step()
            if run:  # the first warms up
                spent[side].append(seconds)
    figures = []
    for side in SIDES:
        f: dict[str, Any] = {"method": method, "side": side, "loss": losses[side], "seconds": spent[side]}
        f["median"] = median(spent[side])
        f["ratio"] = median(ours / theirs for ours, theirs in zip(spent[side], spent["reference"], strict=True))
        f |= peaks[side] or dict(peak=None, gradients=None)
        f["peak_ratio"] = f["peak"] / peaks["reference"]["peak"] if peaks[side] else None
        figures.append(f)
    return figures


def peak_of(method: str, side: str, options: Any) -> dict[str, float] | None:
    """What :func:`memory` finds in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--memory-of", side, "--seed", str(options.seed)]
    command += ["--tiny"] if options.tiny else []
    command += ["--threads", str(options.threads)] if options.threads else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def memory(step: Step) -> dict[str, float] | None:
    """MB: the peak of two steps above what model and batch take, and the part of it that gradients are."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def resident(name: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 1e3

    gc.collect()
    reset.write_text("5")  # the high-water mark of resident memory, see proc(5)
    before = resident("VmRSS:")
    step(), step()
    grads = (p.grad for p in step.model.parameters() if p.grad is not None)
    return {"peak": resident("VmHWM:") - before, "gradients": sum(g.numel() * g.element_size() for g in grads) / 1e6}


if __name__ == "__main__":
    main()
