"""Passages encoded per second: Ragstone against plain sentence-transformers, in float32 and in the default dtype.

    python benchmarks/encoding.py [--passages FILE.jsonl] [--limit 1000] [--encoder local] [--runs 5] [--threads N]

The same model, threads and passages, in one process. After one untimed pass over a part of the passages the three take
turns, so that whatever else the machine does falls on all of them alike; medians are reported. FILE has one object a
line with `title` and `text`; by default the built-in passages are repeated. The vectors are compared, too: the least
cosine to those of sentence-transformers is in the last column.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import sentence_transformers
import torch
import transformers

from ragstone import local
from ragstone.encoders import load_encoder
from ragstone.knowledge.loose import dummy_passages


def read_passages(path: Path | None, limit: int) -> list[tuple[str, str]]:
    if path is None:
        built_in = itertools.cycle((passage.title, passage.text) for passage in dummy_passages())
        return list(itertools.islice(built_in, limit))
    with path.open(encoding="utf-8") as lines:
        rows = (json.loads(line) for line in itertools.islice(lines, limit))
        return [(row["title"], row["text"]) for row in rows]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=Path)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--encoder", default=local.LOCAL)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    pairs = read_passages(arguments.passages, arguments.limit)
    texts = [f"{title}\n{text}" for title, text in pairs]
    folder = local.resolve(arguments.encoder, "encoder")
    reference = sentence_transformers.SentenceTransformer(folder, device="cpu")
    exact = load_encoder(arguments.encoder, device="cpu", dtype="float32")
    default = load_encoder(arguments.encoder, device="cpu")
    default_name = f"ragstone, default ({str(default.dtype).removeprefix('torch.')})"
    encode: dict[str, Callable[[int | None], np.ndarray]] = {
        "sentence-transformers": lambda n: reference.encode(texts[:n], normalize_embeddings=exact.spec.normalize),
        "ragstone, float32": lambda n: exact.encode_passages(pairs[:n]),
        default_name: lambda n: default.encode_passages(pairs[:n]),
    }
    for run in encode.values():
        run(64)
    seconds: dict[str, list[float]] = {name: [] for name in encode}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(arguments.runs):
        for name, run in encode.items():
            start = time.perf_counter()
            vectors[name] = run(None)
            seconds[name].append(time.perf_counter() - start)

    baseline = vectors["sentence-transformers"]
    rows = {}
    for name, times in seconds.items():
        other = vectors[name]
        cosine = (other * baseline).sum(1) / np.linalg.norm(other, axis=1) / np.linalg.norm(baseline, axis=1)
        # Each run against the baseline's run just before it: what slows the machine for a while falls on both.
        ratios = [base / own for base, own in zip(seconds["sentence-transformers"], times, strict=True)]
        rows[name] = {
            "passages_per_second": len(pairs) / statistics.median(times),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "least_cosine": float(cosine.min()),
        }
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentence-transformers": sentence_transformers.__version__,
        "encoder": arguments.encoder,
        "passages": len(pairs),
        "runs": arguments.runs,
    }
    if arguments.json:
        print(json.dumps(machine | {"results": rows}, indent=2))
        return
    print(" · ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'median':34}{'passages/s':>12}{'ratio':>8}{'least':>8}{'least cosine':>14}")
    for name, row in rows.items():
        rate, ratio, least, cosine = row.values()
        print(f"{name:34}{rate:12.1f}{ratio:8.2f}{least:8.2f}{cosine:14.6f}")


if __name__ == "__main__":
    main()
