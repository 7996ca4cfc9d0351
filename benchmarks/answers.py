"""Answers to real questions by the local default: what is found, what is read, and what it costs.

    python benchmarks/answers.py --passages passages.jsonl --questions questions.jsonl --kb /tmp/wiki18

Passages are indexed on the first run (JSONL with id, title, text), then ``--limit`` questions (JSONL with question and
answers), drawn with ``--seed``, are answered with K passages by both methods. Two ceilings say what the same generator reads
from the one best passage that holds an answer (best by q·d): ``ceiling`` chooses it from the whole knowledge base,
``ceiling of the found`` from the K that were found, so that the first counts what retrieval missed and the second only what
reading K passages at once costs; a question without such a passage counts as not answered. Seconds are those of single
questions, ``--timed`` of them. Prints a row as it is done, then a table, or JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
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
    parser.add_argument("--model", default="local", help='"local-untrained": without the adapters')
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--search", default="dense", choices=["dense", "keyword", "hybrid"])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["token", "sequence"], choices=["token", "sequence"])
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--score-scale", type=float, default=None, help="τ, in place of the local models' own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    quiet_libraries()
    base, indexing = open_or_index(options.kb, options.passages)
    questions = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(questions)
    questions = questions[: options.limit]
    figures: dict[str, Any] = {"machine": describe(), "questions": len(questions), "k": options.k, **indexing}
    for method in options.methods:
        rag = RagPipeline.from_pretrained(options.model, knowledge_base=base, method=method, dtype=options.dtype)
        rag.model.config.score_scale = options.score_scale or rag.model.config.score_scale
        figures["dtype"], figures["score_scale"] = str(rag.model.generator.dtype), rag.model.config.tau
        if CEILINGS[0] not in figures:  # K = 1: both methods are the same model
            for name, given in zip(
                CEILINGS,
                (best_passages(rag, base, questions), best_of_the_found(base, questions, options.k, options.search)),
                strict=True,
            ):
                figures[name] = measure(rag, questions, given, options.timed, max_new_tokens=options.max_new_tokens)
                print(row(name, figures), file=sys.stderr, flush=True)
        how = {"k": options.k, "search": options.search, "max_new_tokens": options.max_new_tokens}
        found = measure(rag, questions, None, options.timed, **how)
        for name in CEILINGS:
            found[f"contains / {name}"] = found["contains"] / max(figures[name]["contains"], 1e-9)
        figures[method] = found
        print(row(method, figures), file=sys.stderr, flush=True)
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
        asked = (
            rag.model.rag.encode_questions(ids.to(rag.model.device), mask.to(rag.model.device)).float().cpu().numpy()
        )
    best: list[Passage | None] = []
    for question, scores in zip(questions, asked @ vectors.T, strict=True):
        order = np.argsort(-scores)
        answers = question["answers"]
        best.append(next((passages[i] for i in order if has_answer(passages[i].text, answers)), None))
    return best


def best_of_the_found(
    base: KnowledgeBase, questions: list[dict[str, Any]], k: int, search: Any
) -> list[Passage | None]:
    """For each question the first of its k hits that holds an answer."""
    hits = base.search([q["question"] for q in questions], k=k, search=search)
    return [
        next((hit.passage for hit in row if has_answer(hit.passage.text, q["answers"])), None)
        for q, row in zip(questions, hits, strict=True)
    ]


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
    scores = []
    for n, answer in zip(asked, answers, strict=True):
        wanted = questions[n]["answers"]
        score = {name: float(function(answer.text, wanted)) for name, function in SCORES.items()}
        score["hit"] = float(any(has_answer(e.passage.text, wanted) for e in answer.passages))
        scores.append({**score, "tokens": len(answer.tokens)})
    seconds = []
    for n, text in enumerate(texts[:timed]):
        start = time.perf_counter()
        rag(text, passages=None if own is None else own[n], **options)
        seconds.append(time.perf_counter() - start)
    count = {"tokens": len(scores)}
    figures = {name: sum(score[name] for score in scores) / count.get(name, len(questions)) for name in scores[0]}
    return {**figures, "seconds": float(np.median(seconds)), "slowest": max(seconds)}


SCORES = {"exact_match": exact_match, "f1": f1, "contains": contains}
CEILINGS = ("ceiling", "ceiling of the found")
COLUMNS = ["hit", *SCORES, *(f"contains / {name}" for name in CEILINGS), "tokens", "seconds", "slowest"]


def table(figures: dict[str, Any]) -> str:
    setting = (
        f"{figures['questions']} questions, K = {figures['k']}, τ = {figures['score_scale']:g}, {figures['dtype']}"
    )
    lines = [figures["machine"], f"{setting}, peak memory {figures['peak_memory_gb']:.2f} GB"]
    if "indexing_seconds" in figures:
        lines.append(f"indexed {figures['indexed_passages']:,} passages in {figures['indexing_seconds']:.0f} s")
    lines += ["", "| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [row(name, figures) for name in (*CEILINGS, "token", "sequence") if name in figures]
    return "\n".join(lines)


def row(name: str, figures: dict[str, Any]) -> str:
    """One line of the table."""
    cells = (f"{figures[name][column]:.3f}" if column in figures[name] else "" for column in COLUMNS)
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
