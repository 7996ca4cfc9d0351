"""An answer and its evidence for a person: bars of prior and posterior, and which passage carried each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ragstone.cli.console import out
from ragstone.knowledge import Hit, Passage

__all__ = ["print_answer", "print_hits"]

BAR = 12
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red", "bright_green", "bright_cyan", "bright_magenta")
SHADES = " ░▒▓█"
NULL, NULL_COLOUR = "∅", "bright_black"


def print_hits(hits: Sequence[Hit]) -> None:
    """Passages with their scores."""
    if not hits:
        out.print("No passage was found.")
    for rank, hit in enumerate(hits, start=1):
        out.print(f"[bold]{rank}.[/] [cyan]{hit.score:.3f}[/] {_title(hit.passage)}")
        out.print(Text(f"   {hit.passage.text}", style="dim"))


def print_answer(answer: Any, *, explain: bool) -> None:
    """The answer, where it comes from and, to ``explain``, how much each passage had to do with it."""
    out.print(Text(answer.text or "(nothing)", style="bold"))
    if not answer.found:
        out.print("[dim]none of the passages supports this answer[/]")
    if not explain:
        if answer.found:
            best = max(answer.passages, key=lambda evidence: evidence.posterior)
            out.print(f"[dim]from[/] {_title(best.passage)} [dim]({best.posterior:.0%} of the posterior)[/]")
        return
    length = len(answer.tokens)
    per_token = f", {math.exp(answer.log_prob / length):.0%} a token" if length else ""
    out.print(
        f"[dim]RAG-{answer.method.title()}, log p(y|x) = {answer.log_prob:.2f} over {length} tokens{per_token}[/]\n"
    )
    _print_passages(answer)
    if answer.method == "token" and answer.tokens:
        _print_tokens(answer)


def _print_passages(answer: Any) -> None:
    """One row a passage, with bars of p(z|x) and p(z|x,y)."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("")
    table.add_column("prior p(z|x)", min_width=BAR + 5, no_wrap=True)
    table.add_column("posterior p(z|x,y)", min_width=BAR + 5, no_wrap=True)
    table.add_column("passage")
    for n, evidence in enumerate(answer.passages):
        colour = COLOURS[n % len(COLOURS)]
        table.add_row(
            Text(str(n + 1), style=f"bold {colour}"),
            _bar(evidence.prior, "white"),
            _bar(evidence.posterior, colour),
            Text.from_markup(
                f"{_title(evidence.passage)}\n[dim]{escape(_shorten(evidence.passage.text))}[/]", emoji=False
            ),
        )
    if answer.null_prior:
        bars = _bar(answer.null_prior, "white"), _bar(answer.null_posterior, NULL_COLOUR)
        table.add_row(Text(NULL, style=f"bold {NULL_COLOUR}"), *bars, Text("(no passage)", style="dim"))
    out.print(table)


def _print_tokens(answer: Any) -> None:
    """The paper's figure 2: a row a passage, a column a token, shaded by p(z|x,y_≤t)."""
    posteriors, marks = list(answer.token_posteriors), [str(k + 1) for k in range(len(answer.passages))]
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(marks))]
    if answer.null_prior:
        posteriors.append(1 - answer.token_posteriors.sum(axis=0).clip(max=1))
        marks, colours = [*marks, NULL], [*colours, NULL_COLOUR]
    out.print("\n[dim]which passage carried each token (p(z|x,y_≤t)):[/]")
    labels = [_visible(token) for token in answer.tokens]
    widths = [max(len(label), 2) for label in labels]
    for columns in _pages(widths, out.width - 4):
        out.print(Text("   " + " ".join(labels[t].ljust(widths[t]) for t in columns)))
        for mark, colour, posterior in zip(marks, colours, posteriors, strict=True):
            line = Text(f"{mark:>2} ", style=f"bold {colour}")
            for t in columns:
                shade = SHADES[round(float(posterior[t]) * (len(SHADES) - 1))]
                line.append(shade * widths[t] + " ", style=colour)
            out.print(line)
    carried = np.argmax(posteriors, axis=0).tolist()
    ended = not answer.text.endswith(answer.tokens[-1].strip())  # by a token that is none of its words
    text = Text("\n")
    for k, run in groupby(range(len(labels) - ended), key=lambda t: carried[t]):
        text.append("".join(answer.tokens[t] for t in run), style=colours[k])
        text.append(f"[{marks[k]}]", style="dim")
    out.print(text)


def _pages(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns 0 … T−1 in groups that fit into ``room`` characters."""
    pages: list[list[int]] = []
    used = room + 1
    for t, width in enumerate(widths):
        if used + width + 1 > room:
            pages.append([])
            used = 0
        pages[-1].append(t)
        used += width + 1
    return pages


def _bar(share: float, colour: str) -> Text:
    eighths = round(share * BAR * 8)
    full, rest = divmod(eighths, 8)
    drawn = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return Text(f"{drawn:<{BAR}} {share:>4.0%}", style=colour)


def _title(passage: Passage) -> str:
    """Title and file of a passage, as markup; --json has the whole path."""
    title = f"[bold]{escape(passage.title or passage.id)}[/]"
    page = f", page {passage.page}" if passage.page is not None else ""
    return f"{title} [dim]{escape(PurePath(passage.source).name)}{page}[/]" if passage.source else title


def _shorten(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _visible(token: str) -> str:
    """A token as it can be shown in a table cell."""
    return token.replace("\n", "⏎").strip() or "␣"
