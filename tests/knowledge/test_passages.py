"""Passages are checked when made; splitting loses nothing, keeps its limits and takes linear time."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragstone.errors import InputError
from ragstone.knowledge.passages import (
    Passage,
    SplitOptions,
    as_passage,
    as_passages,
    content_hash,
    fits,
    record_fields,
    split_text,
)

WORDS = st.lists(st.text("abc.é!東。'\" ", min_size=1, max_size=12) | st.just("x" * 450) | st.just("\n\n"), max_size=60)


def test_anything_with_text_becomes_a_passage() -> None:
    assert as_passage({"id": 7, "title": "T", "contents": "words", "year": 1999, "metadata": {"a": 1}, "page": 2}) == (
        Passage("7", "T", "words", page=2, metadata={"year": 1999, "a": 1})
    )
    passage = Passage("1", text="x", metadata={"k": [1, None]})
    assert as_passage(passage) is passage
    assert hash(passage) == hash(Passage("1", text="x"))
    assert as_passage("words").id == as_passage({"text": "words"}).id != as_passage("other").id
    assert as_passage({"text": "words", "lang": "de"}).id != as_passage("words").id
    assert as_passage("words", default_id="n1").id == "n1"
    assert as_passages(iter(["a", passage])) == [as_passage("a"), passage]


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        ["words"],
        {},
        {"id": "1"},
        {"text": 5},
        {"text": None},
        {"text": " "},
        {"text": "x", "id": 1.5},
        {"text": "x", "id": True},
        {"text": "x", "title": ["T"]},
        {"text": "x", "page": "3"},
        {"text": "x", "page": 2**31},
        {"text": "x", "page": True},
        {"text": "x", "page": -(2**31) - 1},
        {"text": "x", "source": 3},
        {"text": "\ud800"},
        {"text": "x", "when": object()},
        {"text": "x", "score": float("nan")},
    ],
)
def test_what_is_no_passage_is_refused_in_one_sentence(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        as_passage(value)
    assert "\n" not in str(caught.value)


def test_an_id_must_be_a_string_with_something_in_it() -> None:
    for id_ in ("", 5, None):
        with pytest.raises(InputError):
            Passage(id_)  # type: ignore[arg-type]


def test_a_page_that_cannot_be_stored_is_named_with_its_passage() -> None:
    with pytest.raises(
        InputError, match="page of passage 'a' must be a whole number of at most 2,147,483,647, not 10995"
    ):
        Passage("a", page=2**40)
    assert [Passage("a", page=page).page for page in (0, -3, 2**31 - 1)] == [0, -3, 2**31 - 1]


def test_a_title_is_enough() -> None:
    assert as_passage({"id": "1", "title": "T", "text": None}) == Passage("1", "T")
    for record in ({"id": "1", "text": None}, {"id": "1", "title": " ", "body": None}):
        with pytest.raises(InputError, match="the text is empty"):
            as_passage(record)
    with pytest.raises(InputError, match="no field is named text"):
        as_passage({"id": "1", "title": "T"})


def test_a_lone_passage_is_not_a_list_of_passages() -> None:
    for value in ("words", {"text": "words"}, Passage("1")):
        with pytest.raises(InputError, match="list"):
            as_passages(value)


def test_fields_are_found_under_the_names_that_others_use() -> None:
    assert record_fields({"_id": "q", "Body": "b", "Name": "n"}) == {
        "id": "q",
        "title": "n",
        "text": "b",
        "metadata": {},
    }
    both = record_fields({"contents": "c", "text": "t", "id": None})
    assert both == {"id": None, "title": "", "text": "t", "metadata": {"contents": "c"}}


def test_content_hashes_tell_parts_apart() -> None:
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})


def test_the_papers_split_is_disjoint_chunks_of_100_words() -> None:
    words = [f"w{number}" for number in range(250)]
    pieces = split_text("  " + " \n".join(words) + "\n", SplitOptions())
    assert pieces == [" ".join(words[start : start + 100]) for start in (0, 100, 200)]
    assert split_text(" \n ", SplitOptions()) == []


def test_overlap_repeats_words() -> None:
    assert split_text("a b c d e f", SplitOptions(words=3, overlap=1)) == ["a b c", "c d e", "e f"]
    assert split_text("a b c d e", SplitOptions(words=3, overlap=1)) == ["a b c", "c d e"]
    sentences = SplitOptions(words=4, overlap=2, sentences=True)
    assert split_text("A b. C d. E f. G.", sentences) == ["A b. C d.", "C d. E f.", "E f. G."]


def test_sentences_stay_whole_unless_they_are_too_long() -> None:
    options = SplitOptions(words=5, sentences=True)
    assert split_text('She said "Go." Then i.e. now she left.', options) == [
        'She said "Go."',
        "Then i.e. now she left.",
    ]
    assert split_text("A heading\n\nand a text of five.", options) == ["A heading", "and a text of five."]
    assert split_text("one two three four five six. Seven.", options) == ["one two three four five", "six. Seven."]


def test_scripts_without_spaces_count_by_character() -> None:
    text = "東京は日本の首都です。人口は多い。"
    assert split_text(text, SplitOptions(words=12, sentences=True)) == ["東京は日本の首都です。", "人口は多い。"]
    assert [len(piece) for piece in split_text("語" * 250, SplitOptions())] == [100, 100, 50]


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
def test_integers_that_cannot_be_stored_are_refused(number: int) -> None:
    with pytest.raises(InputError, match="metadata of passage 'p' must be what JSON can hold"):
        Passage("p", metadata={"a": [{"b": number}]})
    assert Passage("p", metadata={"a": [2**64 - 1, -(2**63), 1e300]}).metadata["a"][2] == 1e300


@pytest.mark.parametrize(
    "options",
    [
        {"words": 0}, {"words": 10**10}, {"words": 3.5}, {"words": True}, {"words": "3"}, {"overlap": -1},
        {"overlap": 1.0}, {"words": 10, "overlap": 10}, {"sentences": 1},
    ],
)  # fmt: skip
def test_options_are_checked_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SplitOptions(**options)


@settings(deadline=None)
@given(WORDS, st.integers(1, 20), st.booleans())
def test_splitting_loses_no_character_and_keeps_the_limit(words: list[str], limit: int, sentences: bool) -> None:
    text = " ".join(words)
    pieces = split_text(text, SplitOptions(limit, sentences=sentences))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece and fits(piece, limit) for piece in pieces)
    if not re.search("[東x。]", text):  # then words are what white space separates
        assert " ".join(pieces).split() == text.split()


@settings(deadline=None)
@given(WORDS, st.integers(2, 20), st.data(), st.booleans())
def test_overlapping_pieces_keep_the_limit_and_cover_the_text(
    words: list[str], limit: int, data: st.DataObject, sentences: bool
) -> None:
    text = "".join("".join(words).split())
    pieces = split_text(" ".join(words), SplitOptions(limit, data.draw(st.integers(1, limit - 1)), sentences))
    covered = 0
    for piece in ("".join(piece.split()) for piece in pieces):
        assert fits(piece, limit)
        start = text.rindex(piece, 0, covered + len(piece))
        assert start <= covered
        covered = max(covered, start + len(piece))
    assert covered == len(text)


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "word " * 500_000,
        "x" * 1_000_000,
        "! " * 200_000,
        "?)" * 500_000,
        "\n " * 500_000,
        "。" * 200_000,
        "A. b" * 200_000,
    ],
    ids=["words", "one word", "marks", "closing marks", "blank", "full stops", "no space"],
)
def test_long_texts_take_linear_time_and_no_passage_is_unbounded(text: str, sentences: bool) -> None:
    start = time.perf_counter()
    pieces = split_text(text, SplitOptions(sentences=sentences))
    assert time.perf_counter() - start < 10  # a quadratic split takes hours
    assert max(map(len, pieces), default=0) <= 20_100
