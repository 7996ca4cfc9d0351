"""What a person waits for: importing, help, and the first and the next answers of a new process.

    python benchmarks/startup.py --kb /tmp/wiki18 [--runs 5] "question" "question" …

Every run is a process of its own; the first is not counted, so that files are in memory. Medians over the runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe

QUESTIONS = ["who was the first president of citibank", "what is the capital of france", "who wrote balls to the wall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    options = parser.parse_args()
    print(describe(), "\n")
    rows = {
        "python -c pass": [whole(["-c", "pass"]) for _ in runs(options.runs)],
        "import ragstone": [whole(["-c", "import ragstone"]) for _ in runs(options.runs)],
        "ragstone --help": [whole(["-m", "ragstone", "--help"]) for _ in runs(options.runs)],
    }
    answers = [answered(options.kb, options.questions) for _ in runs(options.runs)]
    rows["ask, first answer"] = [times[0] for times in answers]
    rows["ask, each next answer"] = [statistics.median(times[1:]) for times in answers]
    print("| | median s | slowest s |\n|---|---|---|")
    for name, seconds in rows.items():
        counted = seconds[1:]
        print(f"| {name} | {statistics.median(counted):.2f} | {max(counted):.2f} |")


def runs(count: int) -> range:
    return range(count + 1)


def whole(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def answered(base: Path, questions: list[str]) -> list[float]:
    """Seconds from the start of the process to the first answer, and from each answer to the next."""
    command = [sys.executable, "-u", "-m", "ragstone", "ask", str(base), "--json"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n".join(questions))
        process.stdin.close()
        times = []
        for _ in process.stdout:
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
    assert len(times) == len(questions), "not every question was answered"
    return times


if __name__ == "__main__":
    main()
