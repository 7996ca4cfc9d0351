"""Calibration and the signs of retrieval collapse, by definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragstone.errors import InputError
from ragstone.evaluation.diagnosis import calibration_bins, calibration_error, entropy, same_passages


def test_every_answer_is_in_one_bin_and_bounds_belong_to_the_lower_one():
    bins = calibration_bins([0.0, 0.1, 0.10001, 1.0], [True, True, False, True])
    assert [(b.low, b.high, b.count) for b in bins] == [(0.0, 0.1, 2), (0.1, 0.2, 1), (0.9, 1.0, 1)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error_is_the_weighted_mean_distance_of_the_bins(pairs):
    probabilities, correct = map(np.array, zip(*pairs, strict=True))
    edges, expected = np.linspace(0, 1, 11), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (probabilities * 10 > low * 10) & (probabilities * 10 <= round(high * 10))
        inside |= (low == 0) & (probabilities == 0)
        if inside.any():
            expected += inside.mean() * abs(probabilities[inside].mean() - correct[inside].mean())
    near_an_edge = np.abs(probabilities * 10 - np.round(probabilities * 10)) < 1e-9
    if not near_an_edge.any():
        assert calibration_error(probabilities.tolist(), correct.tolist()) == pytest.approx(expected)


def test_answers_that_are_right_as_often_as_they_say_have_no_error():
    assert calibration_error([0.25] * 4, [True, False, False, False]) == 0.0
    assert calibration_error([1.0, 1.0], [False, False]) == 1.0
    assert calibration_error([], []) == 0.0
    with pytest.raises(InputError, match="bins=0"):
        calibration_bins([0.5], [True], 0)
    with pytest.raises(ValueError, match="argument"):
        calibration_error([0.5], [])


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=10))
def test_entropy_lies_between_0_and_log_k_and_is_log_k_when_uniform(weights):
    total = sum(weights)
    assert -1e-9 <= entropy(w / total for w in weights) <= math.log(len(weights)) + 1e-9
    assert entropy([1 / len(weights)] * len(weights)) == pytest.approx(math.log(len(weights)))


def test_retrieval_that_finds_the_same_for_everything_is_seen():
    assert same_passages([["a", "b"], ["b", "a"]]) == 1.0
    assert same_passages([["a", "b"], ["a", "c"]]) == 0.0
    assert same_passages([["a"]]) == same_passages([]) == 0.0
