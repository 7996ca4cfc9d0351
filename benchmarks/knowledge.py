"""The knowledge base at a million passages: search, batches, other engines, opening and building.

    python benchmarks/knowledge.py [--passages 1000000] [--width 768] [--works search batch compare open build]
                                   [--engines flat hnsw lance disk] [--threads 2] [--seed 0] [--work DIR] [--tiny]

Vectors are generated: 32 directions that carry most of what differs, noise in all, and lengths from 0.5 to 2, as texts'
vectors have. Each passage has 100 words, drawn by Zipf's law. Questions are other draws of the same kind. Everything is
compared with exact search by numpy. The base's files are read once before search is timed, so that the operating system
holds them if it has the room; "open" is timed as they are. Each work runs in a process of its own, so that its memory is
its own; memory is what the process holds beyond mapped files, sampled every 20 ms (`/proc`, so on Linux). "disk" is Ragstone
with 64 MB, and commits the index on disk that it uses then. A base in --work is used again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORKS = ("build", "search", "batch", "compare", "open")
NAMES = {"flat": "faiss Flat", "hnsw": "faiss HNSW", "lance": "Lance's scan", "disk": "ragstone, index on disk"}
ENGINES = (*NAMES,)
DIRECTIONS, NOISE, QUESTIONS, WORDS = 32, 0.3, 320, 100
BLOCK = 16_384
BATCH, BATCH_K, K = 64, 100, 10
SHORT_MEMORY = 64 << 20


# What is searched


def blocks(count: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """Vectors in blocks (n, width)."""
    directions = np.random.default_rng(99).standard_normal((DIRECTIONS, width), np.float32) / DIRECTIONS**0.5
    random = np.random.default_rng(seed)
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        block = random.standard_normal((n, DIRECTIONS), np.float32) @ directions
        block += NOISE * random.standard_normal((n, width), np.float32)
        yield block * (random.uniform(0.5, 2, (n, 1)).astype(np.float32) / width**0.5)


def write_vectors(path: Path, count: int, width: int, seed: int) -> None:
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    start = 0
    for block in blocks(count, width, seed):
        array[start : start + len(block)] = block
        start += len(block)
    array.flush()


def passages(count: int, seed: int) -> Iterator[Any]:
    from ragstone.knowledge import Passage

    random = np.random.default_rng(seed)
    share = 1 / np.arange(1, 200_001)
    words = np.array([f"w{i:x}" for i in range(len(share))])
    for start in range(0, count, BLOCK):
        drawn = words[
            np.searchsorted(np.cumsum(share / share.sum()), random.random((min(BLOCK, count - start), WORDS)))
        ]
        for place, row in enumerate(drawn.tolist(), start):
            yield Passage(f"p{place}", title=f"Title {place}", text=" ".join(row))


def truth(vectors: np.ndarray, questions: np.ndarray, k: int) -> np.ndarray:
    """The places (B, k) of the best by exact search."""
    best = np.empty((len(questions), 0), np.int64)
    scores = np.empty((len(questions), 0), np.float32)
    for start in range(0, len(vectors), BLOCK):
        block = np.asarray(vectors[start : start + BLOCK])
        scores = np.concatenate([scores, questions @ block.T], axis=1)
        best = np.concatenate([best, np.tile(np.arange(start, start + len(block)), (len(questions), 1))], axis=1)
        if scores.shape[1] > k:
            kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores, best = np.take_along_axis(scores, kept, 1), np.take_along_axis(best, kept, 1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(best, order, 1)


# What is measured, in a process of its own


class Memory:
    """The most memory that this process held beyond mapped files since the start, in bytes."""

    def __init__(self) -> None:
        self.start = self.most = held("RssAnon")
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, held("RssAnon"))

    def beyond_start(self) -> int:
        self._ended.set()
        return max(self.most, held("RssAnon")) - self.start


def held(kind: str) -> int:
    """Memory of this process in bytes: "RssAnon" its own, "RssFile" mapped files; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), 0)


