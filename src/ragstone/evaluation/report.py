"""An evaluation as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ragstone.evaluation import plots, wording
from ragstone.evaluation.results import Evaluation, Prediction
from ragstone.evaluation.statistics import Comparison

__all__ = ["write_report"]

SHOWN_ERRORS = 20
SHOWN_CHARACTERS = 600
"""Of a passage."""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str = "Evaluation",
    sweep: Mapping[int, Evaluation] | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
) -> None:
    """Write summary, charts and the worst errors.

    Args:
        path: of the HTML file.
        evaluation: what is reported.
        title: of the page.
        sweep: the same with other numbers of passages, by K.
        comparisons: with another run, by score; see :func:`ragstone.evaluation.compare`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    predictions = evaluation.predictions
    mass = plots.correct_by_k(sweep) if sweep else plots.correct_by_mass(predictions)
    charts = [
        ("Retrieval", "How many questions have a relevant passage among the first k.", plots.recall_curve(predictions)),
        (
            "Passages and answers",
            "Right answers by the number of passages read."
            if sweep
            else "Right answers by how widely the prior is spread; questions in brackets.",
            mass,
        ),
        (
            "Calibration",
            "Right answers by the probability that the model gave them.",
            plots.calibration_diagram(predictions),
        ),
    ]
    figures = "".join(
        f"<figure><figcaption><b>{name}</b><br>{text}</figcaption>{svg}</figure>" for name, text, svg in charts if svg
    )
    settings = " · ".join(f"{escape(str(name))} <b>{escape(str(v))}</b>" for name, v in evaluation.settings.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=note>{len(predictions):,} questions{' · ' if settings else ''}{settings}</p>",
        _summary(evaluation),
        _comparison(comparisons) if comparisons else "",
        f"<section><h2>Charts</h2><div class=charts>{figures}</div></section>" if figures else "",
        _sweep(sweep) if sweep else "",
        _errors(predictions),
        _unanswered(predictions),
    ]
    Path(path).write_text(_PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body)), encoding="utf-8")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    names = "".join(f"<th scope=col>{name}</th>" for name in head)
    lines = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<div class=wide><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"


def _summary(evaluation: Evaluation) -> str:
    rows, explained = [], set()
    for group, names in wording.grouped(evaluation.summary).items():
        rows.append((f"<b>{group}</b>", "", ""))
        for name in names:
            note = wording.explanation(name)
            shown = "" if note in explained else f"<br><span class=note>{escape(note)}</span>"
            explained.add(note)
            value = f"<b>{wording.value_text(name, evaluation.summary[name])}</b>"
            interval = wording.interval_text(name, evaluation.intervals.get(name))
            rows.append((f"{escape(wording.title(name))}{shown}", value, interval))
    return f"<section><h2>Summary</h2>{_table(('', '', '95 % interval'), rows)}</section>"


def _comparison(comparisons: Mapping[str, Comparison]) -> str:
    rows = [
        (
            escape(wording.title(name)),
            wording.value_text(name, found.mean),
            wording.value_text(name, found.other_mean),
            f"<b>{wording.difference_text(found.difference)}</b>",
            " to ".join(map(wording.difference_text, found.interval)),
            f"{found.p_value:.4f}",
        )
        for name, found in comparisons.items()
    ]
    head = ("", "this run", "the other", "difference", "95 % interval", "p")
    note = "<p class=note>Paired by question; p of the two-sided permutation test.</p>"
    return f"<section><h2>Against the other run</h2>{_table(head, rows)}{note}</section>"


def _sweep(sweep: Mapping[int, Evaluation]) -> str:
    names = [n for n in wording.GROUPS["Answers"] if all(n in each.summary for each in sweep.values())]
    rows = [(str(k), *(wording.value_text(name, sweep[k].summary[name]) for name in names)) for k in sorted(sweep)]
    return f"<section><h2>By number of passages</h2>{_table(('K', *map(wording.title, names)), rows)}</section>"


def _errors(predictions: Sequence[Prediction]) -> str:
    """Wrong answers, those first of which the model was surest."""
    wrong = [p for p in predictions if not p.correct and not p.error]
    shown = sorted(wrong, key=lambda p: -(p.confidence or 0.0))[:SHOWN_ERRORS]
    if not shown:
        return ""
    what = f"{len(wrong):,} answers are wrong; here are the {len(shown)} that the model was surest of."
    return f"<section><h2>Worst errors</h2><p class=note>{what}</p>{''.join(map(_error, shown))}</section>"


def _error(prediction: Prediction) -> str:
    gold = set(prediction.positive_ids)
    passages = []
    for passage in prediction.passages:
        marks = [
            word for word, holds in (("gold", passage.id in gold), ("holds the answer", passage.holds_answer)) if holds
        ]
        text = passage.text if len(passage.text) <= SHOWN_CHARACTERS else f"{passage.text[:SHOWN_CHARACTERS]} …"
        passages.append(
            f"<li><b>{escape(passage.title or passage.id)}</b> <span class=note>{escape(passage.id)} · prior "
            f"{passage.prior:.0%} · posterior {passage.posterior:.0%}</span>"
            f"{''.join(f' <span class=mark>{mark}</span>' for mark in marks)}<br>{escape(text)}</li>"
        )
    return (
        f"<details><summary><b>{escape(prediction.question)}</b><br><span class=wrong>{escape(prediction.prediction)}</span>"
        f" <span class=note>({prediction.confidence or 0:.0%} sure)</span> instead of "
        f"<span class=right>{escape(' | '.join(prediction.answers))}</span></summary><ol>{''.join(passages)}</ol></details>"
    )


def _unanswered(predictions: Sequence[Prediction]) -> str:
    lost = [p for p in predictions if p.error]
    if not lost:
        return ""
    items = "".join(
        f"<li><b>{escape(p.question)}</b><br><span class=note>{escape(p.error)}</span></li>"
        for p in lost[:SHOWN_ERRORS]
    )
    return f"<section><h2>Unanswered</h2><p class=note>{len(lost):,} questions count as wrong.</p><ul>{items}</ul></section>"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --note: #5f6670; --right: #1c7c3c; --wrong: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --note: #a2abb6; --right: #62c584; --wrong: #f08a72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; background: Canvas;
  color: CanvasText; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.note { color: var(--note); font-size: .9em; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.mark { background: var(--right); color: Canvas; border-radius: .3em; padding: 0 .4em; font-size: .8em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0 0 1rem; min-width: min(100%, 40rem); font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
tbody th { font-weight: normal; } td { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; }
li { margin: .6rem 0; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
