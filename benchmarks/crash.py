"""Kill what writes with SIGKILL at random moments: nothing that was committed may be lost, and nothing be seen in parts.

    python benchmarks/crash.py [--work index|updates|all] [--kills 20] [--seed 0] [--readers 4]

**index**: the base must open each time and the next run must complete it. A folder of documents of 1 to 40 passages (one
of 400) is indexed by a process of its own, with a toy encoder. After each kill the base is opened: it may hold whole
documents only, each passage as in an uninterrupted run, no id twice. The next run goes on from there until all is stored;
then the base is made anew. Each time that a base is complete, its content, vectors included, must equal that of an
uninterrupted run.

**updates**: add, upsert, delete, compact and reindex, chosen at random, are killed while readers in processes of their
own search all the time, exactly and by words, at the newest version and at older ones; see crash_updates.py.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

INDEX = """
import sys
import lance
from ragstone.testing import ToyEncoder
from ragstone.knowledge import KnowledgeBase
base, folder, delay = sys.argv[1:]
encoder = ToyEncoder(delay=float(delay))
print("started", flush=True)
door = KnowledgeBase.open if KnowledgeBase.exists(base) else KnowledgeBase.create
door(base, encoder=encoder).add_documents(folder, chunk_passages=100)
"""


@dataclass
class Result:
    """How many runs were killed, in how many of them the base was in between, and what was wrong with it."""

    killed: int = 0
    partial: int = 0
    faults: list[str] = field(default_factory=list)


def write_documents(folder: Path, count: int, seed: int) -> None:
    folder.mkdir()
    chance = random.Random(seed)
    for i in range(count):
        passages = chance.randint(1, 40) if i else 400  # the first is larger than a chunk
        text = " ".join(f"word{chance.randint(0, 999)}" for _ in range(100 * passages))
        (folder / f"{i:04}.txt").write_text(text)


def content(base: Path) -> dict[str, tuple[str, ...]]:
    """Return what the base holds, by passage id; raise if an id is there twice."""
    from ragstone.knowledge import KnowledgeBase

    table = KnowledgeBase.open(base)._store.scan(["id", "document_id", "position", "content_hash", "text", "vector"])
    rows = {
        row["id"]: (row["document_id"], *map(str, row.values())) for row in table.drop_columns(["_rowid"]).to_pylist()
    }
    if len(rows) < table.num_rows:
        raise ValueError("an id is stored twice")
    return rows


def index(base: Path, folder: Path, delay: float) -> subprocess.Popen[str]:
    """Start indexing, and return when it has begun: the kills are for it, not for Python's start."""
    command = [sys.executable, "-c", INDEX, str(base), str(folder), str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def check(base: Path, whole: dict[str, tuple[str, ...]], result: Result, moment: str) -> None:
    """Note whatever of the base is not a part of ``whole`` in whole documents."""
    from ragstone.knowledge import KnowledgeBase

    if not KnowledgeBase.exists(base):
        return  # killed while the base was made: there is none yet
    try:
        held = content(base)
    except Exception as error:
        result.faults.append(f"{moment}: {type(error).__name__}: {error}")
        return
    documents = {row[0] for row in held.values()}
    expected = {id_: row for id_, row in whole.items() if row[0] in documents}
    if held != expected:
        result.faults.append(f"{moment}: {len(held)} passages of {len(documents)} documents, not {len(expected)}")
    result.partial += 0 < len(held) < len(whole)


def run(work: Path, *, kills: int, seed: int, documents: int) -> Result:
    """Index and kill in ``work`` until ``kills`` runs were killed."""
    folder, base = work / "documents", work / "kb"
    write_documents(folder, documents, seed)
    process = index(work / "whole", folder, 0)
    started = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError("the uninterrupted run failed")
    seconds = time.monotonic() - started
    whole = content(work / "whole")
    delay = seconds / len(whole)  # of each passage, so that about half the time goes into encoding
    chance = random.Random(seed)
    result = Result()
    while result.killed < kills:
        process = index(base, folder, delay)
        try:
            process.wait(timeout=chance.uniform(0, 2 * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            result.killed += 1
        check(base, whole, result, f"kill {result.killed}")
        if process.returncode == 0:
            if content(base) != whole:
                result.faults.append(f"complete after kill {result.killed}, but the content differs")
            shutil.rmtree(base)
    if index(base, folder, 0).wait() != 0 or content(base) != whole:
        result.faults.append("the last run did not complete the base")
    return result


def index_work(work: Path, options: argparse.Namespace) -> bool:
    result = run(work, kills=options.kills, seed=options.seed, documents=options.documents)
    print("| kill -9 of index | seed | base in between | faults |\n|---|---|---|---|")
    print(f"| {result.killed} | {options.seed} | {result.partial} | {len(result.faults)} |\n")
    return tell(result.faults)


def updates_work(work: Path, options: argparse.Namespace) -> bool:
    import crash_updates

    result = crash_updates.run(work, kills=options.kills, seed=options.seed, readers=options.readers)
    killed = ", ".join(f"{count} {kind}" for kind, count in sorted(result.killed.items()))
    print(
        "| kill -9 | of them committed | seed | not killed | readers | versions read | of them pinned | lost "
        "| torn or wrong | errors |\n|---|---|---|---|---|---|---|---|---|---|\n"
        f"| {result.killed.total()} ({killed}) | {result.committed} | {options.seed} | {result.finished} | "
        f"{options.readers} | {result.reads} | {result.pinned} | {len(result.lost)} | {len(result.faults)} | "
        f"{len(result.errors)} |\n"
    )
    return tell(result.lost + result.faults + result.errors)


def tell(faults: list[str]) -> bool:
    for fault in faults:
        print(fault)
    return bool(faults)


WORKS = {"index": index_work, "updates": updates_work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=[*WORKS, "all"], default="all")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    failed = False
    for name in WORKS if options.work == "all" else [options.work]:
        with tempfile.TemporaryDirectory() as work:
            failed |= WORKS[name](Path(work), options)
    sys.exit(failed)


if __name__ == "__main__":
    main()
