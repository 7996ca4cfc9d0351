"""A question encoder that was damaged on purpose learns to find passages again, from answers alone.

    python benchmarks/training/recover.py --kb KB --questions train.jsonl --dev-kb DEV_KB --dev dev.jsonl --model MODEL

The last layer of the question encoder is drawn anew. Then the question encoder alone is trained on the marginal likelihood
of the answers: no gold passage is shown. recall@5 is measured on the gold passages of the dev questions, for the encoder as
it was, damaged, and trained; a frozen question encoder (the paper's ablation, §4.5) stays at the second figure whatever the
generator learns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from ragstone import KnowledgeBase, RagPipeline
from ragstone.cli.console import quiet_libraries
from ragstone.metrics import recall_at_k
from ragstone.questions import Question, read_questions
from ragstone.training import RagTrainer, TrainingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--dev-kb", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--model", default="local")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--limit", type=int, default=1000, help="dev questions")
    options = parser.parse_args()
    quiet_libraries()
    print(describe())
    print("| seed | recall@5 undamaged | damaged, and with a frozen question encoder | trained on answers | seconds |")
    print("|---|---|---|---|---|")
    for seed in options.seeds:
        print(row(seed, options), flush=True)


def row(seed: int, options: argparse.Namespace) -> str:
    base, dev_base = KnowledgeBase.open(options.kb), KnowledgeBase.open(options.dev_kb)
    dev = read_questions(options.dev, limit=options.limit, seed=0)
    rag = RagPipeline.from_pretrained(options.model, knowledge_base=base, dtype="float32", method="sequence")
    recalls = [recall(rag, dev_base, dev)]
    damage(rag.model.question_encoder, seed)
    recalls.append(recall(rag, dev_base, dev))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.steps // 10,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10,
            seed=seed,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        )
        RagTrainer(
            rag.model,
            arguments,
            tokenizer=rag.tokenizer,
            retriever=rag.retriever,
            questions=read_questions(options.questions),
            options=TrainingOptions(k=options.k, train_generator=False, max_target_length=24),
        ).train()
    recalls.append(recall(rag, dev_base, dev))
    cells = " | ".join(f"{value:.3f}" for value in recalls)
    return f"| {seed} | {cells} | {time.perf_counter() - start:.0f} |"


@torch.no_grad()
def recall(rag: RagPipeline, base: KnowledgeBase, questions: list[Question]) -> float:
    """recall@5 of the gold passages under the current question encoder."""
    rag.model.eval()
    found = []
    for start in range(0, len(questions), 64):
        ids, mask = rag.retriever.tokenize_questions([q.question for q in questions[start : start + 64]])
        vectors = (
            rag.model.rag.encode_questions(ids.to(rag.model.device), mask.to(rag.model.device)).float().cpu().numpy()
        )
        found += base.search(vectors=vectors, k=5)
    ids = [[hit.passage.id for hit in hits] for hits in found]
    return sum(recall_at_k(row, q.positive_ids, 5) for row, q in zip(ids, questions, strict=True)) / len(questions)


@torch.no_grad()
def damage(encoder: Any, seed: int) -> None:
    """Draw the last layer anew."""
    torch.manual_seed(seed)
    for module in encoder.encoder.layer[-1].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(std=encoder.config.initializer_range)
            module.bias.zero_()


if __name__ == "__main__":
    main()
