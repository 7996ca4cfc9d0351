"""The null passage: one more slot of the latent variable, in which the generator reads no passage (paper, appendix F)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ragstone.models.configuration import RagConfig

__all__ = ["NullPassage"]

HIDDEN_UNITS = 64
START_COSINE = 0.4
"""The cosine whose logit a null passage starts with where vectors have unit length. In MiniLM's space passages that answer
a question have 0.6 and more, and the best of passages that have nothing to do with it about 0.2."""


@final
class NullPassage(nn.Module):
    """The logit s_∅ of the null passage, beside the scores s_k = τ·(q·d_k) of the real ones.

    ``config.null_passage`` chooses how it is modelled:

    - ``"bias"``: s_∅ = b, learned;
    - ``"embedding"``: s_∅ = τ·(q·e), with a learned vector e (D,);
    - ``"network"``: s_∅ = w·tanh(W·layer_norm(q) + c) + b, with 64 hidden units.

    At the start ``"bias"`` and ``"network"`` give every question τ·0.4 where vectors have unit length and 0 elsewhere, and
    ``"embedding"`` gives 0 (e = 0). :meth:`fit` starts from questions instead.
    """

    def __init__(self, config: RagConfig) -> None:
        super().__init__()
        self.kind = config.null_passage
        self.start = config.tau * START_COSINE if config.question_encoder_normalize else 0.0
        width = config.question_width
        if self.kind == "embedding":
            self.embedding = nn.Parameter(torch.empty(width))
        else:
            self.bias = nn.Parameter(torch.empty(1))
        if self.kind == "network":
            self.hidden_weight = nn.Parameter(torch.empty(HIDDEN_UNITS, width))
            self.hidden_bias = nn.Parameter(torch.empty(HIDDEN_UNITS))
            self.output_weight = nn.Parameter(torch.empty(HIDDEN_UNITS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin anew; see the class."""
        if self.kind == "embedding":
            nn.init.zeros_(self.embedding)
        else:
            nn.init.constant_(self.bias, self.start)
        if self.kind == "network":
            nn.init.normal_(self.hidden_weight, std=self.hidden_weight.shape[1] ** -0.5)
            nn.init.zeros_(self.hidden_bias)
            nn.init.zeros_(self.output_weight)

    def forward(self, question_vectors: Tensor, tau: float | Tensor) -> Tensor:
        """Question vectors (B, D) -> s_∅ (B,), in float32 at least."""
        wide = torch.promote_types(question_vectors.dtype, torch.float32)
        q = question_vectors.to(wide)
        if self.kind == "embedding":
            return q @ self.embedding.to(wide) * tau
        bias = self.bias.to(wide).expand(len(q))
        if self.kind == "bias":
            return bias
        hidden = linear(layer_norm(q, q.shape[1:]), self.hidden_weight.to(wide), self.hidden_bias.to(wide)).tanh()
        return hidden @ self.output_weight.to(wide) + bias

    @torch.no_grad()
    def fit(self, question_vectors: Tensor, tau: float, logits: Tensor) -> None:
        """Begin with the b, or the e, that comes nearest to ``logits`` (B,) for these questions (least squares)."""
        self.reset_parameters()
        if self.kind == "embedding":
            self.embedding.copy_(torch.linalg.pinv(tau * question_vectors.float()) @ logits.float())
        else:
            self.bias.fill_(logits.mean())
