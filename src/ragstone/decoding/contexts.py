"""The contexts of a batch of questions, each read when it is first needed, and once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ragstone.errors import ModelError
from ragstone.generators import EncodedContexts, Generator, trim_padding
from ragstone.marginal import log_probs

__all__ = ["Contexts"]


class Contexts:
    """N = B·K contexts, row b·K + k.

    Args:
        generator: reads them.
        input_ids, attention_mask: (N, S).
        prompt_lengths: (N,), see :meth:`ragstone.generators.Generator.encode`.
    """

    def __init__(
        self, generator: Generator, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> None:
        self.generator = generator
        self.input_ids, self.attention_mask, self.prompt_lengths = input_ids, attention_mask, prompt_lengths
        self._parts: list[EncodedContexts] = []
        self._part = torch.full((len(input_ids),), -1, device=input_ids.device)  # which of the parts holds each row
        self._place = torch.zeros_like(self._part)  # and where
        self.nothing: Tensor | None = None
        """(B,) p(∅|x) = Σ_z p(z|x) p(∅|x,z), once it is ruled out."""

    @torch.no_grad()
    def encode(self, rows: Tensor | None = None) -> EncodedContexts:
        """Some contexts (R,), or all, in this order; those that nobody has needed yet are read together."""
        rows = torch.arange(len(self._part), device=self._part.device) if rows is None else rows
        missing = torch.unique(rows[self._part[rows] < 0])
        if len(missing):
            ids, mask = trim_padding(self.input_ids[missing], self.attention_mask[missing])
            self._place[missing] = torch.arange(len(missing), device=rows.device)
            self._part[missing] = len(self._parts)
            lengths = None if self.prompt_lengths is None else self.prompt_lengths[missing]
            encoded = self.generator.encode(ids, mask, lengths)
            if encoded.next_logits.isnan().any():
                raise ModelError(
                    "The generator's logits hold NaN: its weights are damaged, or overflow in "
                    f"{self.generator.model.dtype}; load another checkpoint, or the same in float32."
                )
            self._parts.append(encoded)
        parts = torch.unique(self._part[rows]).tolist()
        if len(parts) > 1:
            raise ValueError("rows that were read at different times; score them with pairs()")
        part, places = self._parts[parts[0]], self._place[rows]
        whole = len(places) == part.rows and bool((places.diff() == 1).all())
        return part if whole else part.select(places)

    def rule_out_nothing(self, log_prior: Tensor) -> Tensor:
        """Let no context begin with the end of its answer, and weigh each by how likely it was not to.

        From here on a first token's distribution is p(y_1|x,z,y≠∅). To be called before any context is read: all are.

        Args:
            log_prior: (B, K), log p(z|x).

        Returns:
            (B, K), log p(z|x,y≠∅), which is p(z|x)·(1 − p(∅|x,z)) over its sum. RAG-Sequence would rank as well without,
            but RAG-Token weighs every token by the prior, also behind a first one that some passages would not have begun.
        """
        encoded = self.encode()
        ends = torch.tensor(list(self.generator.eos_token_ids), device=log_prior.device)
        first = log_probs(encoded.next_logits).index_fill(1, ends, -torch.inf)
        self._parts[0] = replace(encoded, next_logits=first)
        answered = log_prior + first.logsumexp(dim=1).view_as(log_prior)
        any_answer = answered.logsumexp(dim=1, keepdim=True)
        self.nothing = (1 - any_answer.exp().squeeze(1)).clamp(min=0)  # rounding could leave less
        return answered - any_answer

    def nothing_by_row(self, rows: int) -> Tensor | None:
        """:attr:`nothing` of ``rows`` sequences, as many for each question."""
        return None if self.nothing is None else self.nothing.repeat_interleave(rows // len(self.nothing))

    def pairs(self, rows: Tensor) -> Iterator[tuple[EncodedContexts, Tensor, Tensor]]:
        """Whatever belongs together of pairs with contexts ``rows`` (P,): contexts, which pairs (P',), their contexts."""
        missing = torch.unique(rows[self._part[rows] < 0])
        if len(missing):
            self.encode(missing)
        for number in torch.unique(self._part[rows]).tolist():
            which = (self._part[rows] == number).nonzero().squeeze(1)
            yield self._parts[number], which, self._place[rows[which]]
