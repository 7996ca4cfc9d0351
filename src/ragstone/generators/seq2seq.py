"""Encoder-decoder generators: BART, T5, mBART, Pegasus, EncoderDecoderModel, any ``AutoModelForSeq2SeqLM``."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from ragstone.errors import ModelError
from ragstone.generators.base import DecodingState, EncodedContexts, Generator, align_padding

__all__ = ["Seq2SeqGenerator"]


@final
class Seq2SeqGenerator(Generator):
    """The context goes through the encoder; sequences start with ``decoder_start_token_id``.

    Contexts may be padded on either side; inside they are padded on the right.
    """

    @property
    def start_token_id(self) -> int:
        """``decoder_start_token_id``, else the BOS token, as transformers' own generation does."""
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = self._token(name)
            if token is not None:
                return int(token)
        raise ModelError(
            f"The generator {type(self.model).__name__} has no decoder_start_token_id; set it in its config "
            "(for a model made of two BERTs it is the tokenizer's cls_token_id)."
        )

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Generator.logits`; ``decoder_input_ids`` (N, T) replaces the labels shifted right."""
        if not labels.shape[1]:
            return self._no_logits(len(labels))
        if decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=False)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )
        return out.logits

    def _shift_right(self, labels: Tensor) -> Tensor:
        """Decoder inputs: the start token, then all labels but the last; ignored labels become padding."""
        if self._token("decoder_start_token_id") is None and self.model.config.model_type == "mbart":
            # mBART without a fixed start token begins with the language token that ends its labels.
            shifted = self.model.prepare_decoder_input_ids_from_labels(labels.masked_fill(labels < 0, -100))
            return shifted.masked_fill(shifted < 0, self.fill_token_id)
        shifted = labels.new_full(labels.shape, self.start_token_id)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted < 0, self.fill_token_id)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> EncodedContexts:
        """One pass of the encoder; (N, S) -> hidden (N, S, ·)."""
        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=False)
        out = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return EncodedContexts(attention_mask, hidden=out.last_hidden_state)

    def target_logits(self, contexts: EncodedContexts, rows: Tensor, sequences: Tensor) -> Tensor:
        """Teacher-forced decoder pass over ``sequences`` (R, 1 + T), start token included -> (R, T, V)."""
        assert contexts.hidden is not None
        if sequences.shape[1] < 2:
            return self._no_logits(len(sequences))
        out = self.model(
            encoder_outputs=_encoder_output(contexts.hidden[rows]),
            attention_mask=contexts.attention_mask[rows],
            decoder_input_ids=sequences[:, :-1],
            use_cache=False,
        )
        return out.logits

    def start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[Tensor, DecodingState]:
        """The start token runs once per context, so cross-attention keys and values are computed once and then copied."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        state = DecodingState(
            EncoderDecoderCache(DynamicCache(), DynamicCache()), contexts.attention_mask, contexts.hidden
        )
        return self.step(state, tokens), state

    def step(self, state: DecodingState, tokens: Tensor) -> Tensor:
        """One decoder pass over (R, n) new tokens."""
        assert state.hidden is not None
        out = self.model(
            encoder_outputs=_encoder_output(state.hidden),
            attention_mask=state.attention_mask,
            decoder_input_ids=tokens,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.cache = out.past_key_values
        return out.logits[:, -1]


def _encoder_output(hidden: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=hidden)
