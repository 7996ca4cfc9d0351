"""Questions through a pipeline, and what comes out of it judged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ragstone import metrics
from ragstone.errors import InputError, ModelError, RagstoneError
from ragstone.evaluation.results import Evaluation, Prediction, ReadPassage, summarize
from ragstone.evaluation.texts import q_bleu_1, rouge_l
from ragstone.evaluation.trec import Run
from ragstone.questions import Question

if TYPE_CHECKING:
    from ragstone.answers import Answer
    from ragstone.knowledge import KnowledgeBase
    from ragstone.pipeline import RagPipeline

__all__ = ["depths", "evaluate", "judge"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
DEPTHS = (1, 3, 5, 10, 20, 50, 100)
"""Ranks k at which rankings are judged, as far as they reach."""
FIRST_QUESTIONS = 8
"""Where none of so many can be answered, none is expected to be."""
_gold_looked_up: WeakKeyDictionary[KnowledgeBase, tuple[str, ...]] = WeakKeyDictionary()
"""The gold passages that were last looked up, so that a sweep warns once."""


def evaluate(
    rag: RagPipeline,
    questions: Sequence[Question],
    *,
    k: int | None = None,
    search: str | None = None,
    where: str | None = None,
    prior: str = "dense",
    run: Run | None = None,
    labels: Sequence[str] | None = None,
    regex: bool = False,
    generation: bool = False,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Answer questions and judge the answers, the passages and the probabilities.

    A question that cannot be answered (no passage is found, or it is too long) counts as wrong, and
    ``Prediction.error`` says why. Where none of the first 8 questions can be, the first error is raised instead.

    Args:
        rag: the model.
        questions: with distinct ids.
        k, search, where, prior: as in calling the pipeline; ``k`` is the model's ``n_docs`` by default, and ``search``
            is ``"dense"``.
        run: read these passages instead of searching, with their scores as the logits of the prior
            (:func:`ragstone.evaluation.read_run`); their texts come from the knowledge base.
        labels: classify instead of generate: the prediction is the most probable of these.
        regex: the answers are regular expressions, as in CuratedTREC.
        generation: also ROUGE-L, BLEU-1, Q-BLEU-1 and the share of distinct trigrams.
        max_new_tokens: of an answer, 32 by default.
        seed: of the bootstrap intervals.
        progress: called as ``progress(done, total, "questions")``.
        options: those of the pipeline and of transformers' ``generate``.

    Raises:
        InputError: there is no question, options do not fit, or an answer is none of the labels.
        ModelError: the probabilities of the first answers are NaN.
    """
    from ragstone.pipeline import questions_per_batch

    k = rag.model.config.n_docs if k is None else k
    if max_new_tokens is not None:
        options = {"max_new_tokens": max_new_tokens, **options}
    _check(questions, labels, options, seed=seed, regex=regex, generation=generation)
    if labels is None:
        options = {"max_new_tokens": 32, **options}
        _check_length(rag, options["max_new_tokens"])
    retrieval: dict[str, Any] = {"k": k, "search": search or "dense", "where": where, "prior": prior}
    settings = {"method": rag.method, **retrieval}
    if run is not None:
        _check_run(rag, questions, run, k, search=search, where=where)
        retrieval = {"prior": "search"}
        settings |= {"search": "run", "prior": "search"}
    _report_lost_gold(rag.knowledge_base, questions)

    def answer(some: Sequence[Question], passages: Any) -> list[Answer]:
        texts = [question.question for question in some]
        given = {} if passages is None else {"passages": passages}
        if labels is not None:
            return rag.choose(texts, labels, **retrieval, **given)
        return rag(texts, **retrieval, **given, **options)

    predictions: list[Prediction] = []
    failures: list[RagstoneError] = []
    first = min(FIRST_QUESTIONS, len(questions))
    size = questions_per_batch(rag.model.generator.device, min(k, len(rag.retriever.index)))
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        answers = [_with_number(each) for each in _answer_each(answer, some, _hits(rag, some, run, k))]
        failures += [each for each in answers if isinstance(each, RagstoneError)]
        predictions += [
            judge(question, each, k, labels=labels is not None, regex=regex, generation=generation)
            for question, each in zip(some, answers, strict=True)
        ]
        if len(predictions) >= first and all(each.error for each in predictions[:first]):
            raise failures[0]
        if progress is not None:
            progress(len(predictions), len(questions), "questions")
    return summarize(predictions, seed=seed, settings={name: v for name, v in settings.items() if v is not None})


