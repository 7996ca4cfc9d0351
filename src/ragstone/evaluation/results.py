"""What an evaluation returns: a prediction for each question, and the summary of them all."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ragstone.errors import DataError, InputError, MissingExtraError
from ragstone.evaluation.diagnosis import calibration_error, entropy, same_passages
from ragstone.evaluation.files import numbered_lines
from ragstone.evaluation.statistics import Comparison, bootstrap_interval, compare_scores
from ragstone.evaluation.texts import bleu_1, distinct_ngrams
from ragstone.questions import Question

__all__ = [
    "Evaluation",
    "Prediction",
    "ReadPassage",
    "check_same",
    "compare",
    "read_predictions",
    "summarize",
    "write_predictions",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadPassage:
    """A passage that the model read for a question.

    Attributes:
        id, title, text: of the passage.
        score, prior, posterior: as in :class:`ragstone.Evidence`.
        holds_answer: whether an accepted answer stands in the text (:func:`ragstone.metrics.has_answer`).
    """

    id: str
    title: str
    text: str
    score: float
    prior: float
    posterior: float
    holds_answer: bool


@dataclass(frozen=True)
class Prediction:
    """The answer to one question and how good it is.

    Attributes:
        id, question, answers, positive_ids: as in :class:`ragstone.questions.Question`.
        prediction: the answer given; empty where there is none.
        log_prob: log p(y|x) of the prediction in nats; None where there is none.
        confidence: exp(log_prob); with labels, its share of the probability of all labels.
        correct: whether it counts as right: by exact match, by the regular expression, or as a label.
        scores: this question's value of each metric, such as ``exact_match`` or ``recall_at_5``.
        passages: what the model read, in the order of retrieval.
        error: why there is no answer; empty where there is one.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]
    prediction: str
    log_prob: float | None
    confidence: float | None
    correct: bool
    scores: Mapping[str, float]
    passages: tuple[ReadPassage, ...] = ()
    error: str = ""

    @property
    def relevant_ids(self) -> tuple[str, ...]:
        """The gold passages; where they are not known, those of the passages read that hold an answer."""
        return self.positive_ids or tuple(passage.id for passage in self.passages if passage.holds_answer)

    @property
    def found(self) -> bool:
        """Whether one of the passages read is relevant."""
        return not {passage.id for passage in self.passages}.isdisjoint(self.relevant_ids)


