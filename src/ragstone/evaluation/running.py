"""Questions through a pipeline, and what comes out of it judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ragstone import metrics
from ragstone.errors import InputError, RagstoneError
from ragstone.evaluation.results import Evaluation, Prediction, ReadPassage, summarize
from ragstone.evaluation.texts import q_bleu_1, rouge_l
from ragstone.evaluation.trec import Run
from ragstone.questions import Question

if TYPE_CHECKING:
    from ragstone.answers import Answer
    from ragstone.pipeline import RagPipeline

__all__ = ["depths", "evaluate", "judge"]

Progress = Callable[[int, int, str], None]
DEPTHS = (1, 3, 5, 10, 20, 50, 100)
"""Ranks k at which rankings are judged, as far as they reach."""


def evaluate(
    rag: RagPipeline,
    questions: Sequence[Question],
    *,
    k: int | None = None,
    search: str = "dense",
    where: str | None = None,
    prior: str = "dense",
    run: Run | None = None,
    labels: Sequence[str] | None = None,
    regex: bool = False,
    generation: bool = False,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Answer questions and judge the answers, the passages and the probabilities.

    A question that cannot be answered (no passage is found, or it is too long) counts as wrong, and
    ``Prediction.error`` says why. Where none of the first questions can be, the first error is raised instead.

    Args:
        rag: the model.
        questions: with distinct ids.
        k, search, where, prior: as in calling the pipeline; ``k`` is the model's ``n_docs`` by default.
        run: read these passages instead of searching, with their scores as the logits of the prior
            (:func:`ragstone.evaluation.read_run`); their texts come from the knowledge base.
        labels: classify instead of generate: the prediction is the most probable of these.
        regex: the answers are regular expressions, as in CuratedTREC.
        generation: also ROUGE-L, BLEU-1, Q-BLEU-1 and the share of distinct trigrams.
        max_new_tokens: of an answer.
        seed: of the bootstrap intervals.
        progress: called as ``progress(done, total, "questions")``.
        options: those of the pipeline and of transformers' ``generate``.

    Raises:
        InputError: there is no question, options do not fit, or an answer is none of the labels.
    """
    from ragstone.pipeline import questions_per_batch

    k = rag.model.config.n_docs if k is None else k
    _check(questions, labels, regex=regex, generation=generation)
    retrieval: dict[str, Any] = {"k": k, "search": search, "where": where, "prior": prior}
    if run is not None:
        if where is not None:
            raise InputError(f"where={where!r} filters what a search finds; a run is read as it is, so leave one out")
        retrieval = {"prior": "search"}

    def answer(some: Sequence[Question], passages: Any) -> list[Answer]:
        texts = [question.question for question in some]
        given = {} if passages is None else {"passages": passages}
        if labels is not None:
            return rag.choose(texts, labels, **retrieval, **given)
        return rag(texts, max_new_tokens=max_new_tokens, **retrieval, **given, **options)

    predictions: list[Prediction] = []
    size = questions_per_batch(rag.model.generator.device, k)
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        answers = list(_answer_each(answer, some, _hits(rag, some, run, k)))
        failures = [each for each in answers if isinstance(each, RagstoneError)]
        if not predictions and len(failures) == len(answers):
            raise failures[0]
        predictions += [
            judge(question, each, k, labels=labels is not None, regex=regex, generation=generation)
            for question, each in zip(some, answers, strict=True)
        ]
        if progress is not None:
            progress(len(predictions), len(questions), "questions")
    settings = {"method": rag.method, "k": k, "search": "run" if run is not None else search, "prior": prior}
    if run is not None:
        settings["prior"] = "search"
    return summarize(predictions, seed=seed, settings=settings | ({"where": where} if where else {}))


def _check(questions: Sequence[Question], labels: Sequence[str] | None, *, regex: bool, generation: bool) -> None:
    if not questions:
        raise InputError("There are no questions; evaluate at least 1")
    if labels is not None and (regex or generation):
        raise InputError("labels are compared as they are; leave out regex and generation")
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(id_ for n, id_ in enumerate(ids) if id_ in ids[:n])
        raise InputError(f"Two questions have the id {twice!r}; give each an id of its own")
    for question in questions:
        if labels is not None and not set(question.answers) <= set(labels):
            raise InputError(
                f"The question {question.id!r} has the answers {list(question.answers)}, not all among the labels "
                f"{list(labels)}; name every label"
            )
        if regex:
            metrics.search_pattern("", question.answers)  # a broken one is said before anything is computed


