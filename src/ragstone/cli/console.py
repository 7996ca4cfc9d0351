"""Where the command line writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ragstone.errors import RagstoneError

__all__ = [
    "INTERRUPTED",
    "SHOWN_SKIPS",
    "InterruptedRunError",
    "complain",
    "counted",
    "err",
    "out",
    "print_json",
    "progress_bar",
    "quiet_libraries",
    "show_skipped",
    "working",
]

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
SHOWN_SKIPS = 10


class _Console(Console):
    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print; what is no table stays on its line where neither a terminal nor COLUMNS says how long one may be."""
        if soft_wrap is None and not self.is_terminal and "COLUMNS" not in os.environ:
            soft_wrap = all(isinstance(each, (str, Text)) for each in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(_UNREAD)


_UNREAD = "nobody reads any more"
"""All of what a broken pipe says: by the number of the system's own error typer would know it, and exit with 1."""

out = _Console(highlight=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)


class InterruptedRunError(RagstoneError):
    """Ctrl-C, with more to say than that what was committed is kept."""

    exit_code = INTERRUPTED


def complain(message: str) -> None:
    """One error, in one sentence."""
    err.print(f"[bold red]error:[/] {_escape(' '.join(message.split()))}", soft_wrap=True)


def counted(number: int, thing: str) -> str:
    """A number of things, in words.

    >>> counted(1, "passage"), counted(2000, "passage")
    ('1 passage', '2,000 passages')
    """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def print_json(value: Any) -> None:
    """One JSON document on one line."""
    try:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise BrokenPipeError(_UNREAD) from None


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes long, on a terminal only."""
    with err.status(f"{what} …") if err.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with rate and time left; yields ``progress(done, total, unit)``, which starts a new bar for a new unit."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    class Rate(TextColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f}/s" if speed else "", style="cyan")

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(""),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, unit: str) -> None:
            if unit not in tasks:
                tasks[unit] = bar.add_task(unit, total=total)
            bar.update(tasks[unit], completed=done, total=total)

        yield progress


def show_skipped(skipped: Sequence[Any]) -> None:
    """Name the first of the files and records that were passed over, and why."""
    for each in skipped[:SHOWN_SKIPS]:
        err.print(f"[yellow]skipped[/] {_escape(each.reason)}", soft_wrap=True)
    if len(skipped) > SHOWN_SKIPS:
        err.print(f"… and {len(skipped) - SHOWN_SKIPS:,} more; --json lists them all.")


def quiet_libraries() -> None:
    """Bars and advice of the libraries underneath have no place between a question and its answer."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