Search = Callable[[np.ndarray, int], list[list[int]]]
"""Questions (B, D) and k in, the places of what is found out."""


def one_by_one(search: Search, questions: np.ndarray, best: np.ndarray) -> dict[str, float]:
    seconds, shares = [], []
    for question in questions[:20]:
        search(question[None], K)
    for question, expected in zip(questions, best, strict=True):
        started = time.perf_counter()
        (found,) = search(question[None], K)
        seconds.append(time.perf_counter() - started)
        shares.append(len({*found} & {*expected[:K].tolist()}) / min(K, len(expected)))
    low, high = np.percentile(seconds, [5, 95]) * 1000
    return {
        "median_ms": 1000 * statistics.median(seconds),
        "p5_ms": float(low),
        "p95_ms": float(high),
        "recall_at_10": statistics.mean(shares),
    }


def in_batches(search: Search, questions: np.ndarray, best: np.ndarray) -> dict[str, float]:
    rates, shares = [], []
    search(questions[:BATCH], BATCH_K)
    for start in range(0, len(questions) - BATCH + 1, BATCH):
        started = time.perf_counter()
        found = search(questions[start : start + BATCH], BATCH_K)
        rates.append(BATCH / (time.perf_counter() - started))
        for row, expected in zip(found, best[start : start + BATCH], strict=True):
            shares.append(len({*row} & {*expected.tolist()}) / len(expected))
    return {"queries_per_second": statistics.median(rates), "recall_at_100": statistics.mean(shares)}


def measured(search: Search, questions: np.ndarray, best: np.ndarray, memory: Memory) -> dict[str, float]:
    values = one_by_one(search, questions, best) | in_batches(search, questions, best)
    return {**values, "memory": memory.beyond_start()}


