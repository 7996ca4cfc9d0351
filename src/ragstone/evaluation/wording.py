"""What the numbers of a summary are called, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["GROUPS", "difference_text", "explanation", "grouped", "interval_text", "title", "value_text"]

_TITLES = {
    "accuracy": ("Accuracy", "the most probable label is the right one"),
    "exact_match": ("Exact match", "the answer is an accepted one, but for case, punctuation and articles"),
    "f1": ("F1", "words shared with the closest accepted answer"),
    "contains": ("Contains", "an accepted answer stands in the answer"),
    "rouge_l": ("ROUGE-L", "longest common subsequence with the closest reference"),
    "bleu_1": ("BLEU-1", "words shared with the references, over the whole set"),
    "q_bleu_1": ("Q-BLEU-1", "BLEU-1 mixed with how answerable a generated question is"),
    "distinct_trigrams": ("Distinct trigrams", "different trigrams among all that were written"),
    "correct_where_found": ("Correct where found", "right answers among the questions with such a passage"),
    "reading_errors": ("Reading errors", "questions answered wrongly from passages among which one was relevant"),
    "retrieval_errors": ("Retrieval errors", "questions answered wrongly for want of a relevant passage"),
    "recall": ("Recall", "gold passages found; where none is known, whether a passage holds an answer"),
    "hit": ("Hit", "questions with at least one such passage"),
    "ndcg": ("nDCG", "the same, counting early ranks more"),
    "reciprocal_rank": ("MRR", "mean of 1 / rank of the first such passage"),
    "calibration_error": ("Calibration error", "expected distance between probability and correctness, 10 bins"),
    "posterior_entropy": ("Posterior entropy", "of p(z|x,y): how many passages an answer draws on"),
    "posterior_entropy_share": ("… of log K", "1: all passages matter alike; the generator may ignore them"),
    "same_passages": (
        "Same passages",
        "questions whose passages another question got too; near 1: retrieval collapsed",
    ),
}
_NATS = ("posterior_entropy",)
GROUPS = {
    "Answers": ("accuracy", "exact_match", "f1", "contains", "rouge_l", "bleu_1", "q_bleu_1", "distinct_trigrams"),
    "Errors": ("correct_where_found", "reading_errors", "retrieval_errors"),
    "Retrieval": ("recall", "hit", "ndcg", "reciprocal_rank"),
    "Probabilities": ("calibration_error", "posterior_entropy", "posterior_entropy_share", "same_passages"),
}


def _family(name: str) -> tuple[str, str]:
    """The metric and, for one at a rank, the rank."""
    family, _, rank = name.partition("_at_")
    return family, rank


def title(name: str) -> str:
    """Return the name to show.

    >>> title("recall_at_5"), title("reciprocal_rank")
    ('Recall@5', 'MRR')
    """
    family, rank = _family(name)
    shown = _TITLES.get(family, (family, ""))[0]
    return f"{shown}@{rank}" if rank else shown


def explanation(name: str) -> str:
    """Return what the number means, in a few words."""
    return _TITLES.get(_family(name)[0], ("", ""))[1]


def value_text(name: str, value: float) -> str:
    """Return a value as it is written: a percentage, or nats.

    >>> value_text("f1", 0.5), value_text("posterior_entropy", 1.25)
    ('50.0 %', '1.250 nats')
    """
    return f"{value:.3f} nats" if name in _NATS else f"{100 * value:.1f} %"


def interval_text(name: str, interval: tuple[float, float] | None) -> str:
    """Return an interval as it is written; empty where there is none."""
    if interval is None:
        return ""
    low, high = (value_text(name, bound).removesuffix(" %").removesuffix(" nats") for bound in interval)
    return f"{low} – {high}"


def difference_text(value: float) -> str:
    """Return a difference of two fractions, in percentage points.

    >>> difference_text(-0.05)
    '−5.0'
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort the names of a summary into `GROUPS`; within a metric by rank.

    >>> grouped(["f1", "recall_at_10", "recall_at_5"])
    {'Answers': ['f1'], 'Retrieval': ['recall_at_5', 'recall_at_10']}
    """
    known = [(family, group) for group, families in GROUPS.items() for family in families]
    places = {family: n for n, (family, _) in enumerate(known)}
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: (places[_family(n)[0]], int(_family(n)[1] or 0))):
        groups.setdefault(known[places[_family(name)[0]]][1], []).append(name)
    return groups
