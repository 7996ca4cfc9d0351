"""A report is one file that needs nothing else, shows what it was given and lets no text act as HTML."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ragstone.errors import MissingExtraError
from ragstone.evaluation import Prediction, ReadPassage, compare, plots, summarize
from ragstone.evaluation.report import write_report

VOID = {"meta", "br"}


def prediction(n, correct, confidence):
    passages = (
        ReadPassage("<i>d1</i>", "<script>alert(1)</script>", "5 < 6 & so on " * 100, 1.0, 0.9, 0.6, correct),
        ReadPassage("d2", "", "text", 0.0, 0.1, 0.4, False),
    )
    scores = {"exact_match": float(correct), "f1": float(correct), "reciprocal_rank": float(correct), "hit_at_2": 1.0}
    answers = ('"right" & <true>',)
    return Prediction(
        str(n),
        f"<b>question {n}</b>?",
        answers,
        ("d2",),
        f"guess <{n}>",
        math.log(confidence),
        confidence,
        correct,
        scores,
        passages,
    )


LOST = Prediction("9", "lost?", ("a",), (), "", None, None, False, {"exact_match": 0.0, "f1": 0.0}, (), "none <found>")
RUN = [prediction(n, n % 3 == 0, (n + 1) / 10) for n in range(9)] + [LOST]


class Page(HTMLParser):
    """Checks that elements close as they open, and collects text and whatever a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.loaded = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[0] != "#"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    evaluation = summarize(RUN, settings={"model": "<model>", "k": 2})
    sweep = {1: summarize(RUN[:5]), 2: evaluation}
    write_report(path, evaluation, title="A & B", sweep=sweep, comparisons=compare(RUN, RUN))
    return path.read_text(encoding="utf-8")


def test_it_is_whole_and_loads_nothing(page):
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    assert parsed.loaded == []
    assert "script" not in parsed.tags
    assert parsed.tags.count("svg") == 3
    assert not re.search(r"url\((?!#)|@import", page)


def test_it_shows_what_was_given_as_text(page):
    parsed = Page()
    parsed.feed(page)
    text = " ".join("".join(parsed.text).split())
    for words in ("A & B", "<model>", "guess <7>", '"right" & <true>', "none <found>", "<script>alert(1)</script>"):
        assert words in text
    assert "10 questions" in text
    assert "30.0 %" in text  # exact match
    assert "6 answers are wrong" in text
    order = [text.index(f"guess <{n}>") for n in (7, 5, 4, 2, 1)]  # the surest first; question 8 comes before them
    assert order == sorted(order)
    assert "guess <6>" not in text  # it was right


def test_ids_are_unique_and_what_refers_to_them_finds_them(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_charts_are_well_formed_and_drawn_in_the_page_s_own_ink(page):
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("viewBox")
        assert root.get("width") is root.get("height") is None
        assert "currentColor" in chart
        assert "#000000" not in chart.replace("fill: none", "")
    assert len({re.search('aria-label="([^"]+)"', chart)[1] for chart in charts}) == 3


def test_a_report_is_the_same_each_time_it_is_written(tmp_path, page):
    evaluation = summarize(RUN)
    for name in ("a", "b"):
        write_report(tmp_path / name, evaluation)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_to_draw_is_no_error(tmp_path):
    write_report(tmp_path / "r.html", summarize([LOST]))
    text = (tmp_path / "r.html").read_text()
    assert "<svg" not in text
    assert "lost?" in text
    assert plots.recall_curve([LOST]) == plots.correct_by_mass([LOST]) == plots.calibration_diagram([LOST]) == ""


def test_the_prior_s_mass_groups_questions():
    description = re.search('aria-label="([^"]+)"', plots.correct_by_mass(RUN))[1]
    assert description == "1 (9): 33%"  # the first passage holds 0.9 of the prior each time


def test_without_matplotlib_the_command_is_named(tmp_path, monkeypatch):
    def missing(name, module, purpose):
        raise MissingExtraError(f"{purpose} needs {module}")

    monkeypatch.setattr(plots, "extra", missing)
    with pytest.raises(MissingExtraError, match="The report needs matplotlib"):
        write_report(tmp_path / "r.html", summarize(RUN))
