"""What `ask --explain` shows of an answer."""

import numpy as np
import pytest

from ragstone.answers import Answer, Evidence
from ragstone.cli.console import complain, err, out
from ragstone.cli.explanation import print_answer, print_hits
from ragstone.knowledge import Hit, Passage


@pytest.mark.parametrize(
    ("tokens", "last"),
    [(("Anna", " Meyer", "</s>"), "Anna Meyer[2]"), (("Anna", " Meyer"), "Anna Meyer[2]"), (("</s>",), "")],
)
def test_the_last_line_is_the_answer_by_passage_without_the_end_of_the_sequence(tokens, last):
    evidence = tuple(
        Evidence(Passage(id, text="who"), 0.0, 0.5, posterior) for id, posterior in (("a", 0.1), ("b", 0.9))
    )
    text = "".join(tokens).removesuffix("</s>")
    posteriors = np.array([[0.1], [0.9]]).repeat(len(tokens), axis=1)
    answer = Answer("who?", text, -1.0, (-1.0, -1.0), evidence, tokens, posteriors)
    with out.capture() as captured:
        print_answer(answer, explain=True)
    shown = captured.get().split("\n")[-2]
    assert shown == last
    assert ("</s>" in captured.get()) == ("</s>" in tokens)  # the table says which passage ended it


def test_an_emoji_code_is_shown_as_it_is_written():
    passage = Passage("a", "Rules :warning:", "mind :warning: and :100:", source="/data/:key:.txt")
    answer = Answer("who?", ":100:", -1.0, (-1.0, -1.0), (Evidence(passage, 0.0, 1.0, 1.0),), ("x",), np.ones((1, 1)))
    with out.capture() as captured:
        print_answer(answer, explain=True)
        print_answer(answer, explain=False)
        print_hits([Hit(passage, 1.0, np.empty(0, np.float32))])
    counts = {code: captured.get().count(code) for code in (":warning:", ":100:", ":key:")}
    assert counts == {":warning:": 5, ":100:": 4, ":key:": 3}
    with err.capture() as captured:
        complain("/data/:key:/x is missing.")
    assert captured.get() == "error: /data/:key:/x is missing.\n"


def test_a_long_answer_is_one_line_where_it_is_piped():
    text = "word " * 50 + "end"
    answer = Answer("who?", text, -1.0, (-1.0, -1.0), (Evidence(Passage("a"), 0.0, 1.0, 1.0),), ("x",), np.ones((1, 1)))
    with out.capture() as captured:
        print_answer(answer, explain=False)
    assert captured.get().splitlines()[0] == text
