"""How good generated texts are: strings in, numbers from 0 to 1 out (paper §4.2, tables 2 and 5).

BLEU-1 and the share of distinct trigrams belong to a whole set of texts, ROUGE-L and Q-BLEU-1 to one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

from ragstone._extras import extra
from ragstone.errors import InputError

__all__ = ["bleu_1", "distinct_ngrams", "q_bleu_1", "rouge_l"]


def rouge_l(prediction: str, answers: str | Iterable[str]) -> float:
    """Return the best F1 of the longest common subsequence of words (Lin 2004), as rouge-score has it, unstemmed.

    Three words of four are in order in both:

    >>> rouge_l("the cat sat down", ["the cat lay down"])
    0.75
    """
    scorer = extra("evaluation", "rouge_score.rouge_scorer", "ROUGE-L").RougeScorer(["rougeL"])
    listed = [answers] if isinstance(answers, str) else list(answers)
    return float(scorer.score_multi(listed, prediction)["rougeL"].fmeasure) if listed else 0.0


def bleu_1(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """Return BLEU of single words over a whole set (Papineni et al. 2002), as sacrebleu has it; 0 without any.

    Four of six words are right, and the texts are as long as they should be:

    >>> round(bleu_1(["a cat sat", "it is so"], [["a cat lay"], ["it is not"]]), 3)
    0.667
    """
    if len(predictions) != len(answers):
        raise InputError(f"{len(predictions)} predictions came with {len(answers)} answers; pass one list for each")
    listed = [[each] if isinstance(each, str) else list(each) or [""] for each in answers]  # no word matches ""
    references = [list(column) for column in zip_longest(*listed)]
    metric = extra("evaluation", "sacrebleu.metrics", "BLEU").BLEU(max_ngram_order=1)
    return float(metric.corpus_score(list(predictions), references).score / 100) if listed else 0.0


def distinct_ngrams(texts: Iterable[str], n: int = 3) -> float:
    """Return the ratio of different n-grams of words to all n-grams of a set of texts (paper, table 5); 0 without any.

    >>> distinct_ngrams(["to be or not to be"], n=2)
    0.8
    """
    words = [text.split() for text in texts]
    grams = list(chain.from_iterable(zip(*(line[start:] for start in range(n)), strict=False) for line in words))
    return len(set(grams)) / len(grams) if grams else 0.0


Q_BLEU_WEIGHTS = {"named": 0.6, "type": 0.2, "content": 0.1, "function": 0.1}
"""Of named entities, question type, content words and function words; what the authors publish for SQuAD."""
Q_BLEU_DELTA = 0.7
"""The weight of answerability against BLEU-1; also theirs."""

_QUESTION_WORDS = frozenset(["what", "which", "why", "who", "whom", "whose", "where", "when", "how"])
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about above after again against all am an and any are as at be because been before being below between both but
    by can did do does doing don down during each few for from further had has have having he her here hers herself him
    himself his i if in into is it its itself just me more most my myself no nor not now of off on only or other our ours
    ourselves out over own s same she should so some such t than that the their theirs them themselves then there these
    they this those through to too under until up very was we were while will with you your yours yourself
    yourselves""",
    )
)


def q_bleu_1(prediction: str, answers: str | Iterable[str]) -> float:
    """Return how answerable a generated question is, mixed with its BLEU-1 (Nema and Khapra 2018, §5).

    Q-BLEU-1 = δ·A + (1−δ)·BLEU-1 with A = Σ_i w_i·F_i over the named entities (0.6), the question type (0.2), the
    content words (0.1) and the function words (0.1) of both questions, and δ = 0.7: the weights that the authors'
    script ``answerability_score.py`` is published with. As there, F_i is the harmonic mean of the BLEU-1 of either
    question's words against the other's, 0 where one of them has none; words that are written with a capital count
    as names; after *what* or *which* the next word belongs to the type. The best reference counts. Words are runs of
    letters and digits here, where the script runs Stanford's tokenizer.

    The authors' own test: A = 0.6 (Is) + 0.1 · 1/2 (question) + 0.1 (is this a), and BLEU-1 is 4/5.

    >>> round(q_bleu_1("Is this a great question?", "Is this a good question?"), 3)
    0.765
    """
    listed = [answers] if isinstance(answers, str) else answers
    return max((_q_bleu_1(prediction, answer) for answer in listed), default=0.0)


def _q_bleu_1(prediction: str, reference: str) -> float:
    ours, theirs = _components(prediction), _components(reference)
    answerability = sum(weight * _harmonic(ours[kind], theirs[kind]) for kind, weight in Q_BLEU_WEIGHTS.items())
    return Q_BLEU_DELTA * answerability + (1 - Q_BLEU_DELTA) * _sentence_bleu_1(ours["all"], theirs["all"])


def _components(question: str) -> dict[str, list[str]]:
    words = re.findall(r"\w+(?:['’-]\w+)*", question)
    kinds = [word.lower() in _QUESTION_WORDS for word in words]
    typed = {n for n, is_type in enumerate(kinds) if is_type}
    typed |= {n + 1 for n in typed if words[n].lower() in ("what", "which") and n + 1 < len(words)}
    types = {words[n] for n in typed}
    rest = words[1:] if kinds[:1] == [True] else words
    parts = {
        "all": words,
        "type": [words[n] for n in sorted(typed)],
        "named": [word for word in rest if word[0].isupper()],
        "content": [w for w in words if w not in types and not w[0].isupper() and w not in _FUNCTION_WORDS],
        "function": [word for word in words if word.lower() in _FUNCTION_WORDS],
    }
    return {kind: [word.lower() for word in found] for kind, found in parts.items()}


def _harmonic(ours: list[str], theirs: list[str]) -> float:
    precision, recall = _sentence_bleu_1(ours, theirs), _sentence_bleu_1(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _sentence_bleu_1(hypothesis: list[str], reference: list[str]) -> float:
    shared = (Counter(hypothesis) & Counter(reference)).total()
    if not shared:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
    return brevity * shared / len(hypothesis)
