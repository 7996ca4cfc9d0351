"""What `ask --explain` shows of an answer."""

import numpy as np
import pytest

from ragstone.answers import Answer, Evidence
from ragstone.cli.console import out
from ragstone.cli.explanation import print_answer
from ragstone.knowledge import Passage


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