def read_files(folder: Path) -> None:
    """Read all files, so that what is timed is not the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def ragstone_search(base: Path, limit: int | None = None) -> Search:
    from ragstone.knowledge import KnowledgeBase

    read_files(base)
    kb = KnowledgeBase.open(base, memory=limit)
    kb.prepare()
    return lambda questions, k: [
        [int(hit.passage.id[1:]) for hit in hits] for hits in kb.search(vectors=questions, k=k)
    ]


def job_build(work: Path, seed: int) -> dict[str, float]:
    from ragstone.knowledge import KnowledgeBase

    vectors = np.load(work / "vectors.npy", mmap_mode="r")
    shutil.rmtree(work / "kb", ignore_errors=True)
    next(passages(1, seed))
    kb = KnowledgeBase.create(work / "kb", encoder=None, width=vectors.shape[1])
    memory, started = Memory(), time.perf_counter()
    kb.add(passages(len(vectors), seed), vectors=vectors)
    added = time.perf_counter()
    test = kb.prepare()
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "add_seconds": added - started,
        "prepare_seconds": ended - added,
        "memory": memory.beyond_start(),
        "self_test_recall": 1.0 if test is None else test.recall,
        "disk": sum(file.stat().st_size for file in (work / "kb").rglob("*") if file.is_file()),
    }


def job_search(work: Path, seed: int) -> dict[str, float]:
    return one_by_one(ragstone_search(work / "kb"), *asked(work))


def job_batch(work: Path, seed: int) -> dict[str, float]:
    from ragstone.knowledge.codes import Codes
    from ragstone.knowledge.storage import PassageStore

    search, (questions, best) = ragstone_search(work / "kb"), asked(work)
    values = in_batches(search, questions, best)
    spent = {
        "scan_ms": timed(Codes, "search"),
        "vectors_ms": timed(PassageStore, "vectors_of"),
        "passages_ms": timed(PassageStore, "passages_of"),
    }
    batches = range(0, len(questions) - BATCH + 1, BATCH)
    started = time.thread_time()
    for start in batches:
        search(questions[start : start + BATCH], BATCH_K)
    spent["own_ms"] = [time.thread_time() - started]  # the scan has threads of its own
    return values | {name: 1000 * sum(seconds) / len(batches) for name, seconds in spent.items()}


def timed(kind: type, method: str) -> list[float]:
    """From now on the seconds of every call of ``method`` go into the list returned."""
    seconds: list[float] = []
    call = getattr(kind, method)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(kind, method, wrapped)
    return seconds


def job_open(work: Path, seed: int) -> dict[str, float]:
    questions = asked(work)[0]
    started = time.perf_counter()
    from ragstone.knowledge import KnowledgeBase

    kb = KnowledgeBase.open(work / "kb")
    kb.search(vectors=questions[0], k=K)
    ended = time.perf_counter()
    codes = sum(file.stat().st_size for file in (work / "kb").glob("codes-*"))
    return {
        "seconds": ended - started,
        "codes": codes,
        "beyond_codes": held("RssAnon") + held("RssFile") - codes,
        "way": kb.dense_search,  # type: ignore[dict-item]
    }


def job_ragstone(work: Path, seed: int, limit: int | None = None) -> dict[str, float]:
    memory, started = Memory(), time.perf_counter()
    search = ragstone_search(work / "kb", limit)
    questions, best = asked(work)
    values = {"build_seconds": time.perf_counter() - started}
    return values | measured(search, questions, best, memory)


def job_faiss(work: Path, seed: int, kind: str) -> dict[str, float]:
    import faiss

    vectors = np.load(work / "vectors.npy", mmap_mode="r")
    faiss.omp_set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    memory, started = Memory(), time.perf_counter()
    if kind == "flat":
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 256
    for start in range(0, len(vectors), BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    values = {"build_seconds": time.perf_counter() - started}

    def search(questions: np.ndarray, k: int) -> list[list[int]]:
        return index.search(questions, k)[1].tolist()

    questions, best = asked(work)
    return values | measured(search, questions, best, memory)


def job_lance(work: Path, seed: int) -> dict[str, float]:
    import lance

    read_files(work / "kb")
    memory = Memory()
    dataset = lance.dataset(work / "kb" / "passages.lance")

    def search(questions: np.ndarray, k: int) -> list[list[int]]:
        found = []
        for question in questions:
            nearest = {"column": "vector", "q": question, "k": k, "metric": "dot", "use_index": False}
            table = dataset.to_table(columns=["id"], nearest=nearest, disable_scoring_autoprojection=True)
            found.append([int(id_[1:]) for id_ in table["id"].to_pylist()])
        return found

    questions, best = (array[:BATCH] for array in asked(work))
    return {"build_seconds": 0.0} | measured(search, questions, best, memory)


JOBS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "build": job_build,
    "search": job_search,
    "batch": job_batch,
    "open": job_open,
    "ragstone": job_ragstone,
    "flat": lambda work, seed: job_faiss(work, seed, "flat"),
    "hnsw": lambda work, seed: job_faiss(work, seed, "hnsw"),
    "lance": job_lance,
    "disk": lambda work, seed: job_ragstone(work, seed, SHORT_MEMORY),
}


def asked(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """The questions (B, D) and the places (B, k) of what each should find."""
    return np.load(work / "questions.npy"), np.load(work / "truth.npy")


# The run


def start(job: str, work: Path, seed: int, threads: int) -> dict[str, Any]:
    """Run a job in a process of its own."""
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "LANCE_CPU_THREADS")
    command = [sys.executable, __file__, "--job", job, "--work", str(work), "--seed", str(seed)]
    environment = {**os.environ, **dict.fromkeys(limits, str(threads))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def generate(work: Path, count: int, width: int, seed: int) -> None:
    settings = json.dumps({"passages": count, "width": width, "seed": seed})
    noted = work / "settings.json"
    if noted.exists() and noted.read_text() == settings:
        return
    shutil.rmtree(work / "kb", ignore_errors=True)
    write_vectors(work / "vectors.npy", count, width, seed)
    np.save(work / "questions.npy", np.concatenate([*blocks(QUESTIONS, width, seed + 1)]))
    vectors = np.load(work / "vectors.npy", mmap_mode="r")
    np.save(work / "truth.npy", truth(vectors, np.load(work / "questions.npy"), min(BATCH_K, count)))
    noted.write_text(settings)


def table(title: str, rows: list[dict[str, str]]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |", flush=True)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def run(options: argparse.Namespace, work: Path) -> None:
    def do(job: str) -> dict[str, Any]:
        return start(job, work, options.seed, options.threads)

    generate(work, options.passages, options.width, options.seed)
    if "build" in options.works or not (work / "kb" / "manifest.json").exists():
        v = do("build")
        row = {
            "seconds": f"{v['seconds']:.1f}",
            "adding": f"{v['add_seconds']:.1f}",
            "codes and self-test": f"{v['prepare_seconds']:.1f}",
            "peak memory": megabytes(v["memory"]),
            "disk": megabytes(v["disk"]),
        }
        table("Build of given vectors into a searchable base", [row])
    if "search" in options.works:
        v = do("search")
        row = {
            "median": f"{v['median_ms']:.2f} ms",
            "5 % to 95 %": f"{v['p5_ms']:.2f} to {v['p95_ms']:.2f} ms",
            "recall@10": f"{v['recall_at_10']:.4f}",
        }
        table(f"One question, k = {K}, from vector to passages with text", [row])
    if "batch" in options.works:
        v = do("batch")
        row = {
            "questions per second": f"{v['queries_per_second']:.0f}",
            "recall@100": f"{v['recall_at_100']:.4f}",
            "a batch": f"{1000 * BATCH / v['queries_per_second']:.0f} ms",
            "scan of codes": f"{v['scan_ms']:.0f} ms",
            "reading vectors": f"{v['vectors_ms']:.0f} ms",
            "reading passages": f"{v['passages_ms']:.0f} ms",
            "calling thread": f"{v['own_ms']:.0f} ms",
        }
        table(f"Batches of {BATCH}, k = {BATCH_K}", [row])
    if "open" in options.works:
        v = do("open")
        row = {
            "way": v["way"],
            "seconds": f"{v['seconds']:.2f}",
            "codes": megabytes(v["codes"]),
            "resident beyond codes": megabytes(v["beyond_codes"]),
        }
        table("A new process, from the import to the first answer", [row])
    if "compare" in options.works:
        rows = []
        for engine in ("ragstone", *options.engines):
            if engine in ("flat", "hnsw") and importlib.util.find_spec("faiss") is None:
                print(f"faiss {engine} is left out: faiss-cpu is not installed", file=sys.stderr)
                continue
            v = do(engine)
            name = NAMES.get(engine, engine)
            row = {
                "engine": name,
                "one question": f"{v['median_ms']:.2f} ms",
                "recall@10": f"{v['recall_at_10']:.4f}",
                "batch": f"{v['queries_per_second']:.0f}/s",
                "recall@100": f"{v['recall_at_100']:.4f}",
                "memory": megabytes(v["memory"]),
                "build or load": f"{v['build_seconds']:.1f} s",
            }
            rows.append(row)
        table("Against other engines (ragstone and Lance give passages, faiss numbers)", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where vectors and base are made and kept [a temporary folder]")
    parser.add_argument("--tiny", action="store_true", help="2,000 passages of width 64, to try it out")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job](options.work, options.seed)))
        return
    if options.tiny:
        options.passages, options.width = 2000, 64
    from machine import describe

    print(
        f"{describe()}; {options.passages:,} × {options.width}, {options.threads} threads for search, seed {options.seed}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        run(options, work)


if __name__ == "__main__":
    main()
