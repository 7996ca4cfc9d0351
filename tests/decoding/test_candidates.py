"""Given candidates are scored by the definition; of one token, both ways to sum passages out are the same."""

from __future__ import annotations

import pytest
import torch

from ragstone.decoding import score_candidates

CANDIDATES = [(5,), (7, 9, 2), (2,), (11, 5), (8,)]
"""Some end with EOS, some do not."""


def scored(case, candidates, method=None):
    inputs = case.model.rag.prepare(**case.inputs)
    contexts = case.model.rag.contexts(inputs)
    return score_candidates(contexts, inputs.log_prior, candidates, method=method or case.model.method)


def test_candidates_are_scored_by_definition(case, method, kind):
    this = case(method, kind)
    eos = this.eos
    candidates = [tuple(eos if token == 2 else token for token in candidate) for candidate in CANDIDATES]
    out = scored(this, candidates)
    assert out.log_probs.shape == (2 * len(candidates),)
    for b in range(2):
        for c, candidate in enumerate(candidates):
            row = b * len(candidates) + c
            assert float(out.log_probs[row]) == pytest.approx(this.log_prob(b, list(candidate)), abs=1e-4)
            torch.testing.assert_close(
                out.posteriors[row].double(), this.posterior(b, list(candidate)), atol=1e-4, rtol=0
            )


def test_for_candidates_of_one_token_rag_token_is_rag_sequence(case, kind):
    this = case("token", kind, passages=4)
    one_token = [(token,) for token in (5, 7, 11)]
    token, sequence = (scored(this, one_token, method) for method in ("token", "sequence"))
    torch.testing.assert_close(token.log_probs, sequence.log_probs)
    torch.testing.assert_close(token.posteriors, sequence.posteriors)
    two_tokens = [(5, 7), (7, 5)]
    token, sequence = (scored(this, two_tokens, method) for method in ("token", "sequence"))
    assert not torch.allclose(token.log_probs, sequence.log_probs)
