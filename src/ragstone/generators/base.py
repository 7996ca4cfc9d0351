"""One small interface over sequence-to-sequence and causal language models.

Rows. A transformers model knows nothing of passages: at the call into it (B, K, …) is flattened to N = B·K contexts, and to
R rows where hypotheses or beams multiply them. Every argument below says which.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ragstone.errors import ModelError
from ragstone.generators.attention import ATTENTION, RowGroups, rows_grouped, select_shared
from ragstone.generators.head import head_input, project, without_head
from ragstone.generators.packing import accelerated, can_share, is_accelerated
from ragstone.marginal import label_log_probs

__all__ = [
    "DecodingState",
    "EncodedContexts",
    "Generator",
    "align_padding",
    "select_cache",
    "shares_keys",
    "trim_padding",
]

_LOGITS_PER_CALL = 2**26
"""Logits (rows · T · V) that one call may hold where they cannot be made apart: 256 MB in float32."""

_LOGITS_PER_BLOCK = 2**22
"""Logits (tokens · V) of scoring that exist at a time: 16 MB in float32, which stays in a CPU's cache."""


@dataclass(frozen=True)
class EncodedContexts:
    """What a generator keeps of N contexts after reading each of them once.

    ``attention_mask`` is (N, S), ``next_logits`` (N, V) the prediction of the first answer token and ``cache`` the keys and
    values behind it: of a causal generator those of the prompt; of a seq2seq one cross-attention's, and self-attention's
    of the start token. ``hidden`` (N, S, ·) is a seq2seq encoder's output. Nothing here is ever written to.
    """

    attention_mask: Tensor
    cache: Any
    next_logits: Tensor
    hidden: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.attention_mask.shape[0]

    def select(self, rows: Tensor | slice) -> EncodedContexts:
        """These rows (R,) as contexts of their own: memory is copied (not for a slice), nothing recomputed."""
        return EncodedContexts(
            self.attention_mask[rows],
            select_cache(self.cache, rows),
            self.next_logits[rows],
            None if self.hidden is None else self.hidden[rows],
        )


