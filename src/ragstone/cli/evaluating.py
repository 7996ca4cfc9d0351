"""``ragstone evaluate``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ragstone._extras import extra
from ragstone.cli.console import (
    InterruptedRunError,
    complain,
    counted,
    err,
    out,
    print_json,
    progress_bar,
    quiet_libraries,
    working,
)
from ragstone.errors import InputError, RagstoneError
from ragstone.evaluation import (
    Comparison,
    Evaluation,
    compare,
    evaluate,
    read_predictions,
    read_questions,
    read_run,
    wording,
    write_predictions,
    write_run,
)
from ragstone.evaluation.results import check_same
from ragstone.evaluation.trec import check_run_id
from ragstone.knowledge import KnowledgeBase

__all__ = ["evaluate_model"]


def evaluate_model(
    folder: Path,
    questions_path: Path,
    *,
    model: str,
    method: str | None,
    limit: int | None,
    seed: int | None,
    k: int | None,
    run: Path | None,
    options: dict[str, Any],
    k_sweep: Sequence[int],
    report: Path | None,
    predictions: Path | None,
    run_out: Path | None,
    against: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Evaluate ``model`` on the questions of a file and print, or write, how good it is."""
    from ragstone.pipeline import RagPipeline

    quiet_libraries()
    # Whatever can be wrong with files and packages is said before hours of work, not after.
    questions = read_questions(questions_path, limit=limit, seed=seed)
    ranked = None if run is None else read_run(run)
    other = None if against is None else read_predictions(against)
    if other is not None:
        check_same(questions, other)
        extra("evaluation", "scipy.stats", "A comparison of two runs")
    if report is not None:
        for package in ("matplotlib", "scipy.stats"):
            extra("evaluation", package, "The report")
    _check_outputs({"--report": report, "--predictions": predictions, "--run": run_out})
    if run_out is not None:
        for question in questions:
            check_run_id(question.id)
    base = KnowledgeBase.open(folder, device=device, dtype=dtype)
    with working("Loading the model"):
        rag = RagPipeline.from_pretrained(model, knowledge_base=base, method=method, device=device, dtype=dtype)  # type: ignore[arg-type]

    k = rag.model.config.n_docs if k is None else k

    def evaluated(passages: int) -> Evaluation:
        with progress_bar() as progress:
            found = evaluate(rag, questions, k=passages, run=ranked, seed=seed or 0, progress=progress, **options)
        names = {"model": model, "questions": questions_path.name, **found.settings}
        return Evaluation(found.predictions, found.summary, found.intervals, names)

    try:
        evaluation = evaluated(k)
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted; an evaluation is written when it is done, so begin again.") from None
    problems: list[RagstoneError] = []
    _write(predictions, lambda path: write_predictions(path, evaluation.predictions), problems)
    _write(run_out, lambda path: write_run(path, evaluation.predictions), problems)
    sweep: dict[int, Evaluation] = {}
    try:
        for size in sorted(set(k_sweep)):
            sweep[size] = evaluation if size == k else evaluated(size)
    except KeyboardInterrupt:
        end = f"after K = {max(sweep)}" if sweep else "before its first K"
        problems.append(InterruptedRunError(f"Interrupted; the evaluation is complete, but its sweep ends {end}."))
    except RagstoneError as error:  # does not take with it what is done
        problems.append(error)
    comparisons = {} if other is None else compare(evaluation.predictions, other, seed=seed or 0)

    def reported(path: Path) -> None:
        from ragstone.evaluation.report import write_report

        heading = f"{model} on {questions_path.name}"
        write_report(path, evaluation, title=heading, sweep=sweep or None, comparisons=comparisons or None)

    _write(report, reported, problems)
    if as_json:
        print_json(_values(evaluation, sweep, comparisons))
    else:
        _print(evaluation, sweep, comparisons)
    if problems:
        for problem in problems[:-1]:
            complain(str(problem))
        raise problems[-1]


def _check_outputs(outputs: Mapping[str, Path | None]) -> None:
    named: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        try:
            _check_writable(path)
        except OSError as error:
            raise _unwritten(path, error) from None
        if path.resolve() in named:
            raise InputError(f"{named[path.resolve()]} and {option} both write {path}; name two files.")
        named[path.resolve()] = option


def _check_writable(path: Path) -> None:
    """Open a file for writing and leave it as it was."""
    if not path.parent.is_dir():
        raise InputError(f"The folder of {path} does not exist; make it or write elsewhere.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file to write.")
    if path.exists() and not path.is_file():  # whoever reads from a pipe would see its end
        return
    there = os.path.lexists(path)
    path.open("a").close()
    if not there:
        path.unlink()


def _write(path: Path | None, write: Callable[[Path], None], problems: list[RagstoneError]) -> None:
    """Write a file; that it cannot be written is kept for the end, so that nothing else is lost."""
    try:
        if path is not None:
            write(path)
    except OSError as error:
        problems.append(_unwritten(path, error))


def _unwritten(path: Path | None, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({error.strerror or error}); make room or write elsewhere.")


def _values(
    evaluation: Evaluation, sweep: Mapping[int, Evaluation], comparisons: Mapping[str, Comparison]
) -> dict[str, Any]:
    values = evaluation.to_dict()
    if sweep:
        values["k_sweep"] = {k: dict(each.summary) for k, each in sweep.items()}
    if comparisons:
        values["against"] = {name: asdict(found) for name, found in comparisons.items()}
    return values


def _print(evaluation: Evaluation, sweep: Mapping[int, Evaluation], comparisons: Mapping[str, Comparison]) -> None:
    values = evaluation.to_dict()
    settings = ", ".join(f"{name} {value}" for name, value in evaluation.settings.items())
    lost = f" [yellow]({values['unanswered']:,} unanswered)[/]" if values["unanswered"] else ""
    out.print(f"[bold]{counted(values['n'], 'question')}[/]{lost}  [dim]{escape(settings)}[/]")
    table = _table("", "", "95 % interval")
    for group, names in wording.grouped(evaluation.summary).items():
        table.add_section()
        table.add_row(f"[dim]{group}[/]")
        for name in names:
            interval = wording.interval_text(name, evaluation.intervals.get(name))
            value = wording.value_text(name, evaluation.summary[name])
            table.add_row(f"  {wording.title(name)}", f"[bold]{value}[/]", interval)
    out.print(table)
    if sweep:
        first = next(iter(sweep.values()))
        names = wording.grouped(first.summary)["Answers"]
        table = _table("K", *map(wording.title, names))
        for k, each in sweep.items():
            table.add_row(str(k), *(wording.value_text(name, each.summary[name]) for name in names))
        out.print(table)
    if comparisons:
        table = _table("against the other run", "this", "other", "difference", "95 % interval", "p")
        for name, found in comparisons.items():
            means = (wording.value_text(name, mean) for mean in (found.mean, found.other_mean))
            table.add_row(
                wording.title(name),
                *means,
                f"[bold]{wording.difference_text(found.difference)}[/]",
                " to ".join(map(wording.difference_text, found.interval)),
                f"{found.p_value:.4f}",
            )
        out.print(table)
    for prediction in [p for p in evaluation.predictions if p.error][:3]:
        err.print(f"[yellow]unanswered[/] {escape(prediction.question)}: {escape(prediction.error)}", soft_wrap=True)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table
