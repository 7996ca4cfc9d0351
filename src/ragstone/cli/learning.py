"""The verbs that learn and judge: ``train``, ``train-encoder``, ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragstone.cli.app import app
from ragstone.cli.options import (
    Beams,
    Decode,
    Device,
    Dtype,
    Extractive,
    Json,
    Method,
    ModelK,
    Search,
    SearchOption,
    Where,
)
from ragstone.errors import InputError

__all__ = ["evaluate", "train", "train_encoder"]


@app.command()
def train(
    kb: Annotated[Path, typer.Argument(help="The knowledge base that passages are found in.")],
    questions: Annotated[
        Path, typer.Argument(help="Questions with answers: jsonl, DPR's json or tsv, X.source + X.target.")
    ],
    out: Annotated[
        Path, typer.Option(help="Where the trained model goes; checkpoints lie in its folder checkpoints/.")
    ],
    model: Annotated[str, typer.Option(help="Name or folder of the RAG model to start from.")] = "local",
    method: Annotated[Method | None, typer.Option(help="RAG-Token or RAG-Sequence.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="The paper's settings: paper-nq triviaqa webq trec msmarco jeopardy fever2 fever3."),
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Questions to measure at the end, and on the way with --eval-every.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on this many questions at most.")] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="Passages a question in training [5].")] = None,
    test_k: Annotated[int | None, typer.Option(min=1, help="Passages a question afterwards [as in training].")] = None,
    how: SearchOption = Search.dense,
    where: Where = None,
    with_positives: Annotated[
        bool, typer.Option("--with-positives", help="Put the gold passage in where it was not found.")
    ] = False,
    in_batch: Annotated[
        bool, typer.Option("--in-batch", help="Take the gold passages of neighbouring questions; search nothing.")
    ] = False,
    decline_weight: Annotated[
        float, typer.Option(help="Learn to write nothing from passages without an answer, at this weight.")
    ] = 0.0,
    extractive: Extractive = None,
    train_passage_encoder: Annotated[
        bool,
        typer.Option("--train-passage-encoder", help="The question encoder reads passages too; re-encodes the base."),
    ] = False,
    refresh_every: Annotated[int, typer.Option(min=0, help="Updates between re-encodings of the base meanwhile.")] = 0,
    freeze_question_encoder: Annotated[
        bool, typer.Option("--freeze-question-encoder", help="It does not learn.")
    ] = False,
    freeze_generator: Annotated[bool, typer.Option("--freeze-generator", help="It does not learn.")] = False,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of an adapter on the generator; 0 trains it whole.")] = 0,
    question_encoder_lora_rank: Annotated[int, typer.Option(min=0, help="The same for the question encoder.")] = 0,
    lora_alpha: Annotated[int | None, typer.Option(min=1, help="Scale of the adapters [twice the rank].")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout in front of the adapters.")] = 0.0,
    adapters: Annotated[Path | None, typer.Option(help="Begin with the adapters of this checkpoint.")] = None,
    learn_score_scale: Annotated[bool, typer.Option("--learn-score-scale", help="τ learns too.")] = False,
    score_scale: Annotated[float | None, typer.Option(help="τ to start from.")] = None,
    keyword_scale: Annotated[
        float | None, typer.Option(help="Weight of BM25 in the prior with keyword or hybrid search.")
    ] = None,
    null_passage: Annotated[
        str | None, typer.Option(help="A passage that says nothing, as a bias, an embedding or a network.")
    ] = None,
    passage_dropout: Annotated[float | None, typer.Option(help="Probability that a passage is left out.")] = None,
    max_target_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer, the rest is cut [64].")
    ] = None,
    answers: Annotated[str, typer.Option(help="sample: one accepted answer a step; all: their sum.")] = "sample",
    label_smoothing: Annotated[float | None, typer.Option(help="Over the vocabulary [0].")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the questions [3].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; wins over epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions a batch on each device [8].")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches an update [1].")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="[5e-5]")] = None,
    question_encoder_learning_rate: Annotated[float | None, typer.Option(min=0.0, help="[as the other]")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Updates until the full learning rate [0].")] = None,
    scheduler: Annotated[str | None, typer.Option(help="linear, cosine, constant, … [linear]")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe (autocast).")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    dev_metric: Annotated[str, typer.Option(help="What --dev is measured by: loss, exact_match, f1, …")] = "loss",
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Measure --dev after so many updates, keep the best.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many measurements without progress.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Updates between checkpoints [100].")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Save a whole model in place of adapters.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of order, answers, dropout and new weights.")] = 42,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with measured time and memory.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train question encoder and generator together from questions and answers."""
    from ragstone.cli.training import train_model

    train_model(
        kb,
        questions,
        model=model,
        out_folder=out,
        method=None if method is None else method.value,
        preset_name=preset,
        dev=dev,
        limit=limit,
        options={
            "k": k,
            "test_k": test_k,
            "search": how.value,
            "where": where,
            "with_positives": with_positives,
            "in_batch": in_batch,
            "decline_weight": decline_weight,
            "extractive": extractive,
            "train_passage_encoder": train_passage_encoder,
            "refresh_every": refresh_every,
            "train_question_encoder": not freeze_question_encoder,
            "train_generator": not freeze_generator,
            "lora_rank": lora_rank,
            "question_encoder_lora_rank": question_encoder_lora_rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "adapters": None if adapters is None else str(adapters),
            "learn_score_scale": learn_score_scale,
            "question_encoder_learning_rate": question_encoder_learning_rate,
            "answers": answers,
            "max_target_length": max_target_length,
            "dev_metric": dev_metric,
        },
        config={
            "score_scale": score_scale,
            "keyword_scale": keyword_scale,
            "null_passage": null_passage,
            "passage_dropout": passage_dropout,
            "label_smoothing": label_smoothing,
        },
        arguments={
            "num_train_epochs": epochs,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": learning_rate,
            "warmup_steps": warmup_steps,
            "lr_scheduler_type": scheduler,
            "bf16": bf16,
            "gradient_checkpointing": gradient_checkpointing or None,
            "save_steps": save_every,
            "seed": seed,
        },
        eval_every=eval_every,
        patience=patience,
        merge=merge,
        resume=resume,
        dry_run=dry_run,
        device=device,
        as_json=json,
    )


