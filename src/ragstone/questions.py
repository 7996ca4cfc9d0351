"""Questions with their accepted answers, from the files that question-answering data comes in."""

from __future__ import annotations

import ast
import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from ragstone.errors import DataError, InputError

__all__ = ["Question", "is_unicode", "read_questions"]

_FORMATS = "use .jsonl, .json, .tsv, .csv, or a .source file beside its .target"
_LIST = 'write a list such as ["Paris", "Paris, France"]'


@dataclass(frozen=True)
class Question:
    """A question x and what counts as right.

    Attributes:
        question: the question, or whatever else the model reads: a claim, a first half.
        answers: the accepted answers, at least one; for training the first is the target.
        id: of the question, unique in its file; the number of its line where the file names none.
        positive_ids: ids of the gold passages, where they are known.
    """

    question: str
    answers: tuple[str, ...]
    id: str
    positive_ids: tuple[str, ...] = ()


def read_questions(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> list[Question]:
    """Read the questions of a file, in its order.

    - ``.jsonl`` and ``.json``: objects, one a line or in one list, with ``question``, ``answers`` (a lone string is one
      answer; so is ``answer``) and optionally ``id`` and ``positive_ids``. DPR's files are such lists; the
      ``passage_id`` or ``psg_id`` of their ``positive_ctxs`` are the gold passages.
    - ``.tsv`` and ``.csv``, as DPR ships them: question, TAB, a list of answers as Python or JSON writes it.
    - ``X.source`` and ``X.target``, one question and its answers a line, answers separated by TABs; ``path`` is either
      file, or ``X``.

    Blank lines and blank answers are skipped.

    Args:
        path: the file, UTF-8.
        limit: this many questions at most, the first ones.
        seed: with ``limit``, questions drawn at random instead; a larger limit adds to those of a smaller one.

    Raises:
        DataError: the file is missing, empty or no such file; the message names the line.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: read at least 1 question")
    try:
        read = _reader(path)
        questions = list(read if seed is not None else islice(read, limit))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read ({error.strerror}); check the path") from None
    if not questions:
        raise DataError(f"{path} holds no question; {_FORMATS}")
    if seed is None or limit is None:
        return questions
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    return [questions[n] for n in sorted(order[:limit])]


def _reader(path: Path) -> Iterator[Question]:
    if path.suffix in (".source", ".target"):
        return _read_pair(path.with_suffix(".source"), path.with_suffix(".target"))
    if path.suffix in (".jsonl", ".json"):
        return _read_json(path)
    if path.suffix in (".tsv", ".csv"):
        return _read_table(path)
    source = path.with_name(f"{path.name}.source")
    if source.is_file():
        return _read_pair(source, path.with_name(f"{path.name}.target"))
    if not path.is_file():
        raise DataError(f"There is no file {path}, and no {source.name} beside it; check the path")
    raise DataError(f"{path} is of no kind that holds questions; {_FORMATS}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\n")


def _read_json(path: Path) -> Iterator[Question]:
    seen: dict[str, str] = {}
    for value, number, place in _objects(path):
        question = _from_object(value, number, place)
        unnamed = place if value.get("id") is None else ""
        if question.id in seen:
            which = unnamed or seen[question.id]
            why = f" ({which} has no id of its own and gets its number)" if which else ""
            raise DataError(f"{path}: two questions have the id {question.id!r}{why}; give each an id of its own")
        seen[question.id] = unnamed
        yield question


def _objects(path: Path) -> Iterator[tuple[Any, int, str]]:
    """Whatever stands in a line or a list, with its number and its place."""
    filled = ((number, line) for number, line in _lines(path) if line.strip())
    first = next(filled, None)
    if first is not None and first[1].lstrip().startswith("["):
        values = _parse(path.read_text(encoding="utf-8-sig"), f"{path}")
        for number, value in enumerate(values, 1):
            yield value, number, f"{path}, item {number}"
        return
    for number, line in filled if first is None else (first, *filled):
        place = f"{path}, line {number}"
        yield _parse(line, place), number, place


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError is also a number of too many digits
        raise DataError(f"{place}: not JSON ({error}); write one object a line, or one list of objects") from None


def _from_object(value: Any, number: int, place: str) -> Question:
    if not isinstance(value, Mapping):
        raise DataError(f'{place}: {_short(value)} is no object; write {{"question": …, "answers": […]}}')
    question = value.get("question")
    if not isinstance(question, str):
        raise DataError(f'{place}: "question" is {_short(question)}; write a string')
    positives = value.get("positive_ids")
    if positives is None:
        contexts = value.get("positive_ctxs") or []
        if not isinstance(contexts, list):
            raise DataError(f'{place}: "positive_ctxs" is {_short(contexts)}; write a list of objects')
        found = (_first(context, "passage_id", "psg_id") for context in contexts if isinstance(context, Mapping))
        positives = [id_ for id_ in found if id_ is not None]
    id_ = value.get("id")
    return _question(
        question,
        _first(value, "answers", "answer"),
        str(number) if id_ is None else _identifier(id_, "id", place),
        tuple(dict.fromkeys(_identifier(p, "positive_ids", place) for p in _listed(positives))),
        place,
    )


def _first(value: Mapping[str, Any], *names: str) -> Any:
    """The first of the fields that is there and not null, else None."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def _read_table(path: Path) -> Iterator[Question]:
    csv.field_size_limit(2**31 - 1)  # one limit per process, and too low for many answers
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        end = 0
        try:
            for row in rows:
                start, end = end + 1, rows.line_num
                place = f"{path}, line {rows.line_num}"
                if not any(cell.strip() for cell in row):
                    continue
                if "\n" in row[0] or "\r" in row[0]:
                    raise DataError(
                        f"{path}, line {start}: a quote is open at the end of the line; close it, or write it double in a "
                        "quoted cell"
                    )
                if len(row) != 2:
                    raise DataError(
                        f"{place}: {len(row)} columns where there should be 2; write question, TAB, answers"
                    )
                yield _question(row[0], _literal(row[1], place), str(rows.line_num), (), place)
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}; quote the cell or shorten it") from None


