"""Measures of generated texts agree with their definitions and with the libraries that define them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragstone.errors import InputError
from ragstone.evaluation.texts import bleu_1, distinct_ngrams, q_bleu_1, rouge_l

WORDS = st.lists(st.sampled_from(["the", "cat", "dog", "sat", "on", "mat"]), min_size=1, max_size=8).map(" ".join)


def subsequence(a, b):
    """Length of the longest common subsequence, by definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + subsequence(a[1:], b[1:])
    return max(subsequence(a[1:], b), subsequence(a, b[1:]))


@settings(deadline=None, max_examples=30)
@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(prediction, answer):
    ours, theirs = prediction.split(), answer.split()
    common = subsequence(ours, theirs)
    assert rouge_l(prediction, answer) == pytest.approx(2 * common / (len(ours) + len(theirs)))


def test_the_best_answer_counts():
    assert rouge_l("the cat", ["a dog ran", "the cat"]) == 1.0
    assert q_bleu_1("What is Rome?", ["Who ran?", "What is Rome?"]) == q_bleu_1("What is Rome?", "What is Rome?")


def test_bleu_1_counts_clipped_words_and_punishes_brevity():
    assert bleu_1(["the the the"], ["the cat"]) == pytest.approx(1 / 3)
    assert bleu_1(["the"], ["the cat"]) == pytest.approx(math.exp(1 - 2))
    # Each text has its own number of answers; lengths and matches are summed before they are divided.
    assert bleu_1(["a b", "c"], [["a x", "x b"], "c"]) == pytest.approx(3 / 3)
    assert bleu_1(["", "c"], ["c", "c"]) == pytest.approx(math.exp(1 - 2))


def test_without_an_answer_or_a_text_there_is_no_score():
    assert rouge_l("x", []) == q_bleu_1("x", []) == 0.0
    assert bleu_1([], []) == bleu_1(["a"], [[]]) == 0.0
    assert bleu_1(["a", "b"], [[], ["b"]]) == pytest.approx(1 / 2)
    with pytest.raises(InputError, match="2 predictions came with 1 answers"):
        bleu_1(["a", "b"], ["a"])


def test_distinct_trigrams_do_not_cross_texts():
    assert distinct_ngrams(["a b c", "a b c", "x y z"]) == pytest.approx(2 / 3)
    assert distinct_ngrams(["a b", ""]) == 0.0


def test_q_bleu_1_weighs_its_parts_as_published():
    # Names (Paris, France), type (what capital), function words (is the of): nothing else differs from the reference.
    reference = "What capital is in France?"
    assert q_bleu_1(reference, reference) == pytest.approx(0.7 * (0.6 + 0.2 + 0.1) + 0.3)
    wrong_name = q_bleu_1("What capital is in Spain?", reference)
    assert wrong_name == pytest.approx(0.7 * (0.2 + 0.1) + 0.3 * 4 / 5)
    wrong_type = q_bleu_1("Which river is in France?", reference)
    assert wrong_type == pytest.approx(0.7 * (0.6 + 0.1) + 0.3 * 3 / 5)
    assert q_bleu_1("", reference) == 0.0