@dataclass
class DecodingState:
    """R rows in the middle of decoding; :meth:`Generator.step` moves them on.

    ``groups`` says which of N contexts each row reads, where rows share keys and values; ``attention_mask`` is (N, S) of a
    seq2seq generator, (R, S + t) of a causal one. Where nothing is shared (``groups`` is None), N is R.
    """

    cache: Any
    attention_mask: Tensor
    hidden: Tensor | None = None
    groups: RowGroups | None = None

    def select(self, rows: Tensor) -> DecodingState:
        """The state of these rows (R',), in this order, repeats allowed: memory is copied, nothing recomputed.

        Where rows share contexts, ``rows`` are those of the contexts that stay, G side by side.
        """
        if self.groups is None:
            hidden = None if self.hidden is None else self.hidden[rows]
            return replace(
                self, cache=select_cache(self.cache, rows), attention_mask=self.attention_mask[rows], hidden=hidden
            )
        copies = self.groups.copies
        contexts = rows[::copies] // copies
        return replace(
            self,
            cache=_select_rows(self.cache, rows, contexts),
            attention_mask=self.attention_mask[rows if self.hidden is None else contexts],
            hidden=None if self.hidden is None else self.hidden[contexts],
        )

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows (R,) in place, as beam search wants it.

        Beams of one question share its contexts, so what comes from a context (cross-attention keys and values, encoder
        output, a prompt's mask) is equal in all of them and stays where it is.
        """
        getattr(self.cache, "self_attention_cache", self.cache).reorder_cache(rows)


class Generator(ABC):
    """A language model that writes an answer given a context. It holds a reference to ``model`` and owns nothing.

    Abstract; :class:`~ragstone.generators.Seq2SeqGenerator` and :class:`~ragstone.generators.CausalGenerator` are final.

    Args:
        model: the raw Hugging Face model.
        fast: share keys and values between rows and run on packed weights where the model allows it. False computes the
            same with copies and the model's own kernels.
    """

    def __init__(self, model: Any, *, fast: bool = True) -> None:
        self.model = model
        self.fast = fast
        self._tokens: dict[str, Any] = {}

    def with_tokens(self, **tokens: int | list[int] | None) -> Generator:
        """The same generator with ``eos_token_id`` or ``pad_token_id`` of its own; those that are None stay."""
        other = copy.copy(self)
        other._tokens = {name: token for name, token in tokens.items() if token is not None}
        return other

    @property
    @abstractmethod
    def start_token_id(self) -> int | None:
        """The token every generated sequence begins with; None where sequences hold new tokens only."""

    @abstractmethod
    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        """One differentiable pass that keeps nothing: contexts (N, S), labels (N, T) -> logits (N, T, V)."""

    def label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None
    ) -> Tensor | None:
        """What the output layer would make :meth:`logits` of: (N, T, ·), with gradient.

        None where the model's output layer cannot be told apart (see :func:`ragstone.generators.head.head_input`).
        """
        if not labels.shape[1]:
            return None
        hidden = head_input(self.model, lambda: self.logits(input_ids, attention_mask, labels, decoder_input_ids))
        return None if hidden is None else hidden[:, -labels.shape[1] :]

    def shared_label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prompt_lengths: Tensor
    ) -> Tensor | None:
        """The same, with every beginning that several contexts have in common read once, and its gradient summed.

        None where the model cannot do that, or hardly any beginning is shared. ``prompt_lengths`` (N,) as in :meth:`encode`.
        """
        return None

    @abstractmethod
    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> EncodedContexts:
        """Read N contexts (N, S) once.

        ``prompt_lengths`` (N,) says how many real tokens at the beginning of each depend on its passage alone: a causal
        generator with a prompt store reads those once for all questions.
        """

    @abstractmethod
    def _split_start(self, contexts: EncodedContexts, tokens: Tensor) -> tuple[bool, Tensor]:
        """Whether sequences ``tokens`` (R, T) go on where ``contexts`` end, and the tokens that are still to be read."""

    @abstractmethod
    def _begin(self, contexts: EncodedContexts, rows: Tensor, *, share: bool, fresh: bool) -> DecodingState:
        """State of R rows, row r on context ``rows[r]``; ``fresh``: before a start token instead of behind it."""

    @abstractmethod
    def _forward(self, state: DecodingState, tokens: Tensor, *, keep: int) -> Tensor:
        """Append ``tokens`` (R, n) to ``state``: the last ``keep`` logits (R, keep, V), or all with 0."""

    def accelerated(self) -> AbstractContextManager[None]:
        """Inside, the model runs on shared keys and packed weights; cheap to enter again."""
        return accelerated(self.model) if self.fast else _nothing()

    def start(self, contexts: EncodedContexts, tokens: Tensor, copies: int = 1) -> tuple[Tensor, DecodingState]:
        """Begin decoding with ``tokens`` (N, T0), a start token first if there is one.

        Returns:
            Logits (N, V) of what follows, and the state of N·``copies`` rows, those of a context side by side. What comes
            from a context is shared by its rows, or copied; nothing is computed twice.
        """
        with self.accelerated():
            behind, rest = self._split_start(contexts, tokens)
            rows = torch.arange(contexts.rows, device=tokens.device)
            many = rows.repeat_interleave(copies)
            share = self._shares() and copies > 1
            if not rest.shape[1]:
                return contexts.next_logits, self._begin(contexts, many, share=self._shares(), fresh=not behind)
            state = self._begin(contexts, rows, share=self._shares(), fresh=not behind)
            logits = self.step(state, rest)
            if copies > 1:
                state = self._spread(state, many, copies) if share else state.select(many)
            return logits, state

    def step(self, state: DecodingState, tokens: Tensor) -> Tensor:
        """Append ``tokens`` (R, n) to every row of ``state``: logits (R, V) of what follows."""
        with self.accelerated(), _grouped(state):
            return self._forward(state, tokens, keep=1)[:, -1]

    def target_logits(self, contexts: EncodedContexts, rows: Tensor, sequences: Tensor) -> Tensor:
        """Logits of given targets from contexts that are encoded already, without encoding them again.

        Args:
            contexts: N encoded contexts.
            rows: (R,) the context of each target.
            sequences: (R, T) targets as :meth:`labels_of` describes them, padded with any valid token.

        Returns:
            (R, T', V), the prediction of each label of ``labels_of(sequences)``.
        """
        behind, rest = self._split_start(contexts, sequences)
        first = contexts.next_logits[rows].unsqueeze(1)
        if rest.shape[1] < 2:
            return first[:, : rest.shape[1]] if behind else self._no_logits(len(rows))
        with self.accelerated():
            state = self._begin(contexts, rows, share=self._shares(), fresh=not behind)
            with _grouped(state):
                logits = self._forward(state, rest[:, :-1], keep=0)
        return torch.cat([first, logits], dim=1) if behind else logits

    def target_log_probs(self, contexts: EncodedContexts, rows: Tensor, sequences: Tensor, counts: Tensor) -> Tensor:
        """log p of the labels that count, without ever holding the logits of all of them.

        Args:
            contexts, rows, sequences: as in :meth:`target_logits`.
            counts: (R, T') bool, which labels are wanted.

        Returns:
            (R, T'), 0 where a label does not count.
        """
        labels = self.labels_of(sequences)
        behind, rest = self._split_start(contexts, sequences)
        first = contexts.next_logits
        if not (self.fast and behind and _separates(self)):
            block = max(_LOGITS_PER_CALL // max(first.shape[1] * labels.shape[1], 1), 1)
            parts = [
                label_log_probs(self.target_logits(contexts, r, s), lab)
                for r, s, lab in zip(*(torch.split(part, block) for part in (rows, sequences, labels)), strict=True)
            ]
            return torch.cat(parts).masked_fill(~counts, 0.0)
        wide = torch.promote_types(first.dtype, torch.float32)
        scores = torch.zeros(labels.shape, dtype=wide, device=labels.device)
        if not labels.shape[1]:
            return scores
        totals = torch.cat([part.to(wide).logsumexp(dim=-1) for part in torch.split(first, _block(first))])
        scores[:, 0] = first[rows, labels[:, 0]].to(wide) - totals[rows]
        if labels.shape[1] > 1:
            with self.accelerated():
                state = self._begin(contexts, rows, share=self._shares(), fresh=False)
                with _grouped(state), without_head(self.model) as seen:
                    self._forward(state, rest[:, :-1], keep=0)
                wanted = counts[:, 1:]
                hidden, targets = seen[0][wanted], labels[:, 1:][wanted]
                block = max(_LOGITS_PER_BLOCK // first.shape[1], 1)
                parts = [
                    label_log_probs(project(self.model, h).unsqueeze(-2), t.unsqueeze(-1)).squeeze(-1)
                    for h, t in zip(torch.split(hidden, block), torch.split(targets, block), strict=True)
                ]
                scores[:, 1:][wanted] = torch.cat(parts).to(wide) if parts else scores.new_zeros(0)
        return scores.masked_fill(~counts, 0.0)

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

    def _shares(self) -> bool:
        """Whether rows of one context share its keys and values: found out once for each model."""
        active = is_accelerated(self.model) and self.model.config._attn_implementation == ATTENTION
        return self.fast and active and shares_keys(self)

    def _spread(self, state: DecodingState, rows: Tensor, copies: int) -> DecodingState:
        """A state of one row a context as one of ``copies`` rows a context; ``rows`` is each one's context."""
        mask = state.attention_mask if state.hidden is not None else state.attention_mask[rows]
        every = torch.arange(len(rows) // copies, device=rows.device)
        cache = _select_rows(state.cache, rows, every)
        return replace(state, cache=cache, attention_mask=mask, groups=RowGroups(copies))

    def _no_logits(self, rows: int) -> Tensor:
        """The logits of targets without a token: (rows, 0, V)."""
        weight = self.model.get_output_embeddings().weight
        return weight.new_zeros(rows, 0, weight.shape[0])

    def _token(self, name: str) -> Any:
        value = self._tokens.get(name, getattr(self.model.generation_config, name, None))
        if value is None:
            config = self.model.config
            value = getattr(config, name, None)
            if value is None and getattr(config, "decoder", None) is not None:
                value = getattr(config.decoder, name, None)
        return value


# What a model allows, found out by trying: does it compute the same with shared keys, and with its output layer apart?


@dataclass(frozen=True)
class _Traits:
    shares: bool
    separates: bool


_known: WeakKeyDictionary[Any, _Traits] = WeakKeyDictionary()
_STRIDE = 7919  # a prime
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far apart, relative to their norm, logits of the same may be; 0.05 in half precision."""


def _traits(generator: Generator) -> _Traits:
    model = generator.model
    if model not in _known:
        _known[model] = _Traits(False, False)  # while it is being tried
        training = [module for module in model.modules() if module.training]
        model.eval()
        with torch.no_grad():
            _known[model] = _try(generator)
        for module in training:
            module.training = True
    return _known[model]


def shares_keys(generator: Generator) -> bool:
    """Whether the model computes the same when rows of one context share its keys and values; tried once for each model."""
    return _traits(generator).shares


def _separates(generator: Generator) -> bool:
    return _traits(generator).separates


def _try(generator: Generator) -> _Traits:
    """Two contexts with two rows each, the same in both: sharing must give what copying gives, each under its own context.

    Their tokens lie anywhere in the vocabulary. Its first ones are often special, and rounding in half precision then weighs
    more than it does in any text.
    """
    model, device = generator.model, generator.model.device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    anywhere = (torch.arange(1, 19, device=device) * _STRIDE) % vocabulary
    ids, rows = anywhere[:16].view(2, 8), torch.tensor([0, 0, 1, 1], device=device)
    tokens = anywhere[16:].repeat(2).view(4, 1)

    def logits(*, share: bool) -> Tensor:
        state = generator._begin(contexts, rows, share=share, fresh=False)
        with _grouped(state):
            return generator._forward(state, tokens, keep=0)

    def succeeds(trial: Callable[[], bool]) -> bool:
        try:
            return trial()
        except Exception:  # whatever such a model does not know
            return False

    def equal() -> bool:
        distance = (logits(share=True) - expected).norm()
        other = (expected.roll(2, dims=0) - expected).norm()  # what the wrong context would give
        return bool(distance < min(_CLOSE.get(expected.dtype, 0.05) * expected.norm(), other / 2))

    contexts = generator.encode(ids, torch.ones_like(ids))
    expected = logits(share=False)
    with accelerated(model):
        shares = can_share(model) and is_accelerated(model) and succeeds(equal)
    return _Traits(shares, succeeds(lambda: generator.label_hidden(ids, torch.ones_like(ids), ids) is not None))


def _block(logits: Tensor) -> int:
    return max(_LOGITS_PER_BLOCK // logits.shape[-1], 1)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _grouped(state: DecodingState) -> AbstractContextManager[None]:
    return _nothing() if state.groups is None else rows_grouped(state.groups)


def _select_rows(cache: Any, rows: Tensor, contexts: Tensor) -> Any:
    """``rows`` of a cache whose rows share ``contexts``."""
    if not hasattr(cache, "self_attention_cache"):
        return select_shared(cache, rows, contexts)
    new = copy.copy(cache)
    new.self_attention_cache = select_cache(cache.self_attention_cache, rows)
    new.cross_attention_cache = select_shared(cache.cross_attention_cache, rows, contexts)
    new.is_updated = dict(cache.is_updated)
    return new


def select_cache(cache: Any, rows: Tensor | slice) -> Any:
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
