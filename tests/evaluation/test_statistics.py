"""Intervals hold the truth as often as they say; a difference is as likely as swapping makes it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ragstone._extras import extra
from ragstone.errors import InputError, MissingExtraError
from ragstone.evaluation import bootstrap_interval, compare_scores, statistics


def test_an_interval_is_that_of_its_seed_and_holds_the_mean():
    values = np.random.default_rng(0).random(100).tolist()
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert low < np.mean(values) < high
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    normal = 1.96 * np.std(values) / 10
    assert high - low == pytest.approx(2 * normal, rel=0.15)


def test_95_of_100_intervals_hold_the_true_mean():
    rng = np.random.default_rng(0)
    held = 0
    for n in range(100):
        low, high = bootstrap_interval((rng.random(60) < 0.4).astype(float).tolist(), seed=n)
        held += low <= 0.4 <= high
    assert 86 <= held <= 99  # 95 expected, standard deviation 2; the bootstrap is a little narrow


def test_values_that_are_all_the_same_leave_no_doubt():
    assert bootstrap_interval([0.5]) == bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    with pytest.raises(InputError, match="empty"):
        bootstrap_interval([])


def test_the_p_value_counts_the_swaps_with_a_difference_as_large():
    first, second = [1.0, 0.0, 1.0, 1.0, 0.3], [0.0, 1.0, 0.0, 0.5, 0.1]
    differences = np.subtract(first, second)
    swapped = [abs(np.mean(differences * signs)) for signs in product([1, -1], repeat=5)]
    expected = np.mean(np.array(swapped) >= abs(differences.mean()) - 1e-12)
    found = compare_scores(first, second)
    assert found.p_value == pytest.approx(expected)
    assert (found.n, found.difference) == (5, pytest.approx(differences.mean()))
    assert compare_scores(second, first).p_value == pytest.approx(expected)


def test_a_real_difference_is_found_and_none_is_not_invented():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.4).astype(float)
    better = np.maximum(base, rng.random(400) < 0.1)
    assert compare_scores(better.tolist(), base.tolist()).p_value < 0.01
    assert compare_scores(better.tolist(), base.tolist()).interval[0] > 0
    assert compare_scores(base.tolist(), base.tolist()).p_value == 1.0
    assert compare_scores([1.0], [0.0]).p_value == 1.0


def test_runs_of_different_length_are_refused():
    for pair in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(InputError, match="same questions"):
            compare_scores(*pair)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    with pytest.raises(MissingExtraError, match=r'A chart needs no-such-package; pip install "ragstone\[evaluation\]"'):
        extra("evaluation", "no_such_package.part", "A chart")
    monkeypatch.setattr(statistics, "extra", lambda name, module, purpose: extra(name, "no_such_package", purpose))
    with pytest.raises(MissingExtraError, match="confidence interval"):
        bootstrap_interval([1.0, 0.0])
