"""The two model classes: the body and a marginal (paper §2.1)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ragstone.decoding import Contexts, RagGenerateOutput, rag_sequence_generate, rag_token_generate
from ragstone.decoding.options import as_asked, option
from ragstone.errors import InputError
from ragstone.marginal import (
    log_prior,
    log_probs,
    marginal_next_token,
    mean_log_probs,
    mean_token_posterior,
    sequence_log_likelihood,
    sequence_posterior,
    smoothed_loss,
    token_log_likelihood,
)
from ragstone.models.body import RagModel
from ragstone.models.configuration import RagConfig
from ragstone.models.outputs import RagInputs, RagOutput
from ragstone.models.pretrained import RagPreTrainedModel
from ragstone.models.protocols import Retriever
from ragstone.models.targets import score_targets, target_logits

__all__ = ["RagForGeneration", "RagSequenceForGeneration", "RagTokenForGeneration"]


class RagForGeneration(RagPreTrainedModel, GenerationMixin):
    """What both model classes share. Abstract; the subclasses are final and differ in the marginal alone."""

    method: str

    def __init__(
        self,
        config: RagConfig | None = None,
        question_encoder: PreTrainedModel | None = None,
        generator: PreTrainedModel | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        rag = RagModel(config, question_encoder, generator, retriever)
        super().__init__(rag.config)
        self.rag = rag
        self.post_init()

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
        alternative: int | None = None,
        output_logits: bool = False,
        output_retrieved: bool | None = None,
        reduce_loss: bool | None = None,
    ) -> RagOutput:
        """Score targets under the marginal of the retrieved, or of the given, passages.

        Args:
            input_ids: (B, S) questions in the question encoder's vocabulary; retrieval needs a retriever.
            attention_mask: (B, S); all but padding by default.
            questions: the B question texts, or one text; they win over decoding ``input_ids``, and can stand alone.
            labels: (B, T) targets in the generator's vocabulary, scored in full. −100 is never scored, the padding token
                only where it is not also EOS. Decoder inputs are the labels shifted right.
            context_input_ids, context_attention_mask: (B·K, S) contexts; then nothing is retrieved.
            doc_scores: (B, K) logits of the prior for given contexts, taken as they are (τ is not applied); −inf marks
                an empty slot.
            n_docs: K; the configured number by default when retrieving.
            decoder_input_ids: (B, T), replaces the shifted labels (seq2seq only).
            alternative: a token whose log-probability in the place of each label is returned too.
            output_logits: also return ``logits``, (B, T, V) marginal log-probabilities for RAG-Token and each passage's
                own (B, K, T, V) for RAG-Sequence.
            output_retrieved: also return contexts, vectors and ids of the passages.
            reduce_loss: sum the loss over the batch instead of averaging it.

        Returns:
            See :class:`ragstone.models.outputs.RagOutput`. Without ``labels`` or ``decoder_input_ids`` the generator does
            not run, and only what retrieval decides is filled in.

        Raises:
            InputError: shapes that do not fit, NaN scores, or a question for which there is no passage.
        """
        config = self.config
        inputs = self.rag.prepare(
            input_ids, attention_mask, questions, context_input_ids, context_attention_mask, doc_scores, n_docs
        )
        out = inputs.output(retrieved=config.output_retrieved if output_retrieved is None else output_retrieved)
        targets = decoder_input_ids if labels is None else labels
        if targets is None:
            return out
        adapter, prior, logits = self.rag.adapter(), inputs.log_prior, None
        if output_logits or labels is None:
            logits = target_logits(adapter, inputs, targets, decoder_input_ids)
            out.logits = self._log_probs(prior, logits)
        if labels is None:
            return out
        uniform = self._uniform_log_probs if config.label_smoothing else None
        extras: dict[str, Any] = {"uniform": uniform, "alternative": alternative, "logits": logits}
        scores = score_targets(adapter, inputs, labels, decoder_input_ids, **extras)
        out.token_log_probs, out.scored = scores.log_probs, scores.scored
        out.alternative_log_probs = scores.alternative
        out.nll = loss = -self._log_likelihood(prior, scores.log_probs, scores.scored)
        if scores.uniform is not None:
            uniform_nll = -self._log_likelihood(prior, scores.uniform, scores.scored)
            loss = smoothed_loss(loss, uniform_nll, config.label_smoothing)
        out.loss = loss.sum() if (config.reduce_loss if reduce_loss is None else reduce_loss) else loss.mean()
        return out

    def posteriors(self, out: RagOutput) -> tuple[Tensor, Tensor | None]:
        """Posteriors of the labels of a forward pass: p(z|x,y) (B, K) and, for RAG-Token, (B, K, T) by token."""
        if out.token_log_probs is None or out.doc_scores is None or out.scored is None:
            raise InputError("Posteriors belong to a target; call the model with labels first.")
        return self._posteriors(log_prior(out.doc_scores), out.token_log_probs, out.scored)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        questions: Sequence[str] | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        n_docs: int | None = None,
        prompt_lengths: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool | None = None,
        **options: Any,
    ) -> Any:
        """Answer B questions. Every context is encoded once.

        Args:
            input_ids, attention_mask, questions, context_input_ids, context_attention_mask, doc_scores, n_docs: as in
                :meth:`forward`.
            prompt_lengths: (B, K), how many tokens at the beginning of each given context of a causal generator depend on
                its passage alone; their keys and values are kept for other questions (``model.rag.prompt_store``).
            generation_config: transformers' options as an object; the generator's own by default.
            return_dict_in_generate: return log-probabilities and posteriors too.
            options: those of transformers' ``generate`` (``num_beams``, ``do_sample``, ``max_new_tokens``,
                ``num_return_sequences``, ``prefix_allowed_tokens_fn``, ``logits_processor``, ``stopping_criteria``, …); a
                misspelt one is a TypeError. RAG-Token also takes ``streamer``, ``output_scores`` and ``output_logits``;
                RAG-Sequence takes ``decode="thorough" | "fast"``, ``do_deduplication``, ``prune``, ``early_stop`` and
                ``complete`` (see :func:`ragstone.decoding.rag_sequence_generate`).

        Returns:
            (B · num_return_sequences, T) token ids, or a :class:`ragstone.decoding.RagGenerateOutput` of them. They begin
            with ``decoder_start_token_id`` for a seq2seq generator and hold only new tokens for a causal one, whose
            ``max_length`` therefore counts new tokens. A search with too few beams for them is widened; where there are
            fewer strings, the last is repeated and a warning says so.
        """
        inputs = self.rag.prepare(
            input_ids,
            attention_mask,
            questions,
            context_input_ids,
            context_attention_mask,
            doc_scores,
            n_docs,
            prompt_lengths,
        )
        if not (generation_config is None or isinstance(generation_config, GenerationConfig)):
            raise InputError(f"generation_config is {generation_config!r}; pass a transformers.GenerationConfig.")
        _check_start(options.get("decoder_input_ids"), len(inputs.doc_scores))
        options = {"generation_config": generation_config, **options}
        asked = {**options, "return_dict_in_generate": return_dict_in_generate}
        adapter, empty_too = self.rag.adapter(), True
        unsaid = option(adapter, asked, "min_new_tokens") is None and "min_length" not in options
        if self.config.min_answer_tokens and unsaid and not option(adapter, asked, "min_length"):
            if self.config.min_answer_tokens == 1 and options.get("decoder_input_ids") is None:
                empty_too = False
            else:
                options["min_new_tokens"] = self.config.min_answer_tokens
        wants = option(adapter, asked, "return_dict_in_generate", False)
        if not wants and self.method == "sequence":
            options["complete"] = False  # nobody sees the probabilities
        contexts, prior = self.answer_contexts(inputs, empty_too=empty_too, options=options)
        out = self._generate(contexts, prior, options)
        assert out.sequences is not None
        out.nothing = contexts.nothing_by_row(len(out.sequences))
        return out if wants else out.sequences

    def answer_contexts(
        self, inputs: RagInputs, *, empty_too: bool = False, options: dict[str, Any] | None = None
    ) -> tuple[Contexts, Tensor]:
        """Contexts and log p(z|x) (B, K) to find or score answers with.

        Where the generator has learnt to write nothing (``config.min_answer_tokens`` is 1) both are those given that there
        is an answer, unless an empty one counts too (see :meth:`ragstone.decoding.Contexts.rule_out_nothing`).
        """
        contexts, prior = as_asked(self.rag.contexts(inputs), options or {}), inputs.log_prior
        if not empty_too and self.config.min_answer_tokens == 1:
            prior = contexts.rule_out_nothing(prior)
        return contexts, prior

    @staticmethod
    @abstractmethod
    def _log_likelihood(prior: Tensor, token_log_probs: Tensor, scored: Tensor) -> Tensor:
        """log p(y|x): (B, K), (B, K, T), (B, T) -> (B,)."""

    @staticmethod
    @abstractmethod
    def _log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        """The ``logits`` of the output: (B, K), (B, K, T, V) -> (B, T, V) or (B, K, T, V)."""

    @staticmethod
    @abstractmethod
    def _uniform_log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        """What takes the place of log p(y_t|…) for a uniform target: P positions (P, K), (P, K, V) -> (P, K)."""

    @staticmethod
    @abstractmethod
    def _posteriors(prior: Tensor, token_log_probs: Tensor, scored: Tensor) -> tuple[Tensor, Tensor | None]:
        """p(z|x,y) (B, K) and, if the marginal is taken by token, (B, K, T)."""

    @abstractmethod
    def _generate(self, contexts: Contexts, prior: Tensor, options: dict[str, Any]) -> RagGenerateOutput:
        """Decode; the generator's own generation config decides what ``options`` leave open."""


