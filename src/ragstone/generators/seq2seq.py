"""Encoder-decoder generators: BART, T5, mBART, Pegasus, EncoderDecoderModel, any ``AutoModelForSeq2SeqLM``."""

from __future__ import annotations

from typing import final

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ragstone.errors import ModelError
from ragstone.generators.attention import RowGroups, share_contexts
from ragstone.generators.base import DecodingState, EncodedContexts, Generator, align_padding, select_cache

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

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> EncodedContexts:
        """One pass of the encoder, and of the decoder over the start token, which leaves cross-attention's keys behind."""
        input_ids, attention_mask = align_padding(input_ids, attention_mask, left=False)
        with self.accelerated():
            out = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            state = DecodingState(cache, attention_mask, out.last_hidden_state)
            start = input_ids.new_full((len(input_ids), 1), self.start_token_id)
            logits = self._forward(state, start, keep=1)
        return EncodedContexts(attention_mask, state.cache, logits[:, -1], state.hidden)

    def _split_start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[bool, Tensor]:
        behind = bool((tokens[:, :1] == self.start_token_id).all())  # another may be given as decoder_start_token_id
        return behind, tokens[:, 1:] if behind else tokens

    def _begin(self, contexts: EncodedContexts, rows: Tensor, *, share: bool, fresh: bool) -> DecodingState:
        own, cross = contexts.cache.self_attention_cache, contexts.cache.cross_attention_cache
        cache = EncoderDecoderCache(
            DynamicCache() if fresh else select_cache(own, rows),
            share_contexts(cross) if share else select_cache(cross, rows),
        )
        cache.is_updated = dict(contexts.cache.is_updated)
        if share:
            groups = RowGroups.of(rows, contexts.rows)
            return DecodingState(cache, contexts.attention_mask, contexts.hidden, groups)
        assert contexts.hidden is not None
        return DecodingState(cache, contexts.attention_mask[rows], contexts.hidden[rows])

    def _forward(self, state: DecodingState, tokens: Tensor, *, keep: int) -> Tensor:
        assert state.hidden is not None
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=state.hidden),
            attention_mask=state.attention_mask,
            decoder_input_ids=tokens,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.cache = out.past_key_values
        return out.logits[:, -keep:]