def _answer_each(
    answer: Callable[[Sequence[Question], Any], list[Answer]],
    questions: Sequence[Question],
    hits: list[Any] | None,
) -> Iterator[Answer | RagstoneError]:
    """All together; one by one where that fails, so that one question does not take others with it."""
    try:
        yield from answer(questions, hits)
        return
    except RagstoneError:
        pass
    for n, question in enumerate(questions):
        try:
            if hits is not None and not hits[n]:
                raise InputError(f"The run ranks no passage for the question {question.id!r}.")
            yield answer([question], None if hits is None else [hits[n]])[0]
        except RagstoneError as error:
            yield error


def _hits(rag: RagPipeline, questions: Sequence[Question], run: Run | None, k: int) -> list[Any] | None:
    """What a run ranks first, as hits for each question."""
    if run is None:
        return None
    import numpy as np

    from ragstone.knowledge import Hit

    if rag.knowledge_base is None:
        raise InputError("A run names passages by id; give the pipeline the knowledge base that holds them")
    ranked = [run.get(question.id, [])[:k] for question in questions]
    ids = list(dict.fromkeys(id_ for row in ranked for id_, _ in row))
    passages = dict(zip(ids, rag.knowledge_base.get(ids), strict=True)) if ids else {}
    return [[Hit(passages[id_], score, np.empty(0)) for id_, score in row] for row in ranked]


def judge(
    question: Question,
    answer: Answer | RagstoneError,
    k: int,
    *,
    labels: bool = False,
    regex: bool = False,
    generation: bool = False,
) -> Prediction:
    """The prediction of one question, with its scores, from an answer or from what went wrong; ``k`` passages at most."""
    holds = metrics.search_pattern if regex else metrics.has_answer
    error = str(answer) if isinstance(answer, RagstoneError) else ""
    text, log_prob, confidence = "", None, None
    passages: tuple[ReadPassage, ...] = ()
    if not isinstance(answer, RagstoneError):
        text, log_prob = answer.text, answer.log_prob
        confidence = math.exp(log_prob)
        if labels:
            confidence = 1 / sum(math.exp(other.log_prob - log_prob) for other in (answer, *answer.alternatives))
        passages = tuple(
            ReadPassage(
                e.passage.id,
                e.passage.title,
                e.passage.text,
                e.score,
                e.prior,
                e.posterior,
                holds(e.passage.text, question.answers),
            )
            for e in answer.passages
        )
    answered = 0.0 if error else 1.0  # an empty answer may match a strange pattern; no answer does not
    scores = _answer_scores(text, question.answers, labels=labels, regex=regex, generation=generation)
    scores = {name: answered * score for name, score in scores.items()}
    right = bool(scores["accuracy" if labels else "exact_match"])
    relevant = question.positive_ids or tuple(p.id for p in passages if p.holds_answer)
    if question.positive_ids or not labels:  # a label does not stand in a passage
        scores |= _ranking_scores([p.id for p in passages], relevant, k, known=bool(question.positive_ids))
    return Prediction(
        question.id,
        question.question,
        question.answers,
        question.positive_ids,
        text,
        log_prob,
        confidence,
        right,
        scores,
        passages,
        error,
    )


def _answer_scores(
    text: str, answers: Sequence[str], *, labels: bool, regex: bool, generation: bool
) -> dict[str, float]:
    if labels:
        return {"accuracy": metrics.accuracy(text, answers)}
    if regex:
        scores = {
            "exact_match": metrics.matches_pattern(text, answers),
            "contains": float(metrics.search_pattern(text, answers)),
        }
    else:
        scores = {
            "exact_match": metrics.exact_match(text, answers),
            "f1": metrics.f1(text, answers),
            "contains": metrics.contains(text, answers),
        }
    if generation:
        scores |= {"rouge_l": rouge_l(text, answers), "q_bleu_1": q_bleu_1(text, answers)}
    return scores


def depths(k: int) -> list[int]:
    """The ranks at which a ranking of ``k`` passages is judged.

    >>> depths(5), depths(4)
    ([1, 3, 5], [1, 3, 4])
    """
    return sorted({depth for depth in DEPTHS if depth < k} | {k})


def _ranking_scores(ranked: Sequence[str], relevant: Sequence[str], k: int, *, known: bool) -> dict[str, float]:
    """Recall, hits, reciprocal rank and nDCG.

    Where the gold passages are not known those that hold an answer count, and recall is whether there is any.
    """
    scores: dict[str, float] = {}
    for depth in depths(k):
        hit = metrics.hit_at_k(ranked, relevant, depth) if relevant else 0.0
        scores[f"recall_at_{depth}"] = metrics.recall_at_k(ranked, relevant, depth) if known else hit
        scores[f"hit_at_{depth}"] = hit
        scores[f"ndcg_at_{depth}"] = metrics.ndcg_at_k(ranked, relevant, depth) if relevant else 0.0
    scores["reciprocal_rank"] = metrics.reciprocal_rank(ranked, relevant) if relevant else 0.0
    return scores
