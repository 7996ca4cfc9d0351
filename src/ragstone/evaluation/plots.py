"""The charts of a report: predictions in, SVG out. Ink is ``currentColor``, so a chart follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ragstone._extras import extra
from ragstone.evaluation.diagnosis import calibration_bins
from ragstone.evaluation.results import Evaluation, Prediction
from ragstone.evaluation.statistics import bootstrap_interval
from ragstone.metrics import hit_at_k, recall_at_k

__all__ = ["MASS", "calibration_diagram", "correct_by_k", "correct_by_mass", "main_score", "recall_curve"]

BLUE, ORANGE = "#2f86c8", "#d9822b"
_INK = "#010203"
"""Stands for the page's own text colour until the SVG is written."""
MASS = 0.9
"""The share of the prior that counts as all of it."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ragstone",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 2,
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], _INK),
    "grid.color": _INK,
}


def main_score(evaluation: Evaluation) -> str:
    """The score that says whether an answer is right: ``"accuracy"`` of labels, else ``"exact_match"``."""
    return "accuracy" if "accuracy" in evaluation.summary else "exact_match"


def _chart(name: str, description: str, xlabel: str, ylabel: str, draw: Callable[[Any], None]) -> str:
    """An SVG element to put into a page; ``name`` keeps its ids apart from those of other charts."""
    parts = ("matplotlib", "matplotlib.figure", "matplotlib.ticker")
    matplotlib, figures, tickers = (extra("evaluation", part, "The report") for part in parts)
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(tickers.PercentFormatter(1.0))
        draw(axes)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'<svg (.*?)(?:width|height)="[^"]*"(.*?)(?:width|height)="[^"]*"',
        rf'<svg role="img" aria-label="{description}" \1\2',
        svg,
        count=1,
    )


def recall_curve(predictions: Sequence[Prediction]) -> str:
    """How hits, and recall where all gold passages are known, grow with the number of passages looked at."""
    judged = [p for p in predictions if "reciprocal_rank" in p.scores]
    k = max((len(p.passages) for p in judged), default=0)
    if not k:
        return ""

    def mean(score: Callable[[list[str], Sequence[str], int], float], rank: int) -> float:
        found = [([x.id for x in p.passages], p.relevant_ids) for p in judged]
        return sum(score(ids, relevant, rank) for ids, relevant in found if relevant) / len(judged)

    ranks = range(1, k + 1)
    hits = [mean(hit_at_k, rank) for rank in ranks]

    def draw(axes: Any) -> None:
        axes.plot(ranks, hits, marker="o", color=BLUE, label="hit@k")
        if all(p.positive_ids for p in judged):
            axes.plot(ranks, [mean(recall_at_k, rank) for rank in ranks], marker="s", color=ORANGE, label="recall@k")
        axes.set_xticks(ranks[:: max(k // 10, 1)])
        axes.legend(loc="lower right")

    description = f"hit at 1: {hits[0]:.0%}, hit at {k}: {hits[-1]:.0%}"
    return _chart("recall", description, "passages looked at", "questions", draw)


def correct_by_k(sweep: Mapping[int, Evaluation]) -> str:
    """How right the answers are with K passages, and the 95 % intervals."""
    ks = sorted(sweep)
    name = main_score(sweep[ks[0]])
    means = [sweep[k].summary[name] for k in ks]
    bounds = [sweep[k].intervals.get(name, (mean, mean)) for k, mean in zip(ks, means, strict=True)]
    return _with_intervals("sweep", "passages read (K)", list(map(str, ks)), means, bounds)


def correct_by_mass(predictions: Sequence[Prediction]) -> str:
    """How right the answers are, by the number of passages that hold 90 % of the prior; how many questions in brackets."""
    groups: dict[int, list[float]] = {}
    for prediction in predictions:
        if not prediction.error:
            shares = accumulate(sorted((p.prior for p in prediction.passages), reverse=True))
            needed = next((n for n, share in enumerate(shares, 1) if share >= MASS), len(prediction.passages))
            groups.setdefault(needed, []).append(float(prediction.correct))
    if not groups:
        return ""
    numbers = sorted(groups)
    names = [f"{n}\n({len(groups[n]):,})" for n in numbers]
    means = [sum(groups[n]) / len(groups[n]) for n in numbers]
    bounds = [bootstrap_interval(groups[n]) for n in numbers]
    return _with_intervals("mass", f"passages that hold {MASS:.0%} of the prior", names, means, bounds)


def _with_intervals(
    name: str, xlabel: str, names: Sequence[str], means: Sequence[float], bounds: Sequence[tuple[float, float]]
) -> str:
    def draw(axes: Any) -> None:
        below = [mean - low for mean, (low, _) in zip(means, bounds, strict=True)]
        above = [high - mean for mean, (_, high) in zip(means, bounds, strict=True)]
        axes.errorbar(names, means, yerr=[below, above], fmt="o", color=BLUE, capsize=4)
        axes.margins(x=0.15)

    description = ", ".join(f"{each}: {mean:.0%}" for each, mean in zip(names, means, strict=True))
    return _chart(name, " ".join(description.split()), xlabel, "right answers", draw)


def calibration_diagram(predictions: Sequence[Prediction]) -> str:
    """Whether answers are right as often as their probability says; a dot's area is its number of answers."""
    answered = [p for p in predictions if not p.error]
    if not answered:
        return ""
    bins = calibration_bins([min(p.confidence or 0.0, 1.0) for p in answered], [p.correct for p in answered])
    sure, right = [b.confidence for b in bins], [b.accuracy for b in bins]

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.4, linestyle="--", linewidth=1, label="calibrated")
        axes.plot(sure, right, color=BLUE, linewidth=1)
        axes.scatter(
            sure, right, s=[20 + 400 * b.count / len(answered) for b in bins], color=BLUE, zorder=3, clip_on=False
        )
        axes.set(xlim=(0, 1))
        axes.xaxis.set_major_formatter(extra("evaluation", "matplotlib.ticker", "The report").PercentFormatter(1.0))
        axes.legend(loc="upper left")

    description = "; ".join(f"of {b.confidence:.0%} sure answers {b.accuracy:.0%} are right" for b in bins)
    return _chart("calibration", description, "probability of the answer", "right answers", draw)
