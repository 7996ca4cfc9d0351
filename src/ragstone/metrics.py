"""How good answers and rankings are: strings and ids in, numbers from 0 to 1 out.

Where there are several accepted answers the best one counts; a lone string is one answer.
"""

from __future__ import annotations

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import groupby

from ragstone.errors import InputError

__all__ = [
    "accuracy",
    "contains",
    "exact_match",
    "f1",
    "has_answer",
    "hit_at_k",
    "matches_pattern",
    "ndcg_at_k",
    "normalize_answer",
    "recall_at_k",
    "reciprocal_rank",
    "search_pattern",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, English articles and extra white space (SQuAD's official evaluation).

    >>> normalize_answer("The  U.S. Senate!")
    'us senate'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: str | Iterable[str]) -> float:
    """Return 1 if the normalised prediction is one of the normalised answers (Rajpurkar et al. 2016, §6.1).

    >>> exact_match("The Beatles", ["Beatles", "Fab Four"])
    1.0
    """
    return float(normalize_answer(prediction) in map(normalize_answer, _listed(answers)))


def f1(prediction: str, answers: str | Iterable[str]) -> float:
    """Return the best F1 of normalised words, each counted as often as it occurs (Rajpurkar et al. 2016, §6.1).

    Of the two words predicted one is right, and it is half of the answer:

    >>> f1("Paul Simon", ["Paul McCartney"])
    0.5
    """
    return max((_f1(prediction, answer) for answer in _listed(answers)), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not expected:  # as in SQuAD 2.0
        return float(predicted == expected)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected))


def contains(prediction: str, answers: str | Iterable[str]) -> float:
    """Return 1 if the words of a normalised answer stand in the normalised prediction, in one run.

    >>> contains("It was written by Paul McCartney.", "Paul McCartney"), contains("a cart", "art")
    (1.0, 0.0)
    """
    words = f" {normalize_answer(prediction)} "
    return float(any(f" {normalize_answer(answer)} " in words for answer in _listed(answers)))


def has_answer(text: str, answers: str | Iterable[str]) -> bool:
    """Return whether the tokens of an answer stand in ``text`` in one run: what counts as a hit in open-domain QA.

    This is DPR's test (Karpukhin et al. 2020, ``SimpleTokenizer``): case is ignored, punctuation and articles count.

    >>> has_answer("Born in St. Louis, Missouri", "st. louis"), has_answer("a cart", "art")
    (True, False)
    """
    tokens = _spaced_tokens(text)
    return any(_spaced_tokens(answer) in tokens for answer in _listed(answers))


def _spaced_tokens(text: str) -> str:
    return f" {' '.join(_token_pattern().findall(unicodedata.normalize('NFD', text).lower()))} "


@lru_cache(maxsize=1)
def _token_pattern() -> re.Pattern[str]:
    """Compile DPR's ``[\\p{L}\\p{N}\\p{M}]+|[^\\p{Z}\\p{C}]``, which Python's ``re`` cannot spell."""
    kinds = {"L": "word", "N": "word", "M": "word", "Z": "blank", "C": "blank"}
    classes = {"word": "", "blank": ""}
    codes = range(sys.maxunicode + 1)
    for kind, run in groupby(codes, lambda code: kinds.get(unicodedata.category(chr(code))[0])):
        if kind:
            members = list(run)
            classes[kind] += f"\\U{members[0]:08x}-\\U{members[-1]:08x}"
    return re.compile(f"[{classes['word']}]+|[^{classes['blank']}]")


def accuracy(label: str, answers: str | Iterable[str]) -> float:
    """Return 1 if the label is one of the answers, letter by letter.

    >>> accuracy("SUPPORTS", "SUPPORTS"), accuracy("supports", "SUPPORTS")
    (1.0, 0.0)
    """
    return float(label in _listed(answers))


def matches_pattern(prediction: str, patterns: str | Iterable[str]) -> float:
    """Return 1 if the prediction begins with what a regular expression describes: exact match on CuratedTREC.

    As in DrQA's evaluation (Chen et al. 2017), case is ignored and what follows does not matter; end a pattern with
    ``$`` where it does.

    >>> matches_pattern("Christmas Day, 1914", "christmas|dec.* 25"), matches_pattern("On Christmas", "christmas")
    (1.0, 0.0)
    """
    text = prediction.strip()
    return float(any(_compiled(pattern).match(text) for pattern in _listed(patterns)))


def search_pattern(text: str, patterns: str | Iterable[str]) -> bool:
    """Return whether a regular expression matches anywhere in ``text``: `has_answer` for CuratedTREC.

    >>> search_pattern("It was on DECEMBER 25.", "christmas|dec.* 25")
    True
    """
    text = unicodedata.normalize("NFD", text)
    return any(_compiled(unicodedata.normalize("NFD", pattern)).search(text) for pattern in _listed(patterns))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"The answer {pattern!r} is no regular expression ({error}); mend it or drop regex") from None


def recall_at_k(ranked_ids: Sequence[str], positive_ids: Collection[str], k: int) -> float:
    """Return the share of the positives that are among the first ``k``.

    >>> recall_at_k(["a", "b", "c"], {"b", "z"}, k=2)
    0.5
    """
    positives = _positives(positive_ids)
    return len(positives.intersection(_first(ranked_ids, k))) / len(positives)


def hit_at_k(ranked_ids: Sequence[str], positive_ids: Collection[str], k: int) -> float:
    """Return 1 if any positive is among the first ``k`` (what DPR calls top-k accuracy).

    >>> hit_at_k(["a", "b", "c"], {"b", "z"}, k=2)
    1.0
    """
    return float(not _positives(positive_ids).isdisjoint(_first(ranked_ids, k)))


def reciprocal_rank(ranked_ids: Sequence[str], positive_ids: Collection[str]) -> float:
    """Return 1 over the rank of the first positive, 0 if there is none.

    >>> reciprocal_rank(["a", "b", "c"], {"b", "z"})
    0.5
    """
    positives = _positives(positive_ids)
    return next((1 / rank for rank, id_ in enumerate(ranked_ids, 1) if id_ in positives), 0.0)


def ndcg_at_k(ranked_ids: Sequence[str], positive_ids: Collection[str], k: int) -> float:
    """Return the discounted gain Σ 1/log2(rank + 1) of the positives among the first ``k``, over the best possible.

    Järvelin and Kekäläinen (2002), with gains of 0 and 1. The one positive stands at rank 3, where 1 / log2(4) = 1/2:

    >>> ndcg_at_k(["a", "b", "c"], {"c"}, k=3)
    0.5
    """
    positives = _positives(positive_ids)
    first = dict.fromkeys(_first(ranked_ids, k))
    gain = sum(1 / math.log2(rank + 1) for rank, id_ in enumerate(first, 1) if id_ in positives)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(positives), k) + 1))


def _listed(answers: str | Iterable[str]) -> Iterable[str]:
    return [answers] if isinstance(answers, str) else answers


def _first(ranked_ids: Sequence[str], k: int) -> Sequence[str]:
    if k < 1:
        raise InputError(f"k={k}: look at 1 or more of the ranked passages")
    return ranked_ids[:k]


def _positives(positive_ids: Collection[str]) -> set[str]:
    positives = {positive_ids} if isinstance(positive_ids, str) else set(positive_ids)
    if not positives:
        raise InputError("positive_ids is empty: leave questions without a gold passage out of a ranking's score")
    return positives