def _check_start(decoder_input_ids: Tensor | None, batch: int) -> None:
    if decoder_input_ids is not None and (decoder_input_ids.dim() != 2 or len(decoder_input_ids) != batch):
        raise InputError(
            f"decoder_input_ids has shape {tuple(decoder_input_ids.shape)} for {batch} questions; "
            "pass (B, T), one row each."
        )


@final
class RagSequenceForGeneration(RagForGeneration):
    """RAG-Sequence: one passage carries the whole answer, p(y|x) = Σ_k p(z_k|x) Π_t p(y_t|x,z_k,y_<t) (paper §2.1)."""

    method = "sequence"

    _log_likelihood = staticmethod(sequence_log_likelihood)

    @staticmethod
    def _log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        return log_probs(logits)

    @staticmethod
    def _uniform_log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        return mean_log_probs(logits)

    @staticmethod
    def _posteriors(prior: Tensor, token_log_probs: Tensor, scored: Tensor) -> tuple[Tensor, Tensor | None]:
        return sequence_posterior(prior, token_log_probs, scored), None

    def _generate(self, contexts: Contexts, prior: Tensor, options: dict[str, Any]) -> RagGenerateOutput:
        deduplicate = options.pop("do_deduplication", None)
        return rag_sequence_generate(
            contexts,
            prior,
            deduplicate=self.config.do_deduplication if deduplicate is None else deduplicate,
            **options,
        )


