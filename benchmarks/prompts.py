"""Prompts for the local models as they come, compared on development questions.

    python benchmarks/prompts.py --questions questions.jsonl --kb /tmp/wiki18 [--limit 60] [--seed 1]

Each question is asked with the one best passage that holds an answer, so that reading alone is compared. The knowledge base
is the one that ``benchmarks/answers.py`` makes. ``"shipped"`` is ``ragstone.local.PROMPT``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from answers import best_passages, measure
from machine import describe

from ragstone import KnowledgeBase, RagPipeline, local
from ragstone.cli.console import quiet_libraries

SYSTEM = local.PROMPT["prompt_system"]
CANDIDATES: dict[str, dict[str, Any]] = {
    "the question alone": {},
    "told to be short": {"prompt_system": SYSTEM},
    "asked for a short answer": {
        "prompt_system": "Use the passage to answer the question in as few words as possible.",
        "prompt_question": "\n\nQuestion: {question}\nShort answer:",
    },
    "shipped": dict(local.PROMPT),
}
DEFAULT = {"prompt_system": "", "prompt_passage": "{passage}", "prompt_question": "\n\nQuestion: {question}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    quiet_libraries()
    base = KnowledgeBase.open(options.kb)
    rag = RagPipeline.from_pretrained(local.UNTRAINED, knowledge_base=base)
    questions = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines()]
    random.Random(options.seed).shuffle(questions)
    pairs = zip(questions, best_passages(rag, base, questions[: 2 * options.limit]), strict=False)
    answerable = [(question, passage) for question, passage in pairs if passage is not None][: options.limit]
    asked, given = [q for q, _ in answerable], [p for _, p in answerable]
    names = ("exact_match", "f1", "contains", "tokens")
    print(f"{describe()}\n{len(asked)} questions\n\n| prompt | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for name, prompt in CANDIDATES.items():
        for field, value in {**DEFAULT, **prompt}.items():
            setattr(rag.model.config, field, value)
        figures = measure(rag, asked, given, 1, max_new_tokens=16)
        print(f"| {name} | " + " | ".join(f"{figures[column]:.3f}" for column in names) + " |", flush=True)


if __name__ == "__main__":
    main()
