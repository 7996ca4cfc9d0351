"""``ragstone train``."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragstone._extras import extra
from ragstone.cli.console import InterruptedRunError, err, out, print_json, progress_bar, quiet_libraries, working
from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase
from ragstone.models import RagConfig
from ragstone.questions import read_questions
from ragstone.training import Preset, RagTrainer, TrainingOptions, last_checkpoint
from ragstone.training.presets import SOURCES, preset

__all__ = ["slow_allocator", "train_model"]

QUICK_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def train_model(
    folder: Path,
    questions: Path,
    *,
    model: str,
    out_folder: Path,
    method: str | None,
    preset_name: str | None,
    dev: Path | None,
    limit: int | None,
    options: dict[str, Any],
    config: dict[str, Any],
    arguments: dict[str, Any],
    eval_every: int | None,
    patience: int | None,
    merge: bool,
    resume: bool,
    dry_run: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Train, or say what would be done. Values that are None are the preset's, else those of the option itself."""
    quiet_libraries()
    extra("training", "accelerate", "Training")
    known = preset(preset_name) if preset_name else None
    rows = read_questions(questions, limit=limit)
    dev_rows = read_questions(dev) if dev else []
    if eval_every and not dev_rows:
        raise InputError("--eval-every needs --dev, a file of questions to measure.")
    if patience and not eval_every:
        raise InputError("--patience counts the measurements of --eval-every; give that too.")
    if eval_every and arguments["save_steps"]:
        raise InputError("--eval-every writes a checkpoint at each measurement; leave --save-every out.")
    epochs = arguments["num_train_epochs"]
    if epochs is not None and not 0 < epochs < math.inf:
        raise InputError(f"--epochs is {epochs}; give a positive number.")
    if Path(model).is_dir() and Path(model).resolve() == out_folder.resolve():
        raise InputError(
            f"--out {out_folder} is the model to start from and would be written over; name another folder."
        )
    base = KnowledgeBase.open(folder)
    if not len(base):
        raise InputError(f"{folder} holds no passage; run `ragstone index PATH --kb {folder}` first.")
    checkpoints = out_folder / "checkpoints"
    found = last_checkpoint(checkpoints)
    if found and not (resume or dry_run):
        raise InputError(f"{checkpoints} holds a run already; go on with it by --resume, or name another --out.")
    if resume and not found:
        err.print(
            f"{checkpoints} holds no checkpoint to go on from; this run begins anew.", style="yellow", markup=False
        )
    if not dry_run:
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {out_folder} cannot be written to ({error.strerror}); name another folder."
            ) from None
    with contextlib.ExitStack() as stack:
        if dry_run:  # transformers makes the folder at once
            checkpoints = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with working("Loading the model"):
            trainer = _trainer(
                base, rows, dev_rows, model, method, known, options, config, arguments, eval_every, patience, checkpoints,
                None if merge else model, device,
            )  # fmt: skip
    plan = _plan(trainer, preset_name, known)
    if dry_run:
        with working("Measuring two steps"):
            plan |= _estimate(trainer, plan["weights that learn"])
        print_json(plan) if as_json else _print_plan(plan)
        return
    if not as_json:
        _print_plan(plan)
    with progress_bar() as progress:
        trainer.add_callback(_progress(progress))
        try:
            result = trainer.train(resume_from_checkpoint=found)
        except KeyboardInterrupt:
            kept = last_checkpoint(checkpoints)
            ahead = f"the same command with --resume goes on from {kept}" if kept else "no checkpoint was written yet"
            raise InterruptedRunError(f"Interrupted after {trainer.state.global_step} steps; {ahead}.") from None
    trainer.save_model(str(out_folder))
    if dev_rows and not eval_every:
        trainer.evaluate()
    if trainer.shared_encoder is not None:
        with progress_bar() as progress:
            base.refresh()
            base.reencode(out_folder / "passage_encoder", progress=progress)
    measured = {name: v for entry in trainer.state.log_history[-3:] for name, v in entry.items() if "eval_" in name}
    summary = {"model": str(out_folder), "steps": result.global_step, "loss": result.training_loss, **measured}
    if as_json:
        print_json(summary)
    else:
        out.print(f"Trained {result.global_step} steps; the model is in {out_folder}.", markup=False)
        out.print(f"    ragstone evaluate {folder} QUESTIONS --model {out_folder}", style="dim", markup=False)


