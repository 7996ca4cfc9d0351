"""Question vectors + passages -> hits and contexts, without gradient (paper §2.2: maximum inner product search)."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.utils import CONFIG_NAME

from ragstone.encoders import Encoder, EncoderSettings, load_encoder
from ragstone.encoders.checkpoint import fingerprint, longest_input
from ragstone.errors import EncoderMismatchError, InputError, ModelError
from ragstone.generators.prompts import NULL_PASSAGE, ContextBatch, ContextBuilder
from ragstone.knowledge import Hit, KnowledgeBase, Passage
from ragstone.knowledge.exchange import named_base
from ragstone.knowledge.loose import PassageIndex, dummy_passages
from ragstone.knowledge.passages import as_passages, check_text
from ragstone.models.configuration import RagConfig
from ragstone.models.tokenization import RagTokenizer

__all__ = ["RagRetriever", "saved_index", "stack_hits"]

logger = logging.getLogger(__name__)

DEFAULT_LONGEST = 512
"""Tokens of a question where neither tokenizer nor model says how many it can read."""
_SAVED_PASSAGES = "passages.parquet"
_SAVED_ENCODER = "passage_encoder"
_OWN_FIELDS = (
    "index_name",
    "index_path",
    "passages_path",
    "dataset",
    "dataset_split",
    "use_dummy_dataset",
    "passage_encoder",
    "knowledge_base",
)
"""Of the config: what is searched, and what encodes it."""
_REMEDY = (
    "pass index=KnowledgeBase.open(…), a list of passages or a Dataset with title, text and embeddings, or set "
    "use_dummy_dataset=True for the built-in passages"
)


class RagRetriever:
    """Finds passages for question vectors and writes the contexts that a generator reads.

    Args:
        config: see :class:`ragstone.RagConfig`, or transformers' own.
        question_encoder_tokenizer, generator_tokenizer: the model's two tokenizers.
        index: what is searched: a :class:`ragstone.KnowledgeBase`, passages (strings, dicts, ``Passage`` objects), or a
            ``datasets.Dataset`` with ``title``, ``text`` and ``embeddings``. None: what ``config`` names by its
            ``index_name`` and paths, see :func:`ragstone.knowledge.exchange.named_base`, which is imported at first use
            and kept; or the built-in passages with ``use_dummy_dataset``.
        passage_encoder: encodes passages that come without vectors. None: ``config.passage_encoder``; else, for a DPR
            question encoder, its context-encoder sibling if it can be loaded; else the question encoder itself.

    Raises:
        InputError: ``config`` names an index that is not on this machine.
    """

    def __init__(
        self,
        config: RagConfig,
        question_encoder_tokenizer: Any,
        generator_tokenizer: Any,
        index: Any = None,
        passage_encoder: Encoder | None = None,
    ) -> None:
        self.config = RagConfig.of(config)
        self.question_encoder_tokenizer = question_encoder_tokenizer
        self.generator_tokenizer = generator_tokenizer
        self.index: KnowledgeBase | PassageIndex = (
            _index_from(index) if index is not None else _named_index(self.config)
        )
        self._given_encoder = self._passage_encoder = passage_encoder
        self._question_encoder: Any = None
        self.check_encoders = True
        self._checked: str | None = None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, indexed_dataset: Any = None, *, index: Any = None, **kwargs: Any
    ) -> RagRetriever:
        """Load what :meth:`save_pretrained`, or transformers, wrote.

        Args:
            name_or_path: folder or name of the checkpoint.
            indexed_dataset: transformers' name of ``index``.
            index: as in the class; what the checkpoint names if None.
            kwargs: ``passage_encoder``, or fields of the config to replace.
        """
        passage_encoder = kwargs.pop("passage_encoder", None)
        config = kwargs.pop("config", None) or RagConfig.load(name_or_path, **kwargs)
        tokenizer = RagTokenizer.from_pretrained(name_or_path, config=config)
        index = indexed_dataset if index is None else index
        if index is None:
            index = saved_index(config, Path(name_or_path))
        if index is None:
            index = _named_index(config, Path(name_or_path))
        if (
            passage_encoder is None
            and config.passage_encoder
            and (Path(name_or_path) / config.passage_encoder).is_dir()
        ):
            passage_encoder = load_encoder(Path(name_or_path) / config.passage_encoder)
        return cls(config, tokenizer.question_encoder, tokenizer.generator, index, passage_encoder)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json``, both tokenizers and what belongs to the index; every path inside is relative.

        Own passages and Datasets are written with their vectors; a knowledge base inside the folder is named, one
        elsewhere is not (name it again when loading). A passage encoder that lies in a folder is copied. A config that a
        model has written there keeps what is the model's.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.index, KnowledgeBase):
            inside = self.index.path.resolve().is_relative_to(folder.resolve())
            self.config.knowledge_base = os.path.relpath(self.index.path, folder) if inside else None
            if not inside:
                logger.warning(
                    "The knowledge base %s lies outside %s and is not saved with it; pass index= when loading.",
                    self.index.path,
                    folder,
                )
        elif not self.index.dummy and len(self.index):
            self.index.save(folder / _SAVED_PASSAGES, self._vectors_of(self.index))
            self.config.passages_path = _SAVED_PASSAGES
        encoder = self._own_encoder()
        if encoder is not None and Path(encoder.spec.name).is_dir():
            encoder.save(folder / _SAVED_ENCODER)
            self.config.passage_encoder = _SAVED_ENCODER
        elif encoder is not None and encoder.spec.name == self._sibling:
            self.config.passage_encoder = self._sibling
        self._write_config(folder)
        RagTokenizer(self.question_encoder_tokenizer, self.generator_tokenizer).save_pretrained(folder)

    def _own_encoder(self) -> Encoder | None:
        """The passage encoder that is another than the model's and than the knowledge base's, if there is one."""
        if self._passage_encoder is None:
            named = self.config.passage_encoder
            if named and Path(named).is_dir():
                return self.passage_encoder
            if not named and not isinstance(self.index, KnowledgeBase):
                self._passage_encoder = self._load_sibling()  # kept: it is what will encode
        return self._passage_encoder

    def _write_config(self, folder: Path) -> None:
        """Write the config; into one that a model has written there goes only what is the retriever's."""
        config = self.config
        if (folder / CONFIG_NAME).is_file():
            with contextlib.suppress(ModelError):  # that of another model, whose place this one takes
                config = RagConfig.load(folder)
                for name in _OWN_FIELDS:
                    setattr(config, name, getattr(self.config, name))
        config.save_pretrained(folder)

    def with_index(self, index: Any) -> RagRetriever:
        """Return a retriever that searches ``index`` and is otherwise this one; this one stays as it is."""
        other = copy.copy(self)
        other.index = _index_from(index)
        other._passage_encoder = self._given_encoder  # one that was found may be the old index's
        return other

    def attach(self, question_encoder: Any) -> None:
        """Hand over the model's question encoder, the passage encoder of last resort.

        Raises:
            EncoderMismatchError: it was trained with other passage vectors than those of the knowledge base.
        """
        if question_encoder is not self._question_encoder:  # one that trains is not what it was when it was checked
            self._question_encoder = question_encoder
            self._check_encoder()

    def _check_encoder(self) -> None:
        """Tell questions of one encoder from passages of another; asked again when the base moves to another encoder.

        Towers may differ, as DPR's do. What a question encoder was trained with says ``config.passage_fingerprint``;
        where nothing does, it must be the base's encoder, or ``config.passage_encoder`` must name that.
        """
        spec = self.index.encoder_spec if isinstance(self.index, KnowledgeBase) else None
        model, config = self._question_encoder, self.config
        if spec is None or model is None or not self.check_encoders:
            return
        self._checked = str(spec["fingerprint"])
        assert isinstance(self.index, KnowledgeBase)
        where = f"{self.index.path} holds vectors of the encoder {spec['name']!r}"
        if config.passage_fingerprint is not None:
            if config.passage_fingerprint != spec["fingerprint"]:
                named = config.passage_encoder or "the encoder it was trained with"
                raise EncoderMismatchError(
                    f"{where} (weights {spec['fingerprint']}), but the model's question encoder was trained with passages "
                    f"of {named} (weights {config.passage_fingerprint}); re-encode the base with that "
                    "(`ragstone reindex --encoder`), or use the model that was trained on this base"
                )
            return
        if config.passage_encoder is not None and _same_place(config.passage_encoder, spec["name"]):
            return
        if config.question_encoder.model_type == "dpr" and spec.get("template") == "pair":
            return
        made = {"width": config.question_width, "pooling": config.pooling}
        made["normalize"] = bool(config.question_encoder_normalize)
        other = next((name for name, value in made.items() if spec.get(name, value) != value), None)
        if other is None and fingerprint(model) == spec["fingerprint"]:
            return
        logger.warning(
            "%s, and the model's question encoder is another (%s); unless it was trained for these, what is found is "
            "arbitrary: re-encode the base with the model's encoder (`ragstone reindex --encoder`), or name the passage "
            "encoder that belongs to the model in config.passage_encoder.",
            where,
            "its weights differ" if other is None else f"{other} is {made[other]!r}, not {spec[other]!r}",
        )

    def tokenize_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B question texts -> ids and mask (B, S), cut at what the question encoder can read."""
        for question in questions:
            check_text(f"The question {question[:60]!r}", question)
        out = self.question_encoder_tokenizer(
            [self.config.question_prompt + question for question in questions],
            padding=True,
            truncation=True,
            max_length=self._longest_question,
            return_tensors="pt",
        )
        return out["input_ids"], out["attention_mask"]

    @property
    def _longest_question(self) -> int:
        """Tokens of a question that the question encoder can read."""
        if self._question_encoder is None:
            return int(min(self.question_encoder_tokenizer.model_max_length, DEFAULT_LONGEST))
        return longest_input(self._question_encoder, self.question_encoder_tokenizer)

    def __call__(
        self,
        question_input_ids: Any,
        question_hidden_states: np.ndarray[Any, Any],
        prefix: str | None = None,
        n_docs: int | None = None,
        return_tensors: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        null_passage: bool = False,
    ) -> BatchEncoding:
        """Retrieve and write contexts; see :class:`ragstone.models.Retriever` for arguments and result."""
        passages = self.config.n_docs if n_docs is None else n_docs
        if passages < 1:
            raise InputError(f"n_docs is {passages}; it must be at least 1.")
        if questions is None:
            questions = self._decode(question_input_ids)
        hits = self.retrieve(np.asarray(question_hidden_states), passages)
        width = np.shape(question_hidden_states)[1]
        form: dict[str, Any] = {"prefix": prefix, "return_tensors": return_tensors, "null_passage": null_passage}
        return self.batch(questions, hits, passages, width, **form)

    def batch(
        self,
        questions: Sequence[str],
        hits: Sequence[Sequence[Hit]],
        n_docs: int,
        width: int,
        *,
        prefix: str | None = None,
        return_tensors: str | None = None,
        null_passage: bool = False,
    ) -> BatchEncoding:
        """What a model reads of B questions with their hits, whose vectors are ``width`` (D) wide.

        Arguments and result as in :class:`ragstone.models.Retriever`.
        """
        found = [[hit.passage for hit in row] for row in hits]
        contexts = self.contexts(questions, found, n_docs, prefix=prefix, null_passage=null_passage)
        vectors, mask, words = stack_hits(hits, n_docs, width)
        data: dict[str, Any] = {
            "context_input_ids": contexts.input_ids,
            "context_attention_mask": contexts.attention_mask,
            "retrieved_doc_embeds": torch.from_numpy(vectors),
            "retrieved_doc_mask": torch.from_numpy(mask),
            "truncated": contexts.truncated,
            "prompt_lengths": contexts.prompt_lengths,
        }
        if self.config.keyword_scale:
            data["keyword_scores"] = torch.from_numpy(words)
        if return_tensors is None:
            data = {name: value.tolist() for name, value in data.items()}
        elif return_tensors == "np":
            data = {name: value.numpy() for name, value in data.items()}
        elif return_tensors != "pt":
            raise InputError(f"return_tensors is {return_tensors!r}; use 'pt', 'np' or None.")
        return BatchEncoding({**data, "doc_ids": [[hit.passage.id for hit in row] for row in hits]})

    def retrieve(
        self,
        question_hidden_states: np.ndarray[Any, Any],
        n_docs: int,
        *,
        questions: Sequence[str] | None = None,
        search: str = "dense",
        where: str | None = None,
    ) -> list[list[Hit]]:
        """The best passages for B question vectors (B, D) float32: B lists of at most ``n_docs`` hits, best first."""
        vectors = np.ascontiguousarray(question_hidden_states, dtype=np.float32)
        if isinstance(self.index, KnowledgeBase):
            spec = self.index.encoder_spec
            if spec is not None and spec["fingerprint"] != self._checked:
                self._check_encoder()
            by_words = search in ("keyword", "hybrid")
            return self.index.search(  # type: ignore[call-overload]
                list(questions) if by_words and questions is not None else None,
                vectors=None if search == "keyword" else vectors,
                k=n_docs,
                search=search,
                where=where,
            )
        if search not in ("dense", "exact") or where is not None:
            raise InputError(f"search={search!r} with where={where!r} needs a KnowledgeBase; these are loose passages.")
        if not len(self.index):
            raise InputError(f"There is nothing to search: {_REMEDY}.")
        return self.index.search(vectors, self._vectors_of(self.index), n_docs)

    def contexts(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        n_docs: int,
        *,
        prefix: str | None = None,
        null_passage: bool = False,
    ) -> ContextBatch:
        """Contexts of B questions with their passages, empty slots up to ``n_docs``, and one more for the null passage."""
        form = self.config.prompt_format()
        if prefix is not None:
            form = replace(form, prefix=prefix)
        build = ContextBuilder(self.generator_tokenizer, form, causal=self.config.causal)
        null = [NULL_PASSAGE] if null_passage else []
        slots = [[*((p.title, p.text) for p in row), *[None] * (n_docs - len(row)), *null] for row in passages]
        return build(questions, slots)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray[Any, Any]:
        """Vectors (N, D) float32 of passages that are not stored anywhere."""
        return self.passage_encoder.encode_passages([(p.title, p.text) for p in passages])

    @property
    def passage_encoder(self) -> Encoder:
        """What encodes passages, by the rule in the class's docstring."""
        if self._passage_encoder is None:
            self._passage_encoder = self._find_passage_encoder()
        return self._passage_encoder

    def _find_passage_encoder(self) -> Encoder:
        config = self.config
        if config.passage_encoder:
            return load_encoder(config.passage_encoder)
        if isinstance(self.index, KnowledgeBase) and self.index.has_encoder:
            return self.index.encoder  # type: ignore[return-value]
        model = self._question_encoder
        if model is None:
            raise ModelError(
                "The retriever has no encoder for its passages; give it to a model (set_retriever), or pass "
                "passage_encoder=load_encoder(…)."
            )
        if (sibling := self._load_sibling()) is not None:
            return sibling
        name = str(getattr(model.config, "_name_or_path", "") or "")
        dpr = config.question_encoder.model_type == "dpr"
        if dpr:
            logger.warning(
                "Passages are encoded with DPR's question encoder, since its context encoder is not at hand; "
                "name it in config.passage_encoder for the retrieval DPR was trained for."
            )
        settings = EncoderSettings(
            pooling=config.pooling,
            normalize=bool(config.question_encoder_normalize),
            template="pair" if dpr else "title\ntext",
            question_prompt=config.question_prompt,
        )
        return Encoder.from_parts(
            model, self.question_encoder_tokenizer, settings, name=name or f"{type(model).__name__} of the model"
        )

    @property
    def _sibling(self) -> str | None:
        """The name that DPR gives the passage encoder beside the model's question encoder."""
        name = str(getattr(getattr(self._question_encoder, "config", None), "_name_or_path", "") or "")
        if self.config.question_encoder.model_type != "dpr" or "question_encoder" not in name:
            return None
        return name.replace("question_encoder", "ctx_encoder")

    def _load_sibling(self) -> Encoder | None:
        with contextlib.suppress(ModelError):
            return None if self._sibling is None else load_encoder(self._sibling)
        return None

    def _vectors_of(self, index: PassageIndex) -> np.ndarray[Any, Any]:
        """The vectors (N, D) of loose passages, encoded at first use; those of the built-in passages are cached on disk."""
        if index.vectors is None:
            index.encode(self.passage_encoder)
        return index.vectors  # type: ignore[return-value]

    def _decode(self, question_input_ids: Any) -> list[str]:
        """Question texts from ids (B, S), the way transformers does it; case and unknown words may be lost."""
        texts = self.question_encoder_tokenizer.batch_decode(question_input_ids, skip_special_tokens=True)
        return [text.removeprefix(self.config.question_prompt) for text in texts]


