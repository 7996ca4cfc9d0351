"""One small interface over sequence-to-sequence and causal language models.

Rows. A transformers model knows nothing of passages: at the call into it (B, K, …) is flattened to N = B·K rows, and to
R rows where hypotheses or beams multiply them. Every argument below says which.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ragstone.errors import ModelError

__all__ = ["DecodingState", "EncodedContexts", "Generator", "align_padding", "select_cache", "trim_padding"]


@dataclass(frozen=True)
class EncodedContexts:
    """What a generator keeps of N contexts after reading each of them once.

    ``attention_mask`` is (N, S). A seq2seq generator keeps ``hidden`` (N, S, ·), its encoder's output; a causal one keeps
    ``cache``, the keys and values of the prompt, and ``next_logits`` (N, V), its prediction of the first answer token.
    Nothing here is ever written to: decoding and scoring work on copies of rows.
    """

    attention_mask: Tensor
    hidden: Tensor | None = None
    cache: Any = None
    next_logits: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.attention_mask.shape[0]

    def select(self, rows: Tensor) -> EncodedContexts:
        """These rows (R,) as contexts of their own: memory is copied, nothing recomputed."""
        return EncodedContexts(
            self.attention_mask[rows],
            hidden=None if self.hidden is None else self.hidden[rows],
            cache=None if self.cache is None else select_cache(self.cache, rows),
            next_logits=None if self.next_logits is None else self.next_logits[rows],
        )


@dataclass
class DecodingState:
    """Keys and values of R rows in the middle of decoding; :meth:`Generator.step` moves it on."""

    cache: Any
    attention_mask: Tensor
    hidden: Tensor | None = None

    def select(self, rows: Tensor) -> DecodingState:
        """The state of these rows (R',), in this order, repeats allowed: memory is copied, nothing recomputed."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return DecodingState(select_cache(self.cache, rows), self.attention_mask[rows], hidden)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows (R,) in place, as beam search wants it.

        Beams of one question share its contexts, so what comes from a context (cross-attention keys and values, encoder
        output, a prompt's mask) is equal in all of them and stays where it is.
        """
        getattr(self.cache, "self_attention_cache", self.cache).reorder_cache(rows)


class Generator(ABC):
    """A language model that writes an answer given a context. It holds a reference to ``model`` and owns nothing.

    Abstract; :class:`~ragstone.generators.Seq2SeqGenerator` and :class:`~ragstone.generators.CausalGenerator` are final.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abstractmethod
    def start_token_id(self) -> int | None:
        """The token every generated sequence begins with; None where sequences hold new tokens only."""

    @abstractmethod
    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        """One differentiable pass that keeps nothing: contexts (N, S), labels (N, T) -> logits (N, T, V)."""

    @abstractmethod
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> EncodedContexts:
        """Read N contexts (N, S) once."""

    @abstractmethod
    def target_logits(self, contexts: EncodedContexts, rows: Tensor, sequences: Tensor) -> Tensor:
        """Logits of given targets from contexts that are encoded already, without encoding them again.

        Args:
            contexts: N encoded contexts.
            rows: (R,) the context of each target.
            sequences: (R, T) targets as :meth:`labels_of` describes them, padded with any valid token.

        Returns:
            (R, T', V), the prediction of each label of ``labels_of(sequences)``.
        """

    @abstractmethod
    def start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[Tensor, DecodingState]:
        """Begin decoding on all N rows with ``tokens`` (N, T0): logits (N, V) of what follows, and the state."""

    @abstractmethod
    def step(self, state: DecodingState, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (R, n) to every row of ``state``: logits (R, V) of what follows."""

    def labels_of(self, sequences: Tensor) -> Tensor:
        """The tokens of generated sequences (R, T) that the model predicted: all but a start token."""
        return sequences if self.start_token_id is None else sequences[:, 1:]

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, from the generation config or else the model's."""
        return self._token("pad_token_id")

    @property
    def eos_token_ids(self) -> Collection[int]:
        """The tokens that end an answer; empty where the model declares none."""
        eos = self._token("eos_token_id")
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def fill_token_id(self) -> int:
        """The token that fills a row behind its end: padding, else EOS, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return next(iter(self.eos_token_ids), 0)

    def _no_logits(self, rows: int) -> Tensor:
        """The logits of targets without a token: (rows, 0, V)."""
        weight = self.model.get_output_embeddings().weight
        return weight.new_zeros(rows, 0, weight.shape[0])

    def _token(self, name: str) -> Any:
        value = getattr(self.model.generation_config, name, None)
        if value is None:
            config = self.model.config
            value = getattr(config, name, None)
            if value is None and getattr(config, "decoder", None) is not None:
                value = getattr(config.decoder, name, None)
        return value


def select_cache(cache: Any, rows: Tensor) -> Any:
    """A new cache that holds ``rows`` (R,) of this one. The old one is left as it is; nothing is recomputed."""
    new = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        new.self_attention_cache = select_cache(cache.self_attention_cache, rows)
        new.cross_attention_cache = select_cache(cache.cross_attention_cache, rows)
        new.is_updated = dict(cache.is_updated)
        return new
    # Dynamic layers bind new tensors on every update and never write into the old ones, so a shallow copy is a copy.
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        if not hasattr(layer, "batch_select_indices"):
            raise ModelError(
                f"The generator keeps its past in a {type(layer).__name__}, whose rows cannot be selected; "
                "use a model with ordinary attention."
            )
        layer.batch_select_indices(rows)
    return new


def align_padding(input_ids: Tensor, attention_mask: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Move the padding of (N, S) contexts to one side, keeping the order of the real tokens.

    Positions are then counted from the first real token, so that a row means the same in whatever batch it comes.
    """
    moves = attention_mask.diff(dim=1)
    if bool((moves >= 0).all() if left else (moves <= 0).all()):
        return input_ids, attention_mask
    order = attention_mask.argsort(dim=1, stable=True, descending=not left)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def trim_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns of (N, S) contexts that are padding in every row; every extra column costs like a real one."""
    used = attention_mask.bool().any(dim=0)
    if bool(used.all()) or not bool(used.any()):
        return input_ids, attention_mask
    return input_ids[:, used], attention_mask[:, used]
