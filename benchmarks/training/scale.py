"""Which τ and β suit a model, and whether spans of passages do: its answers to the same questions; passages are read once.

    python benchmarks/training/scale.py --model MODEL --kb KB --questions questions.jsonl --search hybrid \\
        --scales 5 10 20 40 --keyword-scales 0 0.4 --limit 150 --not-among 500

prior.py fits both to gold passages; what the generator makes of them is another question. ``--not-among N`` leaves out the N
questions that a measurement of N questions with the same seed takes, so that what is chosen here has not seen those.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from ragstone import KnowledgeBase, RagPipeline
from ragstone.cli.console import quiet_libraries
from ragstone.evaluation import evaluate
from ragstone.generators import PromptStore
from ragstone.questions import read_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--search", default="dense")
    parser.add_argument("--methods", nargs="+", choices=["token", "sequence"], default=["token", "sequence"])
    parser.add_argument("--scales", type=float, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--keyword-scales", type=float, nargs="+", default=[0.0])
    parser.add_argument("--answers", nargs="+", choices=["free", "extractive"], default=["free", "extractive"])
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--not-among", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    options = parser.parse_args()
    quiet_libraries()
    measured = {q.id for q in read_questions(options.questions, limit=options.not_among, seed=options.seed)}
    drawn = read_questions(options.questions, limit=options.not_among + options.limit, seed=options.seed)
    questions = [question for question in drawn if question.id not in measured]
    print(describe())
    print(
        f"| {len(questions)} questions, K = {options.k}, {options.search} | τ | β | answers | exact match | F1 |\n"
        "|---|---|---|---|---|---|"
    )
    store, base = PromptStore(8 * 10**9), KnowledgeBase.open(options.kb)
    for method in options.methods:
        rag = RagPipeline.from_pretrained(options.model, knowledge_base=base, method=method)
        if rag.model.device.type == "cpu":  # a GPU reads passages faster than it fetches what it has read
            rag.model.rag.prompt_store = store
        for scale, words, kind in product(options.scales, options.keyword_scales, options.answers):
            rag.model.config.score_scale, rag.model.config.keyword_scale = scale, words
            settings = {"k": options.k, "search": options.search, "max_new_tokens": options.max_new_tokens}
            found = evaluate(rag, questions, **settings, extractive=kind == "extractive").summary
            values = f"{found['exact_match']:.3f} | {found['f1']:.3f}"
            print(f"| RAG-{method.title()} | {scale:g} | {words:g} | {kind} | {values} |", flush=True)


if __name__ == "__main__":
    main()
