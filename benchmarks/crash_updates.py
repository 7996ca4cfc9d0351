"""Kill add, upsert, delete, compact and reindex with SIGKILL while others read; see ``crash.py --work updates``.

What a base may hold is known: a passage is made from its id and from the number of the operation that wrote it, and every
operation is one whole step from one state (which operation wrote which passage, and the width of the vectors) to another.
The states are written to a file before an operation begins; a reader that finds any other has found a fault. Readers keep
codes of the vectors too, as of a large base, and write them beside it while others do.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ragstone.errors import KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage, search
from ragstone.testing import ToyEncoder

KINDS = ("add", "upsert", "delete", "compact", "reindex")
WIDTHS = (32, 48)
QUESTION = "word7 word77"
MOST = 400  # passages
KILLED = 0.6  # of the operations
ALL = 10 * MOST

State = dict[str, int]
"""The number of the operation that wrote each passage, by id."""


@dataclass
class Result:
    """What was killed, how often the killed operation had been committed all the same, and what was wrong."""

    killed: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    finished: int = 0
    reads: int = 0
    pinned: int = 0
    lost: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


# What a base may hold


@lru_cache(1 << 14)
def passage(id_: str, written_by: int) -> Passage:
    words = random.Random(f"{id_} {written_by}").choices(range(1000), k=20)
    text = f"marker{written_by} " + " ".join(f"word{word}" for word in words)
    return Passage(id_, title=f"title {id_}", text=text, metadata={"written_by": written_by})


@lru_cache(1 << 15)
def vector(id_: str, written_by: int, width: int) -> np.ndarray:
    made = passage(id_, written_by)
    found: np.ndarray = encoder(width).encode_passages([(made.title, made.text)])[0]
    return found


def encoder(width: int, delay: float = 0.0) -> ToyEncoder:
    return ToyEncoder(width, delay=delay, fingerprint=f"toy-{width}")


def described(state: State, width: int) -> str:
    return json.dumps([width, *sorted(state.items())])


def examine(base: KnowledgeBase) -> tuple[State, list[str]]:
    """Return the state of the version that ``base`` reads, and what of its answers is wrong."""
    question = encoder(base.width).encode_questions([QUESTION])[0]
    faults = []
    state: State = {}
    exact = base.search(vectors=question, k=ALL, search="exact")
    for hit in exact:
        written_by = hit.passage.metadata["written_by"]
        if hit.passage.id in state:
            faults.append(f"{hit.passage.id} is returned twice")
        state[hit.passage.id] = written_by
        if hit.passage != passage(hit.passage.id, written_by):
            faults.append(f"{hit.passage.id} is torn: {hit.passage}")
        right = vector(hit.passage.id, written_by, base.width)
        score = np.float32(right.astype(np.float64) @ question.astype(np.float64))
        if not np.array_equal(hit.vector, right) or hit.score != score:
            faults.append(f"{hit.passage.id} has the score {hit.score}, not {score}")
    if len(state) != len(base):
        faults.append(f"{len(state)} passages are found of {len(base)}")
    scores = {hit.passage.id: hit.score for hit in exact}
    for hit, best in zip(base.search(vectors=question, k=3), exact, strict=False):  # by codes, rescored
        if hit.score != scores.get(hit.passage.id) or hit.score != best.score:
            faults.append(f"{hit.passage.id} is found by codes with {hit.score}, {best.passage.id} with {best.score}")
    for written_by in sorted(set(state.values()))[-3:]:
        found = {hit.passage.id for hit in base.search(f"marker{written_by}", k=ALL, search="keyword")}
        if found != {id_ for id_, writer in state.items() if writer == written_by}:
            faults.append(f"marker{written_by} is found in {len(found)} passages")
    return state, [f"version {base.version}: {fault}" for fault in faults]


# The processes


def write(folder: str) -> None:
    """Carry out the operations that come in, a line each, and say when each begins and is done."""
    base = KnowledgeBase.open(folder)
    for line in sys.stdin:
        operation = json.loads(line)
        ids = operation["ids"]
        if operation["kind"] in ("add", "upsert"):
            passages = [passage(id_, operation["number"]) for id_ in ids]
            vectors = np.array([vector(id_, operation["number"], base.width) for id_ in ids])
        print("begun", flush=True)
        match operation["kind"]:
            case "add":
                base.add(passages, vectors)
            case "upsert":
                base.upsert(passages, vectors)
            case "delete":
                base.delete(ids)
            case "compact":
                base.compact(timedelta(seconds=operation["keep"]))
            case "reindex":
                base.reencode(encoder(operation["width"], delay=0.001), chunk=50)
        print("done", flush=True)


def read(folder: str, states: str, stop: str, seed: str) -> None:
    """Search the newest version and older ones until the file ``stop`` is there; print what was found."""
    chance = random.Random(int(seed))
    told: dict[str, Any] = {"reads": 0, "pinned": 0, "faults": [], "errors": []}
    seen: dict[int, str] = {}
    search.EXACT_BELOW = 0
    newest = KnowledgeBase.open(folder)
    print("reading", flush=True)
    while not Path(stop).exists():
        try:
            base = newest
            match chance.randrange(4):
                case 0:  # as it is, whatever became of its version
                    pass
                case 1:
                    number = chance.choice(newest.versions()).number
                    try:
                        base = KnowledgeBase.open(folder, version=number)
                    except KnowledgeBaseError as error:
                        if "compaction removed it" in str(error):
                            continue
                        raise
                    told["pinned"] += 1
                case _:
                    before = newest.version
                    newest.refresh()
                    if newest.version < before:
                        told["faults"].append(f"version {newest.version} came after {before}")
            state, faults = examine(base)
            found = described(state, base.width)
            if found not in Path(states).read_text().splitlines():
                faults.append(f"version {base.version}: {len(state)} passages in a state that never was")
            if seen.setdefault(base.version, found) != found:
                faults.append(f"version {base.version} changed")
            told["faults"] += faults
            told["reads"] += 1
        except Exception as error:
            told["errors"].append(f"{type(error).__name__}: {error}")
    print(json.dumps(told), flush=True)


def start(role: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, role, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# The run


def operations(chance: random.Random) -> Iterator[Any]:
    """Yield one operation after another; what is sent in is the state that it begins with, and the width."""
    operation = None
    for number in range(1, sys.maxsize):
        state, width = yield operation
        kind = chance.choice(KINDS)
        if kind in ("add", "upsert") and len(state) > MOST:
            kind = "delete"
        ids = []
        if kind in ("upsert", "delete") and state:
            ids += chance.sample(sorted(state), min(len(state), chance.randint(1, 60)))
        if kind in ("add", "upsert"):
            ids += [f"p{number}-{place}" for place in range(chance.randint(1, 60))]
        after, wide = dict(state), width
        if kind == "delete":
            after = {id_: writer for id_, writer in state.items() if id_ not in ids}
        elif kind in ("add", "upsert"):
            after |= dict.fromkeys(ids, number)
        elif kind == "reindex":
            (wide,) = set(WIDTHS) - {width}
        keep = chance.choice((0, 0, 5))
        operation = {"number": number, "kind": kind, "ids": ids, "keep": keep, "width": wide, "after": (after, wide)}


def run(work: Path, *, kills: int, seed: int, readers: int) -> Result:
    """Write, kill and read in ``work`` until ``kills`` operations were killed."""
    folder, states, stop = work / "kb", work / "states", work / "stop"
    base = KnowledgeBase.create(folder, encoder=encoder(WIDTHS[0]))
    base.add([passage(f"p0-{place}", 0) for place in range(200)])
    present: tuple[State, int] = ({f"p0-{place}": 0 for place in range(200)}, WIDTHS[0])
    states.write_text(described({}, WIDTHS[0]) + "\n" + described(*present) + "\n")
    result, chance = Result(), random.Random(seed)
    plan = operations(random.Random(seed))
    next(plan)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processes = [start("read", folder, states, stop, seed * 1000 + place) for place in range(readers)]
    writer = None
    try:
        for process in processes:
            process.stdout.readline()  # type: ignore[union-attr]
        while result.killed.total() < kills:
            operation = plan.send(present)
            after = operation.pop("after")
            with states.open("a") as file:
                file.write(described(*after) + "\n")
            writer = start("write", folder) if writer is None else writer
            done = carry_out(writer, operation, seconds[operation["kind"]], chance)
            if writer.poll() is not None:
                writer.stdin.close()  # type: ignore[union-attr]
                writer.stdout.close()  # type: ignore[union-attr]
                if writer.returncode != -signal.SIGKILL:
                    result.errors.append(f"operation {operation} failed with exit code {writer.returncode}")
                writer = None
            result.finished += done
            result.killed[operation["kind"]] += not done
            if not done:
                print(f"{result.killed.total()} of {kills} killed", end="\r", file=sys.stderr, flush=True)
            base.refresh()
            state, faults = examine(base)
            result.faults += faults
            found = state, base.width
            if found not in ([after] if done else [present, after]):
                result.lost.append(f"operation {operation['number']} ({operation['kind']}) left {len(state)} passages")
            result.committed += not done and found == after != present
            present = found
    finally:
        if writer is not None:
            writer.kill()
        stop.touch()
        for process in processes:
            told, _ = process.communicate(timeout=120)
            if process.returncode:
                result.errors.append(f"a reader ended with exit code {process.returncode}")
                continue
            values = json.loads(told)
            result.reads += values["reads"]
            result.pinned += values["pinned"]
            result.faults += values["faults"]
            result.errors += values["errors"]
    return result


def carry_out(
    writer: subprocess.Popen[str], operation: dict[str, Any], seconds: list[float], chance: random.Random
) -> bool:
    """Have an operation done, or killed at a random moment; return whether the writer said that it was done."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write(json.dumps(operation) + "\n")
    writer.stdin.flush()
    begun = writer.stdout.readline() == "begun\n"
    if begun and seconds and chance.random() < KILLED:  # the first of a kind says how long they take
        time.sleep(chance.uniform(0, 1.2 * statistics.median(seconds)))
        writer.kill()
        writer.wait()
        return writer.stdout.read() == "done\n"
    began = time.monotonic()
    done = writer.stdout.readline() == "done\n"
    seconds.append(time.monotonic() - began)
    if not done:
        writer.wait()
    return done


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