def _literal(text: str, place: str) -> Any:
    """The value of a list as JSON or Python writes it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise DataError(f"{place}: the answers {_short(text)} are no list; {_LIST}") from None


def _read_pair(source: Path, target: Path) -> Iterator[Question]:
    for sides in zip_longest(_lines(source), _lines(target)):
        (number, question), (_, answers) = (side or (0, "") for side in sides)
        number = number or sides[1][0]
        place = f"{source}, line {number}"
        if not question.strip() and not answers.strip():
            continue
        if not question.strip() or not answers.strip():
            missing = source if not question.strip() else target
            raise DataError(f"{missing}, line {number} is blank or missing; each question needs its line of answers")
        yield _question(question, answers.split("\t"), str(number), (), place)


def _question(text: str, answers: Any, id_: str, positives: tuple[str, ...], place: str) -> Question:
    if not text.strip():
        raise DataError(f"{place}: the question is blank; write one or remove the line")
    listed = _listed(answers)
    if not all(isinstance(answer, str) for answer in listed):
        raise DataError(f"{place}: the answers {_short(answers)} are not all strings; {_LIST}")
    kept = tuple(answer.strip() for answer in listed if answer.strip())
    if not kept:
        raise DataError(f"{place}: the question has no answer; {_LIST}")
    broken = next((each for each in (text, *kept, id_, *positives) if not is_unicode(each)), None)
    if broken is not None:
        raise DataError(f"{place}: {_short(broken)} is not valid Unicode (it holds half a character); repair it")
    return Question(text.strip(), kept, id_, positives)


def is_unicode(text: str) -> bool:
    """Whether ``text`` holds no lone surrogate, which no file of results and no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _identifier(value: Any, name: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f'{place}: "{name}" holds {_short(value)}; write a string')
    return str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