def stack_hits(
    hits: Sequence[Sequence[Hit]], n_docs: int, width: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of hits: vectors (B, K, D) and keyword scores (B, K) in float32, zeros in empty slots; which are real, (B, K) bool."""
    vectors = np.zeros((len(hits), n_docs, width), np.float32)
    mask = np.zeros((len(hits), n_docs), bool)
    words = np.zeros((len(hits), n_docs), np.float32)
    for b, row in enumerate(hits):
        mask[b, : len(row)] = True
        for k, hit in enumerate(row):
            if not len(hit.vector):
                raise InputError(f"The hit of passage {hit.passage.id!r} has no vector; search for it, or give it one.")
            if len(hit.vector) != width:
                raise InputError(
                    f"The question vectors have width {width}, the passages' {len(hit.vector)}; "
                    "use the encoder that belongs to them."
                )
            vectors[b, k], words[b, k] = hit.vector, hit.keyword_score
    return vectors, mask, words


def _same_place(name: str, other: str) -> bool:
    """Whether two names are of one encoder: equal, or of one folder."""
    return name == other or (Path(name).is_dir() and Path(name).resolve() == Path(other).resolve())


def _index_from(index: Any) -> KnowledgeBase | PassageIndex:
    if isinstance(index, KnowledgeBase | PassageIndex):
        return index
    if isinstance(index, str | Path):
        return KnowledgeBase.open(index)
    if hasattr(index, "column_names"):
        return PassageIndex.from_dataset(index)
    if isinstance(index, Sequence) and not isinstance(index, Mapping):
        return PassageIndex(as_passages(index))
    raise InputError(f"An index cannot be a {type(index).__name__}: {_REMEDY}.")


def _named_index(config: RagConfig, folder: Path | None = None) -> KnowledgeBase | PassageIndex:
    """What a config of transformers names: a base, what can be imported into one, or the built-in passages.

    Paths that lead nowhere are looked for in ``folder`` too, that of the checkpoint.
    """
    base = named_base(
        config.index_name,
        dataset=config.dataset,
        dataset_split=config.dataset_split,
        passages_path=config.passages_path,
        index_path=config.index_path,
        beside=folder,
    )
    if base is not None:
        return base
    if config.use_dummy_dataset:
        return PassageIndex(dummy_passages(), dummy=True)
    if config.index_name == "legacy":
        raise InputError(f"index_name='legacy' needs index_path, the folder of DPR's files; set it, or {_REMEDY}.")
    if config.index_name == "custom":
        raise InputError(
            f"index_name='custom' needs passages_path, the folder of a saved Dataset; set it, or {_REMEDY}."
        )
    raise InputError(
        f"The index {config.index_name!r} of {config.dataset!r} can no longer be downloaded as transformers did; set "
        f"dataset to a folder with its Parquet or Arrow files (title, text, embeddings), or {_REMEDY}."
    )


def saved_index(config: RagConfig, folder: Path) -> KnowledgeBase | PassageIndex | None:
    """What lies in the folder of a checkpoint to be searched, where :meth:`RagRetriever.save_pretrained` put it."""
    if config.knowledge_base:
        return KnowledgeBase.open(folder / config.knowledge_base)
    if config.passages_path == _SAVED_PASSAGES and (folder / _SAVED_PASSAGES).is_file():
        return PassageIndex.load(folder / _SAVED_PASSAGES)
    return None
