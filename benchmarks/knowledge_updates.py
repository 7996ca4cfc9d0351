"""Upsert and delete of 1,000 passages in a large knowledge base, until durable and visible to another reader.

    python benchmarks/knowledge_updates.py [--passages 1000000] [--width 768] [--batch 1000] [--runs 5] [--folder DIR]

Vectors of low intrinsic dimension with varying norms. An operation is timed from the call until a handle that was open
before, as one of another process would be, has been refreshed and answers by it: an upserted passage is found first by its
own vector and by its words, a deleted one is found by neither. The goal is 2 s each. The base in DIR is made once and
kept; without it, a temporary one is made.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from machine import describe

from ragstone.knowledge import KnowledgeBase, Passage
from ragstone.knowledge.storage import passage_table

GOAL = 2.0
BLOCK = 10_000
PLANE = 32  # intrinsic dimensions


def vectors(count: int, width: int, random: np.random.Generator) -> np.ndarray:
    plane = np.random.default_rng(99).standard_normal((PLANE, width), dtype=np.float32)
    made = random.standard_normal((count, PLANE), dtype=np.float32) @ plane
    made += 0.05 * random.standard_normal((count, width), dtype=np.float32)
    made *= random.uniform(0.5, 2, (count, 1)).astype(np.float32)
    return made


def text(place: int, turn: int) -> str:
    words = np.random.default_rng((place, turn)).integers(0, 50_000, 20)
    return f"marker{turn} " + " ".join(f"word{word}" for word in words)


def build(folder: Path, count: int, width: int) -> KnowledgeBase:
    """Make a base of ``count`` passages, or open the one that is there."""
    if KnowledgeBase.exists(folder):
        return KnowledgeBase.open(folder)
    random = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, count, BLOCK):
            places = range(start, min(start + BLOCK, count))
            passages = [Passage(f"passage-{place}", text=text(place, 0)) for place in places]
            yield from passage_table(passages, vectors(len(passages), width, random)).to_batches()

    kb = KnowledgeBase.create(folder, encoder=None, width=width)
    with kb._writing() as snapshot:
        dataset = snapshot.store._dataset
        dataset.insert(pa.RecordBatchReader.from_batches(dataset.schema, batches()))
        snapshot.store.index_words(all_rows=True)
    return kb


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def check(right: bool, what: str) -> None:
    if not right:
        sys.exit(f"wrong answer: {what}")


def measure(kb: KnowledgeBase, passages: int, batch: int, runs: int) -> dict[str, list[float]]:
    reader = KnowledgeBase.open(kb.path)
    probe = vectors(1, kb.width, np.random.default_rng(1))
    reader.search(vectors=probe)  # its codes are loaded, or made
    seconds: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> float:
        took = timed(work)
        seconds.setdefault(name, []).append(took)
        return took

    for turn in range(kb.version, kb.version + runs):
        random = np.random.default_rng(turn)
        places = random.choice(passages, batch, replace=False).tolist()
        changed = [Passage(f"passage-{place}", text=text(place, turn)) for place in places]
        ids = [passage.id for passage in changed]
        made = vectors(batch, kb.width, random)
        made[0] *= 10 * np.sqrt(PLANE * kb.width) / np.linalg.norm(made[0])  # the longest by far

        def show(count: int, turn: int = turn, first: str = ids[0], question: np.ndarray = made[0]) -> None:
            reader.refresh()
            (best,) = reader.search(vectors=question, k=1)
            check((best.passage.id == first) == (count > 0), f"{best.passage.id} is the best")
            found = len(reader.search(f"marker{turn}", k=batch, search="keyword"))
            check(found == count, f"{found} passages have the words, not {count}")

        for name, work, count in (
            ("upsert", partial(kb.upsert, changed, made), batch),
            ("delete", partial(kb.delete, ids), 0),
            ("add", partial(kb.add, changed, made), batch),
        ):
            took = note(f"{name}: durable", work)
            seconds.setdefault(f"{name}: durable and visible", []).append(took + timed(partial(show, count)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        kb = build(arguments.folder or Path(work) / "kb", arguments.passages, arguments.width)
        seconds = measure(kb, arguments.passages, arguments.batch, arguments.runs)
        report = kb.compact(timedelta())
    print(f"{arguments.passages:,} passages of width {arguments.width}, {arguments.batch:,} at once. {describe()}\n")
    print("| operation | median | longest | goal |\n|---|---|---|---|")
    for name, times in seconds.items():
        goal = f"{GOAL:g} s" if name.endswith("visible") else ""
        print(f"| {name} | {statistics.median(times):.2f} s | {max(times):.2f} s | {goal} |")
    size = f"{report.bytes_before / 1e9:.2f} to {report.bytes_after / 1e9:.2f} GB"
    print(f"| compact ({size}) | {report.seconds:.1f} s | | |\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"Peak memory of the process: {peak / 1e9:.2f} GB.")
    missed = [name for name, times in seconds.items() if name.endswith("visible") and statistics.median(times) > GOAL]
    sys.exit(f"slower than {GOAL:g} s: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
