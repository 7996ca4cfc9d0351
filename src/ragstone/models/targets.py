"""Targets under each passage: checked, and scored with gradient before passages are summed out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ragstone.errors import InputError
from ragstone.generators import Generator, trim_padding
from ragstone.generators.head import score_in_blocks
from ragstone.generators.lengths import rows_at_a_time
from ragstone.marginal import IGNORED, label_log_probs, scored_tokens
from ragstone.models.outputs import RagInputs, TargetScores

__all__ = ["check_tokens", "score_targets", "target_logits"]


def target_logits(
    generator: Generator, inputs: RagInputs, labels: Tensor, decoder_input_ids: Tensor | None = None
) -> Tensor:
    """Logits of ``labels`` (B, T) under each passage, with gradient: (B, K, T, V)."""
    _check(generator, inputs, labels, decoder_input_ids)
    logits = generator.logits(*_flattened(inputs, labels, decoder_input_ids))
    return logits.view(*inputs.doc_scores.shape, *logits.shape[1:])


def score_targets(
    generator: Generator,
    inputs: RagInputs,
    labels: Tensor,
    decoder_input_ids: Tensor | None = None,
    *,
    uniform: Callable[[Tensor, Tensor], Tensor] | None = None,
    alternative: int | None = None,
    logits: Tensor | None = None,
) -> TargetScores:
    """Score ``labels`` (B, T) under each passage, with gradient. Logits are made of scored labels alone, and not kept.

    Args:
        generator: the adapter.
        inputs: contexts and scores.
        labels: (B, T); never scored are −100, and padding where the padding token is not also EOS.
        decoder_input_ids: (B, T), replaces the shifted labels (seq2seq only).
        uniform: the log-probabilities of a uniform target, if they are wanted: log p(z|x) (P, K) and logits (P, K, V) of P
            positions -> (P, K).
        alternative: a token that is scored in the place of each label, too.
        logits: (B, K, T, V), if they were made already.
    """
    _check(generator, inputs, labels, decoder_input_ids)
    vocabulary = generator.model.get_output_embeddings().weight.shape[0]
    if alternative is not None and not 0 <= alternative < vocabulary:
        raise InputError(f"alternative is {alternative}, but the generator knows the tokens 0 to {vocabulary - 1}.")
    scored = scored_tokens(labels, pad_token_id=generator.pad_token_id, eos_token_id=list(generator.eos_token_ids))
    question, token = places = scored.nonzero(as_tuple=True)
    hidden = None
    if logits is None:
        length = int(token.max()) + 1 if len(token) else 1  # nothing is computed behind the last scored label
        used = (labels[:, :length], None if decoder_input_ids is None else decoder_input_ids[:, :length])
        hidden = _label_hidden(generator, *_flattened(inputs, *used), inputs.prompt_lengths)
        if hidden is None:
            logits = target_logits(generator, inputs, *used)

    def score(logits: Tensor, labels: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        found = [label_log_probs(logits, labels.unsqueeze(1).expand(logits.shape[:2]))]
        if uniform is not None:
            found.append(uniform(prior, logits))
        if alternative is not None:
            found.append(label_log_probs(logits, labels.new_tensor(alternative).expand(logits.shape[:2])))
        return tuple(found)

    values = labels[places], inputs.log_prior[question]
    if hidden is None:
        assert logits is not None
        found = score(logits[question, :, token], *values)
    else:
        states = hidden.view(*inputs.doc_scores.shape, *hidden.shape[1:])
        found = score_in_blocks(generator.model, score, states[question, :, token], *values)
    by_label = [part.new_zeros(*labels.shape, part.shape[1]).index_put(places, part).transpose(1, 2) for part in found]
    return TargetScores(
        scored,
        by_label[0],
        uniform=None if uniform is None else by_label[1],
        alternative=None if alternative is None else by_label[-1],
    )


def _label_hidden(
    generator: Generator,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    decoder_input_ids: Tensor | None,
    prompt_lengths: Tensor | None,
) -> Tensor | None:
    """What :meth:`Generator.label_hidden` gives: passages that several questions of a batch share are read once, or else
    contexts of like lengths at a time, for padding costs like text.
    """
    if prompt_lengths is not None and decoder_input_ids is None:
        shared = generator.shared_label_hidden(input_ids, attention_mask, labels, prompt_lengths.flatten())
        if shared is not None:
            return shared
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort()
    parts = []
    sizes = rows_at_a_time(lengths[order].tolist(), input_ids.device.type)
    for rows in torch.split(order, sizes):
        ids, mask = trim_padding(input_ids[rows], attention_mask[rows])
        given = None if decoder_input_ids is None else decoder_input_ids[rows]
        hidden = generator.label_hidden(ids, mask, labels[rows], given)
        if hidden is None:
            return None
        parts.append(hidden)
    return torch.cat(parts)[order.argsort()]


def check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Refuse ``tokens`` that a vocabulary of that size does not hold."""
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.numel():
        raise InputError(
            f"{name} hold the token {int(wrong[0])}, but the generator knows {vocabulary}; make them with the "
            "generator's tokenizer (tokenizer(text_target=…))."
        )


def _check(generator: Generator, inputs: RagInputs, labels: Tensor, decoder_input_ids: Tensor | None) -> None:
    batch = inputs.doc_scores.shape[0]
    if labels.dim() != 2 or labels.shape[0] != batch:
        raise InputError(f"labels has shape {tuple(labels.shape)} for {batch} questions; pass (B, T), one row each.")
    vocabulary = generator.model.get_output_embeddings().weight.shape[0]
    check_tokens("labels", labels[labels != IGNORED], vocabulary)
    if decoder_input_ids is not None:
        if decoder_input_ids.shape != labels.shape:
            raise InputError(
                f"decoder_input_ids has shape {tuple(decoder_input_ids.shape)} but labels {tuple(labels.shape)}; "
                "pass one input for each label."
            )
        check_tokens("decoder_input_ids", decoder_input_ids, vocabulary)


def _flattened(
    inputs: RagInputs, labels: Tensor, decoder_input_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Contexts, labels and decoder inputs as (B·K, …): the generator knows nothing of passages."""
    passages = inputs.doc_scores.shape[1]
    labels = labels.repeat_interleave(passages, dim=0)
    if decoder_input_ids is not None:
        decoder_input_ids = decoder_input_ids.repeat_interleave(passages, dim=0)
    return inputs.context_input_ids, inputs.context_attention_mask, labels, decoder_input_ids
