"""Models on the same questions, by method, search and K: a table, and every prediction in a file.

    python benchmarks/training/matrix.py --kb KB --questions questions.jsonl --out FOLDER --limit 500 --seed 0 \\
        --models local-untrained local [--methods token sequence] [--searches dense keyword hybrid] [-k 1 3 5 10 20] \\
        [--whole]

Each model answers with every method and search at K = 5, and with the first method and search at every other K (``--whole``:
every method and search at every K), and at K = 1 with the gold passage alone too, which shows what it reads where retrieval
cannot fail. All runs of a model share what it has read of the passages. A run whose file is in FOLDER is not repeated.
Against the first model's run of the same kind stands the p-value of a paired test of exact match.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from ragstone import KnowledgeBase, RagPipeline
from ragstone.cli.console import quiet_libraries
from ragstone.evaluation import compare, evaluate, read_predictions, summarize, write_predictions
from ragstone.generators import PromptStore
from ragstone.questions import Question, read_questions

K = 5
GOLD = "gold passage"
COLUMNS = ("exact_match", "f1", "correct_where_found", "reading_errors", "retrieval_errors", "calibration_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", choices=["token", "sequence"], default=["token", "sequence"])
    parser.add_argument("--searches", nargs="+", default=["dense", "keyword", "hybrid"])
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3, K, 10, 20])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--memory", type=float, default=8, help="GB for what is kept of passages")
    options = parser.parse_args()
    quiet_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    questions = read_questions(options.questions, limit=options.limit, seed=options.seed)
    print(describe())
    print(f"| {len(questions)} questions | search | K | recall@K | {' | '.join(COLUMNS)} | p | s a question |")
    print("|" + "---|" * (len(COLUMNS) + 6))
    for model in options.models:
        rag = None
        for method in options.methods:
            for search, k in runs(method, options, gold=all(question.positive_ids for question in questions)):
                file = options.out / f"{Path(model).name}.{method}.{search.replace(' ', '-')}.{k}.jsonl"
                seconds = 0.0
                if not file.exists():
                    if rag is None or rag.method != method:
                        rag = load(model, method, rag, options)
                    seconds = answer(rag, questions, search, k, file, options)
                print(row(model, method, search, k, file, seconds / len(questions), options), flush=True)


def runs(method: str, options: argparse.Namespace, *, gold: bool) -> list[tuple[str, int]]:
    first = method == options.methods[0]
    elsewhere = options.searches if options.whole else options.searches[:1] if first else []
    return [
        *([(GOLD, 1)] if gold and first and 1 in options.k else []),
        *((search, K) for search in options.searches if K in options.k),
        *((search, k) for search in elsewhere for k in options.k if k != K),
    ]


def load(model: str, method: str, before: RagPipeline | None, options: argparse.Namespace) -> RagPipeline:
    """The model; what ``before``, the same with another method, has read of the passages is kept."""
    base = KnowledgeBase.open(options.kb)
    if before is not None:
        from ragstone import RagSequenceForGeneration, RagTokenForGeneration

        kind = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}[method]
        other = kind(before.model.config, before.model.question_encoder, before.model.generator)
        other.rag.prompt_store = before.model.rag.prompt_store
        return RagPipeline(other.eval(), before.tokenizer, base)
    rag = RagPipeline.from_pretrained(model, knowledge_base=base, method=method)
    if rag.model.device.type == "cpu":  # a GPU reads passages faster than it fetches what it has read
        rag.model.rag.prompt_store = PromptStore(int(options.memory * 1e9))
    return rag


def answer(
    rag: RagPipeline, questions: list[Question], search: str, k: int, file: Path, options: argparse.Namespace
) -> float:
    """Write the predictions; return the seconds they took."""
    start = time.perf_counter()
    retrieval = {"search": search}
    if search == GOLD:
        retrieval = {"run": {q.id: [(q.positive_ids[0], 1.0)] for q in questions}}
    found = evaluate(rag, questions, k=k, max_new_tokens=options.max_new_tokens, **retrieval)
    seconds = time.perf_counter() - start
    partial = file.with_suffix(".partial")
    write_predictions(partial, found.predictions)
    partial.replace(file)
    return seconds


def row(model: str, method: str, search: str, k: int, file: Path, seconds: float, options: argparse.Namespace) -> str:
    found = summarize(read_predictions(file), seed=options.seed)
    low, high = found.intervals.get("exact_match", (float("nan"),) * 2)
    values = [f"{found.summary.get(name, float('nan')):.3f}" for name in COLUMNS]
    values[0] += f" ({low:.3f} – {high:.3f})"
    first = file.with_name(file.name.replace(Path(model).name, Path(options.models[0]).name, 1))
    p = ""
    if first != file and first.exists():
        p = f"{compare(found.predictions, read_predictions(first))['exact_match'].p_value:.4f}"
    recall = f"{found.summary[f'recall_at_{k}']:.3f}"
    timed = f"{seconds:.2f}" if seconds else ""
    return f"| {model}, RAG-{method.title()} | {search} | {k} | {recall} | {' | '.join(values)} | {p} | {timed} |"


if __name__ == "__main__":
    main()
