"""What indexing costs besides encoding: passages per second of `add_documents` against the encoder's own.

    python benchmarks/indexing.py [--passages FILE.jsonl] [--limit 1000] [--encoder local] [--runs 3] [--workers N]

The same passages, encoder and threads, in one process; the two take turns, so that whatever else the machine does falls
on both, and medians are reported. Indexing reads the file, splits, hashes, encodes, commits and brings the keyword index
up to date, in a new base each time. FILE has one object a line with `title` and `text`; by default the built-in
passages are repeated. Exits with 1 if indexing is below 90 % of the encoder's rate. With --workers a third column says
how quick so many processes are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe

from ragstone.encoders import load_encoder
from ragstone.knowledge import KnowledgeBase, iter_documents
from ragstone.knowledge.documents import document_passages
from ragstone.knowledge.loose import dummy_passages
from ragstone.knowledge.passages import SplitOptions

GOAL = 0.9


def write_passages(source: Path | None, limit: int, target: Path) -> None:
    """Copy ``limit`` records to ``target``; the built-in passages if there is no source."""
    with target.open("w", encoding="utf-8") as file:
        if source is not None:
            with source.open(encoding="utf-8") as lines:
                file.writelines(itertools.islice(lines, limit))
            return
        for n, passage in enumerate(itertools.islice(itertools.cycle(dummy_passages()), limit)):
            file.write(json.dumps({"id": str(n), "title": passage.title, "text": passage.text}) + "\n")


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--encoder", default="local")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    encoder = load_encoder(options.encoder, device=options.device)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "passages.jsonl")
        write_passages(options.passages, options.limit, file)
        documents = list(iter_documents(file))
        passages = [p for document in documents for p in document_passages(document, SplitOptions())]
        pairs = [(passage.title, passage.text) for passage in passages]
        count = itertools.count()

        def index(workers: int) -> None:
            base = KnowledgeBase.create(Path(work, f"kb{next(count)}"), encoder=encoder)
            report = base.add_documents(file, workers=workers)
            if (report.passages, len(base)) != (len(pairs), len(pairs)):
                raise SystemExit(f"{report.passages} passages were stored, not {len(pairs)}")

        ways: dict[str, Callable[[], Any]] = {
            "encoder": lambda: encoder.encode_passages(pairs),
            "index": lambda: index(1),
        }
        if options.workers > 1:
            ways[f"index, {options.workers} workers"] = lambda: index(options.workers)
        encoder.encode_passages(pairs[:64])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, run in ways.items():
                seconds[name].append(timed(run))
    print(f"{describe()}; {len(pairs):,} passages, encoder {options.encoder} on {encoder.device} in {encoder.dtype}")
    print("\n| | passages/s | share of the encoder's rate |\n|---|---|---|")
    shares = {}
    for name, times in seconds.items():
        # Each run against the encoder's run just before it.
        shares[name] = statistics.median(base / own for base, own in zip(seconds["encoder"], times, strict=True))
        print(f"| {name} | {len(pairs) / statistics.median(times):,.1f} | {shares[name]:.3f} |")
    sys.exit(shares["index"] < GOAL)


if __name__ == "__main__":
    main()