@final
class RagTokenForGeneration(RagForGeneration):
    """RAG-Token: every token may have another passage, p(y|x) = Π_t Σ_k p(z_k|x) p(y_t|x,z_k,y_<t) (paper §2.1)."""

    method = "token"

    _log_likelihood = staticmethod(token_log_likelihood)

    @staticmethod
    def _log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        batch, passages, length, vocabulary = logits.shape
        flat = log_probs(logits).view(batch, passages, length * vocabulary)
        return marginal_next_token(prior, flat).view(batch, length, vocabulary)

    @staticmethod
    def _uniform_log_probs(prior: Tensor, logits: Tensor) -> Tensor:
        # Of the marginal: the same under every passage, so that the sum over passages, whose prior is 1 in all, leaves it.
        mean = marginal_next_token(prior, log_probs(logits)).mean(dim=-1, keepdim=True)
        return mean.expand_as(prior)

    @staticmethod
    def _posteriors(prior: Tensor, token_log_probs: Tensor, scored: Tensor) -> tuple[Tensor, Tensor | None]:
        return mean_token_posterior(prior, token_log_probs, scored)

    def _generate(self, contexts: Contexts, prior: Tensor, options: dict[str, Any]) -> RagGenerateOutput:
        return rag_token_generate(contexts, prior, **options)