@dataclass(frozen=True)
class Evaluation:
    """All predictions and what they come to.

    Attributes:
        predictions: in the order of the questions.
        summary: name -> value. The means over all questions of what ``Prediction.scores`` holds (unanswered questions
            count as 0), and what belongs to the whole set, see :func:`summarize`.
        intervals: the 95 % bootstrap interval of each mean; empty without scipy.
        settings: how the answers were made, as the caller says it.
    """

    predictions: tuple[Prediction, ...]
    summary: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the predictions."""
        unanswered = sum(bool(prediction.error) for prediction in self.predictions)
        return {
            "n": len(self.predictions),
            "unanswered": unanswered,
            **self.summary,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "settings": dict(self.settings),
        }


def summarize(
    predictions: Sequence[Prediction], *, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Evaluation:
    """Average the scores of all questions that have them, and add what belongs to the whole set.

    ``calibration_error`` (of the confidence, in 10 bins), ``posterior_entropy`` in nats and ``posterior_entropy_share`` of
    log K, and ``same_passages`` (paper, appendix H) are over the answered questions; ``bleu_1`` and ``distinct_trigrams``
    are there where ``rouge_l`` is. Where retrieval is judged, ``correct_where_found`` is the share of right answers among
    the questions with a relevant passage, and all wrong ones are ``reading_errors``, though there was one, or
    ``retrieval_errors``, both as shares of the questions. ``seed`` is that of the bootstrap.
    """
    if not predictions:
        raise InputError("There are no predictions; evaluate at least 1 question")
    names = dict.fromkeys(name for prediction in predictions for name in prediction.scores)
    values = {name: [p.scores[name] for p in predictions if name in p.scores] for name in names}
    summary = {name: math.fsum(found) / len(found) for name, found in values.items()}
    if "rouge_l" in summary:
        texts = [prediction.prediction for prediction in predictions]
        summary["bleu_1"] = bleu_1(texts, [prediction.answers for prediction in predictions])
        summary["distinct_trigrams"] = distinct_ngrams(texts)
    if "reciprocal_rank" in summary:
        summary |= _errors([prediction for prediction in predictions if "reciprocal_rank" in prediction.scores])
    answered = [prediction for prediction in predictions if not prediction.error]
    if answered:
        confidences = [min(p.confidence or 0.0, 1.0) for p in answered]
        summary["calibration_error"] = calibration_error(confidences, [p.correct for p in answered])
        summary |= _diagnose(answered)
    intervals = {}
    try:
        intervals = {name: bootstrap_interval(found, seed=seed) for name, found in values.items()}
    except MissingExtraError as error:
        logger.warning("The summary has no intervals: %s.", error)
    return Evaluation(tuple(predictions), summary, intervals, settings or {})


def _errors(judged: Sequence[Prediction]) -> dict[str, float]:
    found = [each.correct for each in judged if each.found]
    wrong = sum(not each.correct for each in judged)
    reading = found.count(False)
    errors = {"correct_where_found": found.count(True) / len(found)} if found else {}
    return errors | {"reading_errors": reading / len(judged), "retrieval_errors": (wrong - reading) / len(judged)}


def _diagnose(answered: Sequence[Prediction]) -> dict[str, float]:
    entropies = [(entropy(p.posterior for p in each.passages), len(each.passages)) for each in answered]
    shares = [nats / math.log(k) for nats, k in entropies if k > 1]
    diagnosis = {"posterior_entropy": math.fsum(nats for nats, _ in entropies) / len(entropies)}
    if shares:
        diagnosis["posterior_entropy_share"] = math.fsum(shares) / len(shares)
    diagnosis["same_passages"] = same_passages([passage.id for passage in each.passages] for each in answered)
    return diagnosis


COMPARED = ("accuracy", "exact_match", "f1", "contains", "rouge_l", "q_bleu_1", "reciprocal_rank")


def compare(predictions: Sequence[Prediction], others: Sequence[Prediction], *, seed: int = 0) -> dict[str, Comparison]:
    """Compare two runs over the same questions, by every score that both have.

    Raises:
        InputError: the questions, known by their ids, are not the same.
    """
    check_same(predictions, others)
    theirs = {other.id: other for other in others}
    comparisons = {}
    for name in COMPARED:
        if all(name in each.scores for each in (*predictions, *others)):
            pairs = [(each.scores[name], theirs[each.id].scores[name]) for each in predictions]
            first, second = zip(*pairs, strict=True)
            comparisons[name] = compare_scores(first, second, seed=seed)
    return comparisons


def check_same(questions: Sequence[Question | Prediction], others: Sequence[Prediction]) -> None:
    """Raise an InputError where two runs are not over the same questions."""
    ours, theirs = ({each.id: each.question for each in run} for run in (questions, others))
    different = [id_ for id_ in ours | theirs if ours.get(id_) != theirs.get(id_)]
    if different:
        raise InputError(
            f"The two runs are not over the same questions: {len(different)} differ, such as the one with the id "
            f"{different[0]!r}; evaluate both with the same file, limit and seed"
        )


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write one JSON object a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read what `write_predictions` wrote."""
    lines = numbered_lines(Path(path), remedy="write it with --predictions")
    found = [_prediction(line, place) for place, line in lines]
    if not found:
        raise DataError(f"{path} holds no prediction; write it with --predictions")
    return found


def _prediction(line: str, place: str) -> Prediction:
    try:
        value = json.loads(line)
        for name in ("answers", "positive_ids"):
            value[name] = tuple(value[name])
        value["passages"] = tuple(ReadPassage(**passage) for passage in value["passages"])
        for name, score in value["scores"].items():
            if isinstance(score, bool) or not math.isfinite(score):
                raise ValueError(f"the score {name!r} is {score}")
        return Prediction(**value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{place} is no prediction ({error}); write the file with --predictions") from None
