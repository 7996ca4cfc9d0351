"""The configuration: transformers' own RAG fields, and what Ragstone needs besides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.rag.configuration_rag import RagConfig as TransformersRagConfig

from ragstone import local
from ragstone.errors import InputError, ModelError
from ragstone.generators.prompts import PromptFormat

__all__ = ["RagConfig", "check_place"]

UNIT_LENGTH_SCALE = 20.0
"""τ for encoders of unit length: 1/0.05, the temperature their own contrastive losses are trained with."""

NULL_PASSAGES = ("bias", "embedding", "network")
"""How the logit of the null passage can be modelled (paper, appendix F)."""

RESERVED_FOR_ANSWER = 64
"""Positions of a causal model that a context leaves free for the answer."""


@strict
class RagConfig(TransformersRagConfig):
    """Everything a RAG checkpoint says about itself; ``config.json`` of either library loads in the other.

    Beside transformers' fields:

    - ``question_encoder_pooling`` (``cls | mean | pooler | last_token``), ``question_encoder_normalize``,
      ``question_prompt``: how the question encoder's output becomes a vector (None: read from the encoder);
    - ``score_scale``: τ in s = τ·(q·d). None: 1 for raw inner products, 20 for vectors of unit length;
    - ``keyword_scale``: β in s = τ·(q·d) + β·BM25, where passages were searched by words, alone or as well; 0 leaves the
      prior to the vectors;
    - ``passage_encoder``: name or folder of the passage encoder, None for the rule in :class:`ragstone.RagRetriever`;
    - ``passage_fingerprint``: the weights of the passage encoder that the question encoder was trained with (the
      ``fingerprint`` of its spec); a knowledge base of another encoder is refused;
    - ``lowercase_questions``: lower-case the question in the context. None: true for checkpoints that transformers wrote
      (the published models are uncased), false otherwise;
    - ``prompt_system``, ``prompt_passage``, ``prompt_question``: the prompt of a causal generator, see
      :class:`ragstone.generators.prompts.PromptFormat`;
    - ``null_passage`` (``bias | embedding | network``): one more slot, the last, in which the generator reads no passage,
      and how its logit is modelled; see :class:`ragstone.models.null_passage.NullPassage`. None: there is none;
    - ``passage_dropout``: the probability with which training leaves out each retrieved passage;
    - ``min_answer_tokens``: an answer has at least so many tokens, its end not counted; set where the generator learnt
      to write nothing when its passage does not tell (``TrainingOptions.decline_weight``). With 1 an answer is generated
      from p(y|x,y≠∅), where passages that would rather write nothing have less to say;
    - ``extractive``: pipelines answer with spans of the passages, unless they are told otherwise;
    - ``knowledge_base``: folder of the knowledge base relative to the checkpoint, where it lies inside it;
    - ``base_model``: what a checkpoint of adapters was trained on: a name, or a folder relative to it;
    - ``ragstone_version``: the version that wrote the checkpoint, None for transformers.
    """

    question_encoder_pooling: str | None = None
    question_encoder_normalize: bool | None = None
    question_prompt: str = ""
    score_scale: float | None = None
    keyword_scale: float = 0.0
    passage_encoder: str | None = None
    passage_fingerprint: str | None = None
    lowercase_questions: bool | None = None
    prompt_system: str | None = None
    prompt_passage: str | None = None
    prompt_question: str | None = None
    null_passage: str | None = None
    passage_dropout: float = 0.0
    min_answer_tokens: int = 0
    extractive: bool = False
    knowledge_base: str | None = None
    base_model: str | None = None
    ragstone_version: str | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> RagConfig:
        """``config`` as one of Ragstone's, whichever library made it."""
        if isinstance(config, RagConfig):
            return config
        if getattr(config, "model_type", None) != "rag":
            raise InputError(f"config is a {type(config).__name__}; pass a RagConfig.")
        return cls.from_dict(config.to_dict())

    @classmethod
    def load(cls, name_or_path: str | Path, **fields: Any) -> RagConfig:
        """The config of a checkpoint, with ``fields`` replaced.

        Raises:
            ModelError: there is no such checkpoint, or it is no RAG model.
        """
        check_place(name_or_path)
        try:
            config = cls.from_pretrained(name_or_path, **local.hub_options(name_or_path), **fields)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            place = repr(str(name_or_path)) + ("" if Path(name_or_path).exists() else ", which is no folder here")
            raise ModelError(f"No RAG model can be loaded from {place}: {reason}") from error
        if config.model_type != "rag":
            raise ModelError(f"{str(name_or_path)!r} holds a {config.model_type!r} model; name a RAG checkpoint.")
        return config

    @property
    def tau(self) -> float:
        """The scale τ that turns q·d into the logits of the prior."""
        if self.score_scale is not None:
            return self.score_scale
        return UNIT_LENGTH_SCALE if self.question_encoder_normalize else 1.0

    @property
    def pooling(self) -> str:
        """How the question encoder's states become a vector: as configured, else as its family does it."""
        return self.question_encoder_pooling or ("pooler" if self.question_encoder.model_type == "dpr" else "mean")

    @property
    def question_width(self) -> int:
        """D, of the question encoder's vectors."""
        encoder = self.question_encoder
        projected = encoder.projection_dim if encoder.model_type == "dpr" else 0
        return int(projected or encoder.hidden_size)

    @property
    def causal(self) -> bool:
        """Whether the generator is a causal language model."""
        return not self.generator.is_encoder_decoder

    @property
    def lowercases_questions(self) -> bool:
        """Whether questions are lower-cased in contexts; see ``lowercase_questions``."""
        if self.lowercase_questions is None:
            return self.ragstone_version is None and bool(self.architectures)
        return self.lowercase_questions

    def prompt_format(self) -> PromptFormat:
        """How contexts are written, and how long they may be: min(``max_combined_length``, model positions) tokens."""
        defaults = PromptFormat()
        # getattr: T5 counts relative positions and has no limit; an EncoderDecoder's lies in its encoder.
        reader = getattr(self.generator, "encoder", self.generator)
        positions = getattr(reader, "max_position_embeddings", None)
        if positions is not None and self.causal:
            positions = max(positions - min(RESERVED_FOR_ANSWER, positions // 4), 1)
        return PromptFormat(
            max_length=min(self.max_combined_length, positions or self.max_combined_length),
            lowercase_questions=self.lowercases_questions,
            prefix=self.prefix or getattr(self.generator, "prefix", None) or "",
            title_sep=self.title_sep,
            doc_sep=self.doc_sep,
            system=defaults.system if self.prompt_system is None else self.prompt_system,
            passage=defaults.passage if self.prompt_passage is None else self.prompt_passage,
            question=defaults.question if self.prompt_question is None else self.prompt_question,
        )

    def check(self) -> None:
        """Raise InputError for values that no model can work with."""
        if self.n_docs < 1:
            raise InputError(f"n_docs is {self.n_docs}; it must be at least 1.")
        if self.min_answer_tokens < 0:
            raise InputError(f"min_answer_tokens is {self.min_answer_tokens}; it must be at least 0.")
        if self.score_scale is not None and not 0 < self.score_scale < math.inf:
            raise InputError(f"score_scale is {self.score_scale}; it must be positive and finite.")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1.")
        if not 0 <= self.keyword_scale < math.inf:
            raise InputError(f"keyword_scale is {self.keyword_scale}; give 0 or a positive number.")
        if self.null_passage not in (None, *NULL_PASSAGES):
            raise InputError(
                f"null_passage is {self.null_passage!r}; choose one of {', '.join(NULL_PASSAGES)}, or None."
            )
        if not 0 <= self.passage_dropout < 1:
            raise InputError(f"passage_dropout is {self.passage_dropout}; it must be at least 0 and below 1.")


def check_place(name_or_path: str | Path) -> None:
    """Say what is wrong with a folder that holds no model, or with the path of none; names of the hub pass.

    Raises:
        ModelError: it is such a folder or path.
    """
    folder = Path(name_or_path)
    if not folder.exists() and (str(name_or_path)[:1] in "./~" or len(folder.parts) > 2):
        raise ModelError(f"There is no folder {str(name_or_path)!r}; name that of a RAG model, or a model of the hub.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        remedy = "name the folder of a RAG model"
        if (folder / "checkpoints").is_dir():
            remedy = "its training has not ended: run the same command with --resume"
        raise ModelError(f"{folder} holds no config.json; {remedy}.")