@app.command()
def evaluate(
    kb: Annotated[Path, typer.Argument(help="The knowledge base.")],
    questions: Annotated[Path, typer.Argument(help="Questions with answers: jsonl json tsv csv, or .source/.target.")],
    model: Annotated[str, typer.Option(help="Name or folder of a RAG model.")] = "local",
    method: Annotated[Method | None, typer.Option(help="RAG-Token or RAG-Sequence.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, the first ones.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --limit: draw them; also the bootstrap's.")] = None,
    k: ModelK = None,
    how: Annotated[Search | None, typer.Option("--search", help="How passages are found [dense].")] = None,
    where: Where = None,
    labels: Annotated[str | None, typer.Option(help="Classify: the labels, separated by commas.")] = None,
    regex: Annotated[bool, typer.Option("--regex", help="The answers are regular expressions (CuratedTREC).")] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Also ROUGE-L, BLEU-1, Q-BLEU-1 and distinct trigrams.")
    ] = False,
    decode: Annotated[Decode | None, typer.Option(help="For RAG-Sequence [thorough].")] = None,
    beams: Beams = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens [32].")] = None,
    extractive: Extractive = None,
    trec_in: Annotated[
        Path | None, typer.Option("--trec-in", help="Read the passages of this TREC run instead of searching.")
    ] = None,
    k_sweep: Annotated[str | None, typer.Option(help="Also with these numbers of passages: 1,3,5,10.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every question's result, as JSON lines.")] = None,
    run: Annotated[Path | None, typer.Option(help="Write which passages were read, as a TREC run.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with another run's --predictions.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Say how good a model is: its answers, the passages it finds, and whether its probabilities mean what they say."""
    from ragstone.cli.evaluating import evaluate_model

    written = {
        "decode": None if decode is None else decode.value,
        "num_beams": beams,
        "max_new_tokens": max_new_tokens,
        "extractive": extractive,
    }
    evaluate_model(
        kb,
        questions,
        model=model,
        method=None if method is None else method.value,
        limit=limit,
        seed=seed,
        k=k,
        run=trec_in,
        options={
            "search": None if how is None else how.value,
            "where": where,
            "labels": None if labels is None else [label.strip() for label in labels.split(",")],
            "regex": regex,
            "generation": generation,
            **{name: value for name, value in written.items() if value is not None},
        },
        k_sweep=_numbers("--k-sweep", k_sweep),
        report=report,
        predictions=predictions,
        run_out=run,
        against=against,
        device=device,
        dtype=dtype,
        as_json=json,
    )


def _numbers(name: str, text: str | None) -> list[int]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{name} is {text!r}; write numbers above 0, separated by commas, such as 1,3,5,10.")
    return [int(part) for part in parts]


@app.command("train-encoder")
def train_encoder(
    kb: Annotated[Path, typer.Argument(help="The knowledge base with the gold passages.")],
    questions: Annotated[Path, typer.Argument(help="Questions with positive_ids, as JSONL.")],
    out: Annotated[Path, typer.Option(help="A new folder for the trained encoder.")],
    encoder: Annotated[str, typer.Option(help="Name or folder of the encoder to start from.")] = "local",
    hard_negatives: Annotated[int, typer.Option(min=0, help="Passages a question found by its words, not gold.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="How often each gold passage is seen.")] = 1,
    batch_size: Annotated[int, typer.Option(min=2, help="Gold passages in a batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The highest learning rate.")] = 2e-5,
    seed: Annotated[int, typer.Option(help="Of the order of the questions and of dropout.")] = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train an encoder of questions and passages from gold passages; use it with `ragstone reindex`."""
    from ragstone.cli.encoder_training import train

    options = {"hard_negatives": hard_negatives, "epochs": epochs, "batch_size": batch_size}
    train(
        kb,
        questions,
        encoder=encoder,
        out=out,
        options={**options, "learning_rate": learning_rate, "seed": seed, "device": device},
        as_json=json,
    )
