"""An answer and what had to do with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ragstone.errors import InputError
from ragstone.knowledge import Passage
from ragstone.knowledge.passages import check_text

__all__ = ["Answer", "Evidence", "Score"]


@dataclass(frozen=True)
class Evidence:
    """A passage and what it had to do with the answer.

    Attributes:
        passage: the passage, with its file and page where it has them.
        score: the logit s of the prior: τ·(q·d), or the search's own score with ``prior="search"``.
        prior: p(z|x), before the answer is known.
        posterior: p(z|x,y), given the answer.
    """

    passage: Passage
    score: float
    prior: float
    posterior: float


@dataclass(frozen=True)
class Score:
    """The probability of one string: ``log_prob`` in nats, ``posterior`` p(z|x,y) in the order of the passages.

    ``null_posterior`` is that of the null passage, 0 without one.
    """

    log_prob: float
    posterior: tuple[float, ...]
    null_posterior: float = 0.0


@dataclass(frozen=True)
class Answer:
    """An answer and its evidence.

    Attributes:
        question: the question x.
        text: the answer y.
        log_prob: log p(y|x) of the full marginal over the passages, end of sequence included, in nats.
        log_prob_bounds: between which log p(y|x) lies: ``log_prob`` twice, unless ``complete=False`` left passages unread;
            then ``log_prob`` is the lower one, and an unread passage has posterior 0.
        passages: a tuple of `Evidence`, in the order of retrieval; priors and posteriors each sum to 1, together with
            those of the null passage where the model has one.
        tokens: the T tokens of the answer as text, end of sequence included where the model wrote one.
        token_posteriors: (K, T), p(z|x,y_≤t), which passage carried each token (paper, figure 2). For RAG-Sequence, where
            one passage carries the whole answer, every column is the posterior.
        method: ``"token"`` or ``"sequence"``.
        alternatives: further answers, best first, with ``num_return_sequences`` > 1.
        null_prior, null_posterior: of the null passage (``config.null_passage``); 0 without one.
        nothing: p(∅|x), how likely the model would have written nothing, where it has learnt to
            (``config.min_answer_tokens``); the other probabilities are those given that there is an answer. 0 otherwise.
    """

    question: str
    text: str
    log_prob: float
    log_prob_bounds: tuple[float, float]
    passages: tuple[Evidence, ...]
    tokens: tuple[str, ...]
    token_posteriors: np.ndarray[Any, Any] = field(repr=False, compare=False)
    method: str = "token"
    alternatives: tuple[Answer, ...] = field(default=(), repr=False)
    null_prior: float = 0.0
    null_posterior: float = 0.0
    nothing: float = 0.0
    _scorer: Any = field(default=None, repr=False, compare=False)

    @property
    def found(self) -> bool:
        """Whether the passages tell: some had more to do with the answer than reading none, and nothing was less likely.

        True where the model has neither a null passage nor learnt to write nothing.
        """
        supported = max((evidence.posterior for evidence in self.passages), default=0.0) >= self.null_posterior
        return supported and self.nothing < 0.5

    def score_of(self, text: str) -> Score:
        """Log-probability and posterior of any other answer to this question under the same passages.

        Raises:
            InputError: ``text`` is no string, or the answer was pickled or copied, which leaves the model behind.
        """
        check_text("text", text)
        if self._scorer is None:
            raise InputError("This answer has no model behind it any more; ask the pipeline again.")
        return self._scorer(text)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorer": None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "question": self.question,
            "answer": self.text,
            "log_prob": self.log_prob,
            "log_prob_bounds": list(self.log_prob_bounds),
            "method": self.method,
            "found": self.found,
            "null_prior": self.null_prior,
            "null_posterior": self.null_posterior,
            "nothing": self.nothing,
            "passages": [
                {**asdict(e.passage), "score": e.score, "prior": e.prior, "posterior": e.posterior}
                for e in self.passages
            ],
            "tokens": list(self.tokens),
            "token_posteriors": self.token_posteriors.tolist(),
            **({"alternatives": [a.to_dict() for a in self.alternatives]} if self.alternatives else {}),
        }
