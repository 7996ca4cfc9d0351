"""Rankings as TREC run files: ``question-id Q0 passage-id rank score tag``, one passage a line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ragstone.errors import DataError, InputError
from ragstone.evaluation.files import numbered_lines
from ragstone.evaluation.results import Prediction

__all__ = ["Run", "check_run_id", "read_run", "write_run"]

Run = dict[str, list[tuple[str, float]]]
"""Question id -> passage ids and their scores, best first."""


def read_run(path: str | Path) -> Run:
    """Read a run file. As in trec_eval the scores order the passages; equal ones stay in the order of the file.

    Passage ids may hold blanks, question ids may not.

    Raises:
        DataError: the file cannot be read, or a line of it; the message names the line.
    """
    run = Run()
    for place, line in numbered_lines(Path(path), remedy="save it as UTF-8"):
        question, passage, score = _fields(line, place)
        run.setdefault(question, []).append((passage, score))
    if not run:
        raise DataError(f"{path} holds no ranking; write lines of: question-id Q0 passage-id rank score tag")
    for question, ranked in run.items():
        if len({passage for passage, _ in ranked}) < len(ranked):
            raise DataError(f"{path}: a passage is ranked twice for the question {question!r}; keep one of them")
        ranked.sort(key=lambda pair: -pair[1])
    return run


def _fields(line: str, place: str) -> tuple[str, str, float]:
    try:
        question, _, rest = line.split(maxsplit=2)
        passage, _, score, _ = rest.strip().rsplit(maxsplit=3)
        value = float(score)
    except ValueError:
        raise DataError(
            f"{place}: {line.strip()!r} is no line of a run; write: question-id Q0 passage-id rank score tag"
        ) from None
    if not math.isfinite(value):
        raise DataError(f"{place}: the score is {score}; write a finite number")
    return question, passage, value


def check_run_id(question_id: str) -> None:
    """Raise InputError if a run file cannot hold the id of a question."""
    if len(question_id.split()) != 1:
        raise InputError(f"The question id {question_id!r} has blanks, which a run file cannot hold; rename it")


def write_run(path: str | Path, predictions: Iterable[Prediction], *, tag: str = "ragstone") -> None:
    """Write which passages were read for each question, with the logits of their priors as scores."""
    lines = []
    for prediction in predictions:
        check_run_id(prediction.id)
        ranked = sorted(prediction.passages, key=lambda passage: -passage.score)
        lines += [f"{prediction.id} Q0 {p.id} {rank} {p.score!r} {tag}\n" for rank, p in enumerate(ranked, 1)]
    Path(path).write_text("".join(lines), encoding="utf-8")
