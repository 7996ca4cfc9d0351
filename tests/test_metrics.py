"""Answers and rankings are scored as their definitions say."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragstone.errors import InputError
from ragstone.metrics import (
    accuracy,
    contains,
    exact_match,
    f1,
    has_answer,
    hit_at_k,
    matches_pattern,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
    reciprocal_rank,
    search_pattern,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("The  Beatles!", "beatles"), ("a an the", ""), ("AC/DC", "acdc"), ("Ärger, über", "ärger über"), ("", "")],
)
def test_normalisation_is_squads(text: str, normalised: str) -> None:
    assert normalize_answer(text) == normalised


def test_the_best_answer_counts_and_a_lone_string_is_one_answer() -> None:
    assert exact_match("the Denver Broncos.", ["Carolina Panthers", "Denver Broncos"]) == 1.0
    assert exact_match("Denver", ["Denver Broncos"]) == 0.0
    assert f1("Denver", ["Carolina", "Denver Broncos"]) == pytest.approx(2 / 3)
    assert f1("Denver", "Denver") == exact_match("Denver", "Denver") == contains("Denver", "Denver") == 1.0
    assert exact_match("x", []) == f1("x", []) == contains("x", []) == 0.0


def test_f1_counts_a_word_as_often_as_it_occurs() -> None:
    assert f1("new new york", "new york") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("", "york") == f1("york", "") == 0.0
    assert f1("the", "a") == 1.0


def test_contains_wants_whole_words_in_one_run() -> None:
    assert contains("It was the Denver Broncos who won.", ["Denver Broncos"]) == 1.0
    assert contains("Denver's Broncos", ["Denver Broncos"]) == 0.0
    assert contains("Broncos of Denver", ["Denver Broncos"]) == 0.0
    assert contains("something", ["The"]) == 0.0


def test_has_answer_matches_tokens_as_dpr_does() -> None:
    assert has_answer("Born in ST. LOUIS, Missouri", ["Boston", "St. Louis"])
    assert not has_answer("St Louis", "St. Louis")  # punctuation counts
    assert has_answer("a cafe\u0301 in Paris", "CAF\u00c9")  # the same letter, written in two ways
    assert not has_answer("हिन्दी", "हिन्द")  # vowel signs belong to their word
    assert has_answer("東京は首都", "は") is False
    assert not has_answer("anything", "")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_tokens_agree_with_the_pattern_that_dpr_gives(text: str) -> None:
    regex = pytest.importorskip("regex")
    from ragstone.metrics import _spaced_tokens

    # The two libraries know different versions of Unicode: leave out what Python does not know yet.
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cn", "Cs"))
    tokens = regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", unicodedata.normalize("NFD", text).lower())
    assert _spaced_tokens(text) == f" {' '.join(tokens)} "


def test_rankings() -> None:
    ranked = ["a", "b", "c", "b"]
    assert [recall_at_k(ranked, ["b", "c"], k) for k in (1, 2, 3, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert [hit_at_k(ranked, ["b", "c"], k) for k in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert reciprocal_rank(ranked, {"c", "b"}) == 0.5
    assert reciprocal_rank(ranked, ["z"]) == recall_at_k([], ["z"], 5) == 0.0
    assert recall_at_k(ranked, ["a", "a"], 1) == 1.0
    assert hit_at_k(["10"], "10", 1) == 1.0


def test_a_ranking_without_positives_or_depth_has_no_score() -> None:
    for score in (lambda: recall_at_k(["a"], [], 1), lambda: reciprocal_rank(["a"], []), lambda: hit_at_k("a", "a", 0)):
        with pytest.raises(InputError):
            score()


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_scores_agree_with_each_other(prediction: str, answer: str) -> None:
    assert 0.0 <= f1(prediction, answer) <= 1.0
    assert f1(prediction, answer) == pytest.approx(f1(answer, prediction))
    if exact_match(prediction, answer):
        assert f1(prediction, answer) == 1.0
        assert contains(prediction, answer) == 1.0


def test_patterns_match_from_the_beginning_and_are_searched_for_in_passages() -> None:
    assert matches_pattern("  dec 25, 1990", ["Easter", "Dec.* 25"]) == 1.0
    assert matches_pattern("on dec 25", "dec.* 25") == 0.0
    assert search_pattern("cafe\u0301 au lait", "CAF\u00c9")
    assert not search_pattern("a cart", r"\bart\b")
    for score in (matches_pattern, search_pattern):
        with pytest.raises(InputError, match=r"'\(a' is no regular expression"):
            score("a", "(a")


def test_a_label_is_right_letter_by_letter() -> None:
    assert [accuracy(label, ["yes", "y"]) for label in ("yes", "y", "Yes", "ye")] == [1.0, 1.0, 0.0, 0.0]


@given(st.permutations("abcdef"), st.sets(st.sampled_from("abcdefxyz"), min_size=1), st.integers(1, 8))
def test_ndcg_is_the_gain_over_the_best_gain(ranked: list[str], positives: set[str], k: int) -> None:
    gains = [1.0 if id_ in positives else 0.0 for id_ in ranked[:k]]
    best = [1.0] * min(len(positives), k)
    expected = sum(g / math.log2(n + 2) for n, g in enumerate(gains)) / sum(
        g / math.log2(n + 2) for n, g in enumerate(best)
    )
    assert ndcg_at_k(ranked, positives, k) == pytest.approx(expected)


def test_ndcg_counts_a_passage_once() -> None:
    assert ndcg_at_k(["a", "a"], ["a", "b"], 2) == pytest.approx(1 / (1 + 1 / math.log2(3)))
