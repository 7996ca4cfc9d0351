"""What a base of 21 million passages will take: two sizes are built and measured, and extrapolated.

    python benchmarks/knowledge_plan.py [--sizes 100000 400000] [--width 768] [--target 21000000]

Each size is built from vectors as `knowledge.py` generates them, with texts of 100 words, by a process of its own; other
processes open the base and answer questions, with memory for codes of 4 bits, of 2, and for no codes but the index on disk.
Measured are bytes on disk (without that index), seconds to build until the first answer, what that holds at most, and what
the processes that answer hold, without mapped files (`/proc`, so on Linux). The smaller size, with what an empty base
takes, says what the larger will take; the deviation from what it does take is printed, and so is that of
`ragstone.knowledge.plan`. The target is extrapolated from both sizes, but for the memory to build and that with the index on
disk, which end at a bound. Exits with 1 if a deviation is above 20 %.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from knowledge import Memory, blocks, held
from machine import describe

TOLERANCE = 0.2
LEAST_MEMORY = 16_000_000  # no codes fit
WORDS = 50_000


@dataclass(frozen=True)
class Measured:
    """What a base of ``passages`` took: bytes on disk, seconds and memory to build, and memory to search in each way.

    ``axes`` are those along which its vectors are quantised.
    """

    passages: int
    axes: int
    text: float  # bytes in all
    disk: float
    seconds: float
    building: float
    quantised: float
    coarse: float
    on_disk: float


def build(folder: Path, passages: int, width: int) -> None:
    """Make a base in ``folder``, and print seconds and the most memory that this process held."""
    from ragstone.knowledge import KnowledgeBase, Passage

    memory = Memory()
    chance = np.random.default_rng(0)
    words = np.array([f"word{n}" for n in range(WORDS)])
    spent = text = 0.0
    base = KnowledgeBase.create(folder, encoder=None, width=width)
    for made in blocks(passages, width, 0):
        drawn = words[np.minimum(chance.zipf(1.3, (len(made), 100)) - 1, WORDS - 1)]
        rows = [Passage(f"p{len(base) + n}", text=" ".join(row)) for n, row in enumerate(drawn)]
        text += sum(len(passage.text) for passage in rows)
        started = time.perf_counter()
        base.add(rows, vectors=made)
        spent += time.perf_counter() - started
    started = time.perf_counter()
    base.search(vectors=np.ones(width), k=10)
    spent += time.perf_counter() - started
    print(json.dumps({"text": text, "seconds": spent, "building": memory.beyond_start()}))


def answer(folder: Path, memory: int) -> None:
    """Open the base in ``folder``, answer questions, and print the memory that this process holds then."""
    from ragstone.knowledge import KnowledgeBase

    base = KnowledgeBase.open(folder, memory=memory)
    for question in np.random.default_rng(1).standard_normal((10, base.width)):
        base.search(vectors=question, k=10)
    print(json.dumps({"way": base.dense_search, "memory": held("RssAnon")}))


def prepare(folder: Path, memory: int) -> None:
    """Make what search needs with that ``memory``."""
    from ragstone.knowledge import KnowledgeBase

    KnowledgeBase.open(folder, memory=memory).prepare()
    print("{}")


def measure(work: Path, passages: int, width: int) -> Measured:
    from ragstone.knowledge import KnowledgeBase
    from ragstone.knowledge.codes import codes_bytes
    from ragstone.knowledge.search import EXACT_BELOW

    folder = work / f"kb{passages}"

    def run(*arguments: object) -> dict[str, float]:
        command = [sys.executable, __file__, *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    values = run("--build", folder, "--sizes", passages, "--width", width)
    axes = KnowledgeBase.open(folder).info().axes
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    searching = []
    for way, bits in (("quantised", 4), ("coarse", 2), ("disk", 0)):
        memory = max(1, codes_bytes(passages, width, bits)) if bits else LEAST_MEMORY
        run("--prepare", folder, "--memory", memory)
        found = run("--answer", folder, "--memory", memory)
        assert passages < EXACT_BELOW or found["way"] == way, found
        searching.append(found["memory"])
    return Measured(passages, axes or width, values["text"], disk, values["seconds"], values["building"], *searching)


def along(first: Measured, second: Measured, passages: int) -> Measured:
    """Return the point for ``passages`` on the line through two measured ones."""
    share = (passages - first.passages) / (second.passages - first.passages)
    a, b = asdict(first), asdict(second)
    values = {name: a[name] + share * (b[name] - a[name]) for name in a}
    return Measured(**(values | {"passages": passages, "building": math.nan, "on_disk": math.nan}))


def row(name: str, at: Measured) -> str:
    gigabytes = " | ".join(
        "" if math.isnan(value) else f"{value / 1e9:,.2f}"
        for value in (at.disk, at.building, at.quantised, at.coarse, at.on_disk)
    )
    return f"| {name} | {at.passages:,} | {gigabytes} | {at.seconds:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--target", type=int, default=21_000_000)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        return build(options.build, options.sizes[0], options.width)
    if options.answer:
        return answer(options.answer, options.memory)
    if options.prepare:
        return prepare(options.prepare, options.memory)

    if not held("RssAnon"):
        sys.exit("memory is read from /proc/self/status, which this system lacks; run this on Linux")
    from ragstone.knowledge import plan

    with tempfile.TemporaryDirectory() as work:
        # An empty base says what does not grow; codes, which small bases do without, are no part of that.
        sizes = [measure(Path(work), size, options.width) for size in (0, *sorted(options.sizes))]
    empty, small, large = sizes[0], sizes[-2], sizes[-1]
    said = along(empty, small, large.passages)
    formula = plan(large.passages, options.width, text_bytes=large.text / large.passages, axes=large.axes)
    deviations = {
        "disk": said.disk / large.disk - 1,
        "disk by plan": formula.disk_bytes / large.disk - 1,
        "4 bits by plan": formula.memory_bytes / large.quantised - 1,
        "2 bits by plan": formula.coarse_memory_bytes / large.coarse - 1,
        "on disk by plan": formula.least_memory_bytes / large.on_disk - 1,
    } | {name: getattr(said, name) / getattr(large, name) - 1 for name in ("quantised", "coarse")}
    seconds = said.seconds / large.seconds - 1
    print(f"{describe()}; width {options.width}, {large.axes} axes")
    print(
        "\n| | passages | disk | memory to build | to search with 4 bits | 2 bits | on disk (all GB) | seconds to build |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for at in sizes:
        print(row("measured", at))
    print(row("from the smaller size", said))
    print(row("extrapolated", along(small, large, options.target)))
    print()
    for axes in (large.axes, options.width):
        target = plan(options.target, options.width, axes=axes)
        memory = ", ".join(
            f"{size / 1e9:,.1f}"
            for size in (target.memory_bytes, target.coarse_memory_bytes, target.least_memory_bytes)
        )
        print(f"plan with {axes} axes: {target.disk_bytes / 1e9:,.1f} GB on disk; to search {memory} GB")
    print("deviation: " + ", ".join(f"{name} {value:+.1%}" for name, value in deviations.items()), end="")
    print(f"; seconds {seconds:+.1%} (for information)")
    sys.exit(any(abs(value) > TOLERANCE for value in deviations.values()))


if __name__ == "__main__":
    main()