def _trainer(
    base: KnowledgeBase,
    rows: list[Any],
    dev_rows: list[Any],
    name: str,
    method: str | None,
    known: Preset | None,
    options: dict[str, Any],
    config: dict[str, Any],
    arguments: dict[str, Any],
    eval_every: int | None,
    patience: int | None,
    checkpoints: Path,
    base_model: str | None,
    device: str | None,
) -> RagTrainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

    from ragstone.pipeline import RagPipeline

    given = {key: value for key, value in options.items() if value is not None}
    settings = {"logging_steps": 10, "save_steps": 100, **{k: v for k, v in arguments.items() if v is not None}}
    fields = {key: value for key, value in config.items() if value is not None}
    if options["adapters"] and Path(options["adapters"], "config.json").is_file():
        fields.setdefault("score_scale", RagConfig.load(options["adapters"]).score_scale)  # it has learnt too
    if known is not None:
        fields = {"label_smoothing": known.label_smoothing, **fields}
        settings = {**known.arguments(), **settings}
    rag = RagPipeline.from_pretrained(
        name,
        knowledge_base=base,
        method=method,  # type: ignore[arg-type]
        dtype="float32",
        device=device,
        **fields,
    )
    if known is not None:
        given = {
            "k": known.k,
            "test_k": known.test_k(rag.method),
            "labels": known.labels,
            "decode": known.decode,
            **given,
        }
        rag.model.generation_config.num_beams = known.num_beams
    chosen = TrainingOptions(**given)
    if eval_every:
        settings |= {
            "eval_strategy": "steps", "eval_steps": eval_every, "save_steps": eval_every, "load_best_model_at_end": True,
            "metric_for_best_model": chosen.dev_metric, "greater_is_better": chosen.greater_is_better,
            "save_total_limit": 2,
        }  # fmt: skip
    if settings.get("gradient_checkpointing"):
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    try:
        args = TrainingArguments(
            output_dir=str(checkpoints),
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=rag.model.device.type == "cpu",
            **settings,
        )
    except ValueError as error:
        raise InputError(f"These settings cannot be trained with: {str(error).splitlines()[0]}") from None
    trainer = RagTrainer(
        rag.model,
        args,
        tokenizer=rag.tokenizer,
        retriever=rag.retriever,
        questions=rows,
        dev_questions=dev_rows,
        options=chosen,
        base_model=base_model,
        callbacks=[EarlyStoppingCallback(patience)] if patience and eval_every else None,
    )
    trainer.remove_callback(PrinterCallback)
    if "null_passage" in fields:
        rag.model.rag.start_null_passage([row.question for row in rows[:64]])
    return trainer


def _plan(trainer: RagTrainer, preset_name: str | None, known: Preset | None) -> dict[str, Any]:
    args, parameters = trainer.args, list(trainer.model.parameters())
    plan: dict[str, Any] = {
        "method": trainer.model.method,
        "questions": len(trainer.train_dataset),
        "steps": trainer.steps,
        "questions a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "label smoothing": trainer.model.config.label_smoothing,
        "weights that learn": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": sum(p.numel() for p in parameters),
        "options": asdict(trainer.options),
    }
    if slow_allocator(trainer.args.device.type):
        plan["memory allocator"] = "the C library's; jemalloc makes steps on a CPU shorter (docs/training.md)"
    if known is not None:
        plan["preset"] = {"name": preset_name, **asdict(known), "sources": SOURCES}
    return plan


def slow_allocator(device: str, maps: str = "/proc/self/maps") -> bool:
    """Whether glibc hands out memory to training on a CPU, whose large tensors of all sizes wear its free lists out."""
    try:
        loaded = Path(maps).read_text(encoding="utf-8")
    except OSError:
        return False
    return device == "cpu" and "libc.so.6" in loaded and not any(name in loaded for name in QUICK_ALLOCATORS)


def _estimate(trainer: RagTrainer, weights: int) -> dict[str, Any]:
    import resource

    estimate = trainer.estimate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learning = 12 * weights  # gradient and Adam's two moments, float32
    return {
        "seconds a step": estimate.seconds_per_step,
        "hours": estimate.seconds_per_step * estimate.steps / 3600,
        "memory in GB": (peak + learning) / 2**30,
    }


def _print_plan(plan: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in plan.items():
        if isinstance(value, dict):
            value = "\n".join(f"{key} = {_plain(entry)}" for key, entry in value.items() if entry is not None)
        table.add_row(name, _plain(value))
    err.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n    {key}: {entry}" for key, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _progress(progress: Any) -> Any:
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(state.global_step, state.max_steps, "steps")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            shown = {k: v for k, v in logs.items() if k in ("loss", "grad_norm") or k.startswith("eval_")}
            if shown:
                line = "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if not name.endswith("runtime"))
                err.print(f"step {state.global_step}  {line}")

    return Bar()
