"""Answers to real questions by the local default: what is found, what is read, and what it costs.

    python benchmarks/answers.py --passages passages.jsonl --questions questions.jsonl --kb /tmp/wiki18

Passages are indexed on the first run (JSONL with id, title, text), then ``--limit`` questions (JSONL with question and
answers), drawn with ``--seed``, are answered with K passages by both methods. The ceiling is the same generator given the
one best passage that holds an answer (best by q·d, over the whole knowledge base); questions that no passage answers count
as not answered there. Seconds are those of single questions, ``--timed`` of them. Prints a table, or JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

from ragstone import KnowledgeBase, Passage, RagPipeline
from ragstone.cli.console import quiet_libraries
from ragstone.metrics import contains, exact_match, f1, has_answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["token", "sequence"], choices=["token", "sequence"])
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    quiet_libraries()
    base, indexing = open_or_index(options.kb, options.passages)
    questions = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(questions)
    questions = questions[: options.limit]
    figures: dict[str, Any] = {"machine": describe(), "questions": len(questions), "k": options.k, **indexing}
    ceiling: dict[str, Any] | None = None
    for method in options.methods:
        rag = RagPipeline.from_pretrained("local", knowledge_base=base, method=method, dtype=options.dtype)
        figures["dtype"] = str(rag.model.generator.dtype)
        if ceiling is None:  # K = 1: both methods are the same model
            given = best_passages(rag, base, questions)
            ceiling = measure(rag, questions, given, options.timed, max_new_tokens=options.max_new_tokens)
            figures["ceiling"] = ceiling
        figures[method] = measure(
            rag, questions, None, options.timed, k=options.k, max_new_tokens=options.max_new_tokens
        )
        figures[method]["contains_over_ceiling"] = figures[method]["contains"] / max(ceiling["contains"], 1e-9)
    figures["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(figures) if options.json else table(figures))


def open_or_index(folder: Path, passages: Path) -> tuple[KnowledgeBase, dict[str, float]]:
    if KnowledgeBase.exists(folder):
        return KnowledgeBase.open(folder), {}
    base = KnowledgeBase.create(folder)
    report = base.add_documents([passages])
    return base, {"indexed_passages": report.passages, "indexing_seconds": report.seconds}


def best_passages(rag: RagPipeline, base: KnowledgeBase, questions: list[dict[str, Any]]) -> list[Passage | None]:
    """For each question the passage with the highest q·d of those that hold an answer, found by looking at all."""
    hits = base.search(["the"], k=len(base), search="exact")[0]
    passages, vectors = [hit.passage for hit in hits], np.stack([hit.vector for hit in hits])
    ids, mask = rag.retriever.tokenize_questions([q["question"] for q in questions])
    with torch.no_grad():
        asked = rag.model.rag.encode_questions(ids, mask).float().numpy()
    best: list[Passage | None] = []
    for question, scores in zip(questions, asked @ vectors.T, strict=True):
        order = np.argsort(-scores)
        answers = question["answers"]
        best.append(next((passages[i] for i in order if has_answer(passages[i].text, answers)), None))
    return best


def measure(
    rag: RagPipeline,
    questions: list[dict[str, Any]],
    given: list[Passage | None] | None,
    timed: int,
    **options: Any,
) -> dict[str, float]:
    """Average scores; ``given`` passages are read instead of retrieving, and a question with none is not answered."""
    asked = [n for n in range(len(questions)) if given is None or given[n] is not None]
    texts = [questions[n]["question"] for n in asked]
    own = None if given is None else [[given[n]] for n in asked]
    answers = rag(texts, passages=own, **options)
    rows = []
    for n, answer in zip(asked, answers, strict=True):
        wanted = questions[n]["answers"]
        row = {name: float(score(answer.text, wanted)) for name, score in SCORES.items()}
        row["hit"] = float(any(has_answer(e.passage.text, wanted) for e in answer.passages))
        rows.append({**row, "tokens": len(answer.tokens)})
    seconds = []
    for n, text in enumerate(texts[:timed]):
        start = time.perf_counter()
        rag(text, passages=None if own is None else own[n], **options)
        seconds.append(time.perf_counter() - start)
    count = {"tokens": len(rows)}
    figures = {name: sum(row[name] for row in rows) / count.get(name, len(questions)) for name in rows[0]}
    return {**figures, "seconds": float(np.median(seconds)), "slowest": max(seconds)}


SCORES = {"exact_match": exact_match, "f1": f1, "contains": contains}


def table(figures: dict[str, Any]) -> str:
    lines = [figures["machine"], f"{figures['questions']} questions, K = {figures['k']}, {figures['dtype']}, "]
    lines[-1] += f"peak memory {figures['peak_memory_gb']:.2f} GB"
    if "indexing_seconds" in figures:
        lines.append(f"indexed {figures['indexed_passages']:,} passages in {figures['indexing_seconds']:.0f} s")
    names = ["hit", "exact_match", "f1", "contains", "contains_over_ceiling", "tokens", "seconds", "slowest"]
    lines += ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in ("ceiling", "token", "sequence"):
        if row in figures:
            cells = (f"{figures[row][name]:.3f}" if name in figures[row] else "" for name in names)
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
