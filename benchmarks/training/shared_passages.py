"""A training step of "local" with adapters whose questions share passages: read once, and read for each question.

    python benchmarks/training/shared_passages.py --kb KB --questions questions.jsonl [--batch-size 16] [-k 2] [--steps 10]

Questions need gold passages, those of a passage side by side. Every process trains anew, one way after the other. Run it a
second time under another memory allocator (LD_PRELOAD=…/libjemalloc.so.2) to see what that is worth.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from ragstone.cli.training import slow_allocator

WAYS = ("shared", "apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(*measure(options))
        return
    print(describe())
    print("memory from " + ("glibc" if slow_allocator("cpu") else "another allocator than glibc's"))
    print(f"| K = {options.k} | s a step of {options.batch_size} | s a question | peak memory, MB |")
    print("|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        print(f"| {way} | {float(seconds):.2f} | {float(seconds) / options.batch_size:.3f} | {float(memory):,.0f} |")


def measure(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, the first left out, and the most memory that the process held."""
    from transformers import TrainerCallback, TrainingArguments

    from ragstone import KnowledgeBase, RagPipeline
    from ragstone.cli.console import quiet_libraries
    from ragstone.questions import read_questions
    from ragstone.training import RagTrainer, TrainingOptions

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

    quiet_libraries()
    base = KnowledgeBase.open(options.kb)
    rag = RagPipeline.from_pretrained("local-untrained", knowledge_base=base, dtype="float32")
    rag.model.rag.fast = options.way == "shared"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            bf16=True,
            use_cpu=True,
            max_steps=options.steps + 1,
            per_device_train_batch_size=options.batch_size,
            learning_rate=4e-4,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = RagTrainer(
            rag.model,
            arguments,
            tokenizer=rag.tokenizer,
            retriever=rag.retriever,
            questions=read_questions(options.questions),
            options=TrainingOptions(
                k=options.k, in_batch=True, decline_weight=1.0, lora_rank=16, question_encoder_lora_rank=4
            ),
            base_model="local-untrained",
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = (times[-1] - times[0]) / options.steps
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