def _check(
    questions: Sequence[Question],
    labels: Sequence[str] | None,
    options: Mapping[str, Any],
    *,
    seed: int,
    regex: bool,
    generation: bool,
) -> None:
    if not questions:
        raise InputError("There are no questions; evaluate at least 1")
    if seed < 0:
        raise InputError(f"seed={seed}: take 0 or a positive number")
    if labels is not None and options:
        raise InputError(f"labels are chosen from and no answer is written; leave out {' and '.join(options)}")
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


def _check_length(rag: RagPipeline, max_new_tokens: int) -> None:
    config = rag.model.generator.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)  # T5 counts relative positions and has no limit
    if positions is not None and max_new_tokens > positions:
        raise InputError(
            f"max_new_tokens={max_new_tokens}: the generator has {positions} positions; take so many at most"
        )


def _check_run(
    rag: RagPipeline, questions: Sequence[Question], run: Run, k: int, *, search: str | None, where: str | None
) -> None:
    """Say before the first answer what would spoil a later one."""
    if search is not None:
        raise InputError(f"search={search!r} finds passages; a run is read as it is, so leave one out")
    if where is not None:
        raise InputError(f"where={where!r} filters what a search finds; a run is read as it is, so leave one out")
    if rag.knowledge_base is None:
        raise InputError("A run names passages by id; give the pipeline the knowledge base that holds them")
    ids = _ranked_ids(questions, run, k)
    known = rag.knowledge_base.known(ids)
    lost = [id_ for id_ in ids if id_ not in known]
    if lost:
        asked = next(question.id for question in questions if lost[0] in _ranked_ids([question], run, k))
        raise InputError(
            f"{rag.knowledge_base.path} lacks {len(lost)} of the {len(ids)} passages that the run ranks, such as "
            f"{lost[0]!r} for the question {asked!r}; evaluate with the base that the run was made from"
        )


def _report_lost_gold(base: KnowledgeBase | None, questions: Sequence[Question]) -> None:
    gold = tuple(dict.fromkeys(id_ for question in questions for id_ in question.positive_ids))
    if base is None or not gold or _gold_looked_up.get(base) == gold:
        return
    _gold_looked_up[base] = gold
    known = base.known(gold)
    lost = [id_ for id_ in gold if id_ not in known]
    if lost:
        logger.warning(
            "%d of %d gold passages are not in %s, such as %r, and count as not found.",
            len(lost),
            len(gold),
            base.path,
            lost[0],
        )


def _with_number(answer: Answer | RagstoneError) -> Answer | RagstoneError:
    """The answer, or an error where its probability is NaN."""
    if isinstance(answer, RagstoneError) or not math.isnan(answer.log_prob):
        return answer
    return ModelError(
        "The model's probabilities are no numbers (NaN): its weights hold NaN, or overflow; take another checkpoint, "
        "or compute in float32"
    )


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


def _ranked_ids(questions: Sequence[Question], run: Run, k: int) -> list[str]:
    return list(dict.fromkeys(id_ for question in questions for id_, _ in run.get(question.id, [])[:k]))


def _hits(rag: RagPipeline, questions: Sequence[Question], run: Run | None, k: int) -> list[Any] | None:
    """What a run ranks first, as hits for each question."""
    if run is None:
        return None
    import numpy as np

    from ragstone.knowledge import Hit

    assert rag.knowledge_base is not None
    ids = _ranked_ids(questions, run, k)
    passages = dict(zip(ids, rag.knowledge_base.get(ids), strict=True))
    ranked = [run.get(question.id, [])[:k] for question in questions]
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
