"""The shared body: a question encoder, a retriever and a generator (paper §2.2, §2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    DPRContextEncoder,
    PreTrainedConfig,
    PreTrainedModel,
)

from ragstone.decoding import Contexts
from ragstone.encoders import embed
from ragstone.errors import InputError
from ragstone.generators import Generator, PromptStore, generator_for, trim_padding
from ragstone.generators.prompts import report_truncation
from ragstone.models.configuration import RagConfig
from ragstone.models.null_passage import NullPassage
from ragstone.models.outputs import RagInputs, RagOutput
from ragstone.models.pretrained import RagPreTrainedModel, new_config
from ragstone.models.protocols import Retriever
from ragstone.models.targets import check_tokens, score_targets, target_logits

__all__ = ["RagModel", "nothing_found"]

_ENCODER_ONLY = ("mt5", "t5", "t5gemma", "umt5")
"""Encoder-decoder families of which only the encoder is loaded."""


class RagModel(RagPreTrainedModel):
    """Question encoder + retriever + generator: what both model classes share. It knows no marginal.

    Args:
        config: see :class:`ragstone.RagConfig`, or transformers' own; made from the parts if None.
        question_encoder, generator: raw Hugging Face models; built from ``config`` if None.
        retriever: see :class:`ragstone.RagRetriever`.
    """

    def __init__(
        self,
        config: RagConfig | None = None,
        question_encoder: PreTrainedModel | None = None,
        generator: PreTrainedModel | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        if config is None:
            if question_encoder is None or generator is None:
                raise InputError("Pass a RagConfig, or both question_encoder and generator.")
            config = new_config(question_encoder, generator)
        config = RagConfig.of(config)
        config.check()
        _check_part("question_encoder", question_encoder, config.question_encoder)
        _check_part("generator", generator, config.generator)
        super().__init__(config)
        if question_encoder is None:
            question_encoder = _new_question_encoder(config.question_encoder)
        if generator is None:
            auto = AutoModelForCausalLM if config.causal else AutoModelForSeq2SeqLM
            generator = auto.from_config(config.generator)
        self._modules["question_encoder"] = question_encoder
        self._modules["generator"] = generator
        self.null_passage = None if config.null_passage is None else NullPassage(config)
        self.log_score_scale: Parameter | None = None
        """log τ while τ is learnt; ``config.score_scale`` otherwise."""
        self._retriever: Retriever | None = None
        self.fast = True
        """Decode on shared keys, packed weights and Ragstone's own loops; False computes the same without them."""
        self.prompt_store: PromptStore | None = PromptStore()
        """What a causal generator has read of passages, kept for the next question; None keeps nothing."""
        self.post_init()
        if retriever is not None:
            self.set_retriever(retriever)

    @property
    def rag(self) -> RagModel:
        """Itself."""
        return self

    def adapter(self) -> Generator:
        """The generator behind Ragstone's own interface; made on demand, so that nothing is registered twice."""
        return generator_for(self.generator, fast=self.fast, store=self.prompt_store)

    def encode_questions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Question vectors q: (B, S) -> (B, D), with gradient."""
        if attention_mask is None:
            pad = self.config.question_encoder.pad_token_id
            attention_mask = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
        real = attention_mask.bool().any(dim=0).nonzero()
        width = int(real[-1]) + 1 if len(real) else 1  # of the longest question: padding behind it is not read
        input_ids, attention_mask = input_ids[:, :width], attention_mask[:, :width]
        return embed(
            self.question_encoder,
            input_ids,
            attention_mask,
            pooling=self.config.pooling,
            normalize=bool(self.config.question_encoder_normalize),
        )

    @property
    def tau(self) -> Any:
        """τ: the one that is learnt if one is, else the config's."""
        return self.config.tau if self.log_score_scale is None else self.log_score_scale.exp()

    def score_passages(
        self,
        question_vectors: Tensor,
        passage_vectors: Tensor,
        mask: Tensor | None = None,
        keyword_scores: Tensor | None = None,
    ) -> Tensor:
        """s = τ·(q·d) + β·BM25: (B, D), (B, K, D) -> (B, K), with gradient to the question encoder.

        −inf where ``mask`` (B, K) is false; without ``keyword_scores`` (B, K), or with ``config.keyword_scale`` β = 0, the
        paper's (§2.2) but for τ.
        """
        wide = torch.promote_types(question_vectors.dtype, torch.float32)
        scores = torch.einsum("bd,bkd->bk", question_vectors.to(wide), passage_vectors.to(wide)) * self.tau
        if keyword_scores is not None and self.config.keyword_scale:
            scores = scores + self.config.keyword_scale * keyword_scores.to(wide)
        return scores if mask is None else scores.masked_fill(~mask.bool(), -torch.inf)

    def add_null_passage(self, scores: Tensor, question_vectors: Tensor) -> Tensor:
        """Scores (B, K), question vectors (B, D) -> (B, K + 1), the null passage's last; as they are if there is none."""
        if self.null_passage is None:
            return scores
        null = self.null_passage(question_vectors, self.tau)
        return torch.cat([scores, null.to(scores.dtype).unsqueeze(1)], dim=1)

    @torch.no_grad()
    def start_null_passage(self, questions: Sequence[str], prior: float = 0.1) -> None:
        """Begin with a null passage whose prior is about ``prior`` for questions such as these (B texts).

        Call it before training, above all where vectors are not of unit length: the scale of their scores is not known
        beforehand, and a null passage far below them learns nothing.
        """
        if self.null_passage is None:
            raise InputError("The model has no null passage; set config.null_passage when it is made or loaded.")
        if not 0 < prior < 1:
            raise InputError(f"prior is {prior}; it must lie between 0 and 1.")
        inputs = self._retrieve(None, None, _as_list(questions), None)
        assert inputs.question_vectors is not None
        others = inputs.doc_scores[:, :-1].logsumexp(dim=1)
        found = ~torch.isneginf(others)
        if not found.any():
            raise InputError("No passage was found for any of the questions; add documents to the knowledge base.")
        wanted = others[found] + math.log(prior / (1 - prior))
        self.null_passage.fit(inputs.question_vectors[found], float(self.tau), wanted)

    def prepare(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        questions: Sequence[str] | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        n_docs: int | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> RagInputs:
        """Retrieve, or take what the caller gives, and check it. Arguments as in ``forward``."""
        questions = None if questions is None else _as_list(questions)
        if context_input_ids is None and doc_scores is None and context_attention_mask is None:
            inputs = self._retrieve(input_ids, attention_mask, questions, n_docs)
        else:
            inputs = self._given(context_input_ids, context_attention_mask, doc_scores, n_docs)
            inputs.prompt_lengths = prompt_lengths
        ids, mask = inputs.context_input_ids, inputs.context_attention_mask.long()
        # A context without a single token would make attention undefined; its slot is empty, so one token is enough.
        blank = ~mask.bool().any(dim=1)
        if blank.any():
            mask = mask.clone()
            mask[blank, 0] = 1
            inputs.doc_scores = inputs.doc_scores.masked_fill(blank.view_as(inputs.doc_scores), -torch.inf)
        scores = inputs.doc_scores
        if (scores.isnan() | scores.isposinf()).any():
            raise InputError(
                "doc_scores hold NaN or infinity; check the question encoder's weights and the passage vectors."
            )
        nothing = torch.isneginf(scores).all(dim=1)
        if nothing.any():
            place = int(nothing.int().argmax())
            question = f"{place} of the batch" if questions is None else repr(questions[place][:60])
            raise nothing_found(f"question {question}")
        inputs.context_input_ids, inputs.context_attention_mask = trim_padding(ids, mask)
        return inputs

    def _retrieve(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        questions: Sequence[str] | None,
        n_docs: int | None,
    ) -> RagInputs:
        if self._retriever is None:
            raise InputError(
                "The model has no retriever: call set_retriever(…), or pass context_input_ids, context_attention_mask "
                "and doc_scores."
            )
        if input_ids is None:
            if questions is None:
                raise InputError("Pass input_ids, questions=[…], or contexts with their doc_scores.")
            input_ids, attention_mask = self._retriever.tokenize_questions(questions)
        if not len(input_ids):
            raise InputError("input_ids is empty; ask at least one question.")
        device = self.generator.device
        input_ids = input_ids.to(device)
        attention_mask = None if attention_mask is None else attention_mask.to(device)
        vectors = self.encode_questions(input_ids, attention_mask)
        options: dict[str, Any] = {} if self.null_passage is None else {"null_passage": True}
        found = self._retriever(
            input_ids,
            vectors.detach().float().cpu().numpy(),
            n_docs=self.config.n_docs if n_docs is None else n_docs,
            return_tensors="pt",
            questions=questions,
            **options,
        )
        report_truncation(found["truncated"], self.config.prompt_format().max_length)
        embeds, words = found["retrieved_doc_embeds"].to(device), found.get("keyword_scores")
        words = None if words is None else words.to(device)
        scores = self.score_passages(vectors, embeds, found["retrieved_doc_mask"].to(device), words)
        if self.training and self.config.passage_dropout:
            scores = drop_passages(scores, self.config.passage_dropout, all_may_fall=self.null_passage is not None)
        scores = self.add_null_passage(scores, vectors)
        mask = found["context_attention_mask"].to(device)
        return RagInputs(
            context_input_ids=found["context_input_ids"].to(device),
            context_attention_mask=mask.masked_fill(
                torch.isneginf(scores).view(-1, 1), 0
            ),  # what does not count is not read
            doc_scores=scores,
            truncated=found["truncated"].to(device),
            retrieved_doc_embeds=embeds,
            retrieved_doc_ids=found["doc_ids"],
            question_vectors=vectors,
            prompt_lengths=found.get("prompt_lengths"),
        )

    def _given(
        self,
        context_input_ids: Tensor | None,
        context_attention_mask: Tensor | None,
        doc_scores: Tensor | None,
        n_docs: int | None,
    ) -> RagInputs:
        if context_input_ids is None or doc_scores is None:
            raise InputError("Contexts are given as context_input_ids, context_attention_mask and doc_scores together.")
        if context_attention_mask is None:
            adapter = self.adapter()
            pad = adapter.pad_token_id
            if pad is None or pad in adapter.eos_token_ids:
                raise InputError("Pass context_attention_mask: this generator has no padding token of its own.")
            context_attention_mask = (context_input_ids != pad).long()
        if doc_scores.dim() != 2 or not doc_scores.is_floating_point():
            raise InputError(f"doc_scores has shape {tuple(doc_scores.shape)}; it must be a float tensor (B, K).")
        batch, passages = doc_scores.shape
        if not batch:
            raise InputError(f"doc_scores has shape {tuple(doc_scores.shape)}; ask at least one question.")
        if n_docs is not None and n_docs != passages:
            raise InputError(f"n_docs is {n_docs} but doc_scores has {passages} columns; leave n_docs out.")
        if context_input_ids.dim() != 2 or context_input_ids.shape[0] != batch * passages:
            raise InputError(
                f"context_input_ids has shape {tuple(context_input_ids.shape)}, but doc_scores {tuple(doc_scores.shape)} "
                f"calls for {batch * passages} rows, one for each passage of each question."
            )
        if context_attention_mask.shape != context_input_ids.shape:
            raise InputError(
                f"context_input_ids has shape {tuple(context_input_ids.shape)} but context_attention_mask has "
                f"{tuple(context_attention_mask.shape)}; pass masks of the same shape."
            )
        check_tokens("context_input_ids", context_input_ids, self.get_input_embeddings().weight.shape[0])
        return RagInputs(context_input_ids, context_attention_mask, doc_scores)

    def contexts(self, inputs: RagInputs) -> Contexts:
        """The B·K contexts, each of which is read, without gradient, when it is first needed."""
        lengths = inputs.prompt_lengths if self.config.causal else None
        lengths = None if lengths is None else lengths.to(inputs.doc_scores.device).flatten()
        return Contexts(self.adapter(), inputs.context_input_ids, inputs.context_attention_mask, lengths)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        questions: Sequence[str] | None = None,
        labels: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        n_docs: int | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> RagOutput:
        """Retrieve and read: ``doc_scores`` and, given ``labels``, ``logits`` (B, K, T, V) of each passage.

        Arguments as in :meth:`ragstone.RagSequenceForGeneration.forward`.
        """
        inputs = self.prepare(
            input_ids, attention_mask, questions, context_input_ids, context_attention_mask, doc_scores, n_docs
        )
        out = inputs.output(retrieved=True)
        targets = decoder_input_ids if labels is None else labels
        if targets is None:
            return out
        out.logits = logits = target_logits(self.adapter(), inputs, targets, decoder_input_ids)
        if labels is not None:
            scores = score_targets(self.adapter(), inputs, labels, decoder_input_ids, logits=logits)
            out.token_log_probs, out.scored = scores.log_probs, scores.scored
        return out


def _check_part(name: str, part: PreTrainedModel | None, config: PreTrainedConfig) -> None:
    """Refuse a part of another family than the config says."""
    if part is not None and part.config.model_type != config.model_type:
        raise InputError(
            f"The {name} is a {part.config.model_type!r} model, but config describes a {config.model_type!r} one; "
            "pass a config that fits, or none."
        )


def nothing_found(question: str) -> InputError:
    """The error of a question, named as it is to be shown, that has no passage to be answered from."""
    return InputError(
        f"No passage was found for {question}; add documents to the knowledge base, loosen the filter, or pass passages."
    )


def _as_list(questions: str | Sequence[str]) -> Sequence[str]:
    """Questions of a batch, of which one alone may be a string."""
    if isinstance(questions, str):
        return [questions]
    if not len(questions):
        raise InputError("questions is empty; ask at least one.")
    return questions


def drop_passages(scores: Tensor, probability: float, *, all_may_fall: bool) -> Tensor:
    """Passage dropout: each score (B, K) becomes −inf with ``probability``, but the best of a row if all would fall."""
    dropped = torch.rand(scores.shape, device=scores.device) < probability
    if not all_may_fall:
        lost = (dropped | torch.isneginf(scores)).all(dim=1)
        dropped[lost, scores[lost].argmax(dim=1)] = False
    return scores.masked_fill(dropped, -torch.inf)


def _new_question_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A question encoder without its weights, of the class that it was saved from."""
    if config.architectures == ["DPRContextEncoder"]:  # AutoModel takes every DPR for a question encoder
        return DPRContextEncoder(config)
    auto = AutoModelForTextEncoding if config.model_type in _ENCODER_ONLY else AutoModel
    return auto.from_config(config)
