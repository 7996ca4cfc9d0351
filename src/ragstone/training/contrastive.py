"""A question and passage encoder learnt from gold passages alone, for a start from nothing (Karpukhin et al. 2020, DPR).

The loss is that of in-batch negatives: a question's gold passage against the passages of the other questions in its
batch, and against *hard negatives*, which share words with the question and do not hold an answer.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ragstone._extras import extra
from ragstone.encoders import Encoder, load_encoder
from ragstone.encoders.checkpoint import SENTENCE_TRANSFORMERS_POOLINGS, quiet
from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, Passage, as_passages
from ragstone.knowledge.indexing import Progress
from ragstone.metrics import has_answer
from ragstone.questions import Question

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["EncoderReport", "hard_negatives_of", "train_encoder"]

_SPARE = 20  # passages looked at beyond those wanted, since some hold an answer
_MINED_AT_ONCE = 64


@dataclass(frozen=True)
class EncoderReport:
    """What a training run did.

    Attributes:
        folder: the trained encoder's.
        questions: how many questions it learnt from.
        pairs: how many pairs of a question and a gold passage.
        steps: how many batches.
        loss: the mean loss over the run, in nats.
        seconds: how long it took.
    """

    folder: str
    questions: int
    pairs: int
    steps: int
    loss: float
    seconds: float


def train_encoder(
    questions: Sequence[Question],
    passages: KnowledgeBase | Iterable[Passage | str | Mapping[str, Any]],
    *,
    out: str | Path,
    encoder: str | Path = "local",
    hard_negatives: int = 1,
    epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    warmup: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> EncoderReport:
    """Train one encoder of questions and passages, and save it in the folder ``out``.

    The folder is one of sentence-transformers, which `load_encoder` and `KnowledgeBase` take. Its vectors have length 1,
    and it is trained on cosines times 20, τ's default for such encoders.

    Args:
        questions: with ``positive_ids``, the ids of their gold passages; each pair is seen once an epoch.
        passages: where the gold passages are, and the hard negatives.
        out: a new or empty folder.
        encoder: what to start from: "local", a name or a folder.
        hard_negatives: how many a pair, by keyword search (see `hard_negatives_of`).
        epochs: how often each pair is seen.
        batch_size: pairs in a batch; a larger one has more in-batch negatives. No passage is in a batch twice.
        learning_rate: the highest, after the warm-up; it then falls linearly to 0.
        warmup: the share of the steps in which the learning rate rises.
        seed: of the order of the pairs and of dropout.
        device: "cpu" or "cuda"; by default CUDA if there is a device.
        progress: called as ``progress(done, total, unit)``, the unit being "questions" and then "steps".

    Raises:
        InputError: a question has no gold passage or one that is not there, or an option cannot be used.
        MissingExtraError: the extra ``training`` is not installed.
    """
    started = time.monotonic()
    _check(questions, hard_negatives, epochs, batch_size)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; give a new folder for the encoder")
    told = progress or (lambda done, total, unit: None)
    start = load_encoder(encoder, device="cpu", dtype="float32")
    if start.spec.template == "pair" or start.spec.pooling not in SENTENCE_TRANSFORMERS_POOLINGS:
        raise InputError(
            f"The encoder {start.spec.name!r} pools by {start.spec.pooling!r} and cannot be trained here; start from "
            "one that pools by mean, cls or last_token, such as any BERT"
        )
    with tempfile.TemporaryDirectory() as work, quiet():
        model = _sentence_transformer(start, Path(work), device)
        base = passages if isinstance(passages, KnowledgeBase) else _searchable(passages, Path(work))
        rows = _rows(questions, base, start, hard_negatives, random.Random(seed), told)
        steps, loss = _fit(
            model,
            rows,
            told,
            output_dir=f"{work}/run",
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=warmup,
            seed=seed,
            use_cpu=device == "cpu",
        )
        model.save_pretrained(str(folder), create_model_card=False)
    return EncoderReport(str(folder), len(questions), len(rows), steps, loss, time.monotonic() - started)


def hard_negatives_of(
    question: Question, found: Iterable[Passage], others: Iterable[Passage], count: int
) -> list[Passage]:
    """Return the first ``count`` passages that are not gold and hold no answer: of ``found``, and then of ``others``."""
    taken: dict[str, Passage] = {}
    for passage in (*found, *others):
        if len(taken) == count:
            break
        if passage.id not in question.positive_ids and not has_answer(_text(passage), question.answers):
            taken[passage.id] = passage
    return list(taken.values())


def _check(questions: Sequence[Question], hard_negatives: int, epochs: int, batch_size: int) -> None:
    if not questions:
        raise InputError("There is no question to learn from; give some with positive_ids")
    without = [question.id for question in questions if not question.positive_ids]
    if without:
        raise InputError(
            f"The question {without[0]!r} has no positive_ids ({len(without)} of {len(questions)} have none); name its "
            "gold passages, or leave it out"
        )
    for name, value, least in (
        ("hard_negatives", hard_negatives, 0),
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 2),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")


def _searchable(passages: Iterable[Passage | str | Mapping[str, Any]], work: Path) -> KnowledgeBase:
    """Return a base of loose passages, made for the while, in which keyword search works."""
    given = as_passages(passages)
    base = KnowledgeBase.create(work / "passages", encoder=None, width=1)
    base.add(given, vectors=np.zeros((len(given), 1), np.float32))
    return base


def _text(passage: Passage) -> str:
    """Return the passage as `Encoder` writes it (template ``title\\ntext``)."""
    return "\n".join(part for part in (passage.title, passage.text) if part)


def _rows(
    questions: Sequence[Question],
    base: KnowledgeBase,
    encoder: Encoder,
    hard_negatives: int,
    chance: random.Random,
    progress: Progress,
) -> list[dict[str, str]]:
    """Return a row of texts for each question and gold passage: anchor, positive, negative_1, negative_2, …."""
    ids = list(dict.fromkeys(id_ for question in questions for id_ in question.positive_ids))
    try:
        gold = dict(zip(ids, base.get(ids), strict=True))
    except InputError as error:
        raise InputError(f"A gold passage is not among the passages: {error}; correct the positive_ids") from None
    ask, tell = encoder.spec.question_prompt, encoder.spec.passage_prompt
    rows = []
    for start in range(0, len(questions), _MINED_AT_ONCE):
        batch = questions[start : start + _MINED_AT_ONCE]
        progress(start, len(questions), "questions")
        k = hard_negatives + _SPARE + max(len(question.positive_ids) for question in batch)
        texts = [question.question for question in batch]
        hits = base.search(texts, k=k, search="keyword") if hard_negatives else [[]] * len(batch)
        for question, found in zip(batch, hits, strict=True):
            others = [gold[id_] for id_ in chance.sample(ids, min(len(ids), hard_negatives + _SPARE))]
            negatives = hard_negatives_of(question, [hit.passage for hit in found], others, hard_negatives)
            if len(negatives) < hard_negatives:
                raise InputError(
                    f"For the question {question.id!r} there are {len(negatives)} passages without an answer in them, "
                    f"not hard_negatives={hard_negatives}; take fewer, or add passages"
                )
            row = {f"negative_{n}": tell + _text(passage) for n, passage in enumerate(negatives, 1)}
            for id_ in dict.fromkeys(question.positive_ids):
                rows.append({"anchor": ask + question.question, "positive": tell + _text(gold[id_]), **row})
    progress(len(questions), len(questions), "questions")
    return rows


def _sentence_transformer(encoder: Encoder, work: Path, device: str | None) -> SentenceTransformer:
    """Return ``encoder`` as sentence-transformers has it, with vectors of length 1."""
    for module in ("accelerate", "datasets"):
        extra("training", module, "Training an encoder")
    library = extra("training", "sentence_transformers", "Training an encoder")
    encoder.tokenizer.model_max_length = encoder.spec.max_length
    Encoder(encoder.model, encoder.tokenizer, replace(encoder.spec, normalize=True)).save(work / "start")
    return library.SentenceTransformer(str(work / "start"), device=device)


def _fit(
    model: SentenceTransformer, rows: list[dict[str, str]], progress: Progress, **arguments: Any
) -> tuple[int, float]:
    """Train ``model`` in place; return the number of steps and the mean loss."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import BatchSamplers
    from transformers import PrinterCallback, TrainerCallback

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            pass  # a card would quote the questions

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step, state.max_steps, "steps")

    trainer = Trainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **arguments,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[Told()],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    return int(result.global_step), float(result.training_loss)
