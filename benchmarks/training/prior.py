"""τ and β of the prior, fitted to gold passages among those that hybrid search finds, and how good each kind of prior is.

    python benchmarks/training/prior.py --kb KB --questions train.jsonl --limit 1500 --dev-kb DEV_KB --dev dev.jsonl

The prior of the K passages is a softmax of τ·(q·d), of β·BM25, or of both; τ and β are those under which the gold passages
of the training questions are the most probable. On the dev questions whose gold passage is among the K: how often it has the
highest prior, and −log of its prior.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from ragstone import KnowledgeBase
from ragstone.cli.console import quiet_libraries
from ragstone.questions import Question, read_questions

KINDS = {"τ·(q·d)": [0], "β·BM25": [1], "τ·(q·d) + β·BM25": [0, 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--dev-kb", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--dev-limit", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-k", type=int, default=5)
    options = parser.parse_args()
    quiet_libraries()
    print(describe())
    read = {"seed": options.seed}
    train = scores(options.kb, read_questions(options.questions, limit=options.limit, **read), options.k)
    dev = scores(options.dev_kb, read_questions(options.dev, limit=options.dev_limit, **read), options.k)
    print(f"| {len(dev[0])} questions | fitted | gold passage first | −log prior |\n|---|---|---|---|")
    for name, features in KINDS.items():
        weights = fit(train[0][..., features], train[1])
        logits = dev[0][..., features] @ weights
        first = dev[1].gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()
        fitted = ", ".join(f"{weight:.3g}" for weight in weights.tolist())
        print(f"| {name} | {fitted} | {first:.3f} | {loss(logits, dev[1]):.3f} |", flush=True)


def scores(folder: Path, questions: list[Question], k: int) -> tuple[Tensor, Tensor]:
    """q·d and BM25 (N, K, 2) of what hybrid search finds, and which of it is gold (N, K), where any is."""
    base = KnowledgeBase.open(folder)
    texts = [question.question for question in questions]
    vectors = base.encoder.encode_questions(texts)
    found = base.search(texts, vectors=vectors, k=k, search="hybrid")
    values, gold = [], []
    for question, vector, hits in zip(questions, vectors, found, strict=True):
        right = [hit.passage.id in question.positive_ids for hit in hits]
        if any(right) and len(hits) == k:
            values.append([[float(hit.vector @ vector), hit.keyword_score] for hit in hits])
            gold.append(right)
    return torch.tensor(values), torch.tensor(gold)


def fit(values: Tensor, gold: Tensor) -> Tensor:
    """The weights (F,) of values (N, K, F) under which the gold passages are the most probable."""
    size = values.std(dim=(0, 1))
    weights = torch.zeros(values.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(values / size @ weights, gold)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach() / size


def loss(logits: Tensor, gold: Tensor) -> Tensor:
    return -logits.log_softmax(dim=1).masked_fill(~gold, -torch.inf).logsumexp(dim=1).mean()


if __name__ == "__main__":
    main()
