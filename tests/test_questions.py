"""Questions are read as the files say, and what is wrong with a file is said with its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ragstone.errors import DataError, InputError
from ragstone.questions import Question, read_questions

DATA = Path(os.environ.get("RAGSTONE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to


def test_json_lines(write):
    path = write(
        "q.jsonl",
        '{"question": "who?", "answers": ["a", " b "], "id": "first", "positive_ids": ["p", 7, "p"]}\n'
        "\n"
        '{"question": "why?", "answers": "because", "extra": 1}\r\n'
        '{"question": "how?", "answer": "so", "id": 12, "positive_ids": "p"}',
    )
    assert read_questions(path) == [
        Question("who?", ("a", "b"), "first", ("p", "7")),
        Question("why?", ("because",), "3"),
        Question("how?", ("so",), "12", ("p",)),
    ]


def test_a_byte_order_mark_is_no_part_of_the_question_and_a_line_separator_no_end_of_line(write):
    path = write("q.jsonl", b"\xef\xbb\xbf" + '{"question": "one\u2028two", "answers": ["a"]}'.encode())
    assert read_questions(path)[0].question == "one\u2028two"
    assert read_questions(write("q.tsv", b"\xef\xbb\xbfwho?\t['a']\n"))[0].question == "who?"


@pytest.mark.parametrize("name", ["nq.json", "nq.jsonl"])
def test_dpr_s_lists_with_their_gold_passages(write, name):
    items = [
        {
            "dataset": "nq_dev",
            "question": "who?",
            "answers": ["a"],
            "positive_ctxs": [{"title": "t", "text": "x", "passage_id": "11"}, {"psg_id": 12}, {"title": "no id"}],
            "negative_ctxs": [],
        },
        {"question": "why?", "answers": ["b"], "positive_ctxs": []},
    ]
    path = write(name, json.dumps(items, indent=1))
    assert read_questions(path) == [Question("who?", ("a",), "1", ("11", "12")), Question("why?", ("b",), "2")]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_dpr_s_tables_of_python_or_json_lists(write, suffix):
    path = write(
        f"nq-test.{suffix}",
        "who?\t['Udo', \"it's\"]\n"
        "\n"
        'quoted?\t"[""Tony \'T\' Fox"", \'b\']"\n'
        'json?\t["caf\\u00e9", "b"]\n'
        "trec?\t['(19|20)\\\\d\\\\d']\n",
    )
    read = read_questions(path)
    assert [q.answers for q in read] == [("Udo", "it's"), ("Tony 'T' Fox", "b"), ("café", "b"), (r"(19|20)\d\d",)]
    assert [q.id for q in read] == ["1", "3", "4", "5"]


@pytest.mark.parametrize("named", ["dev.source", "dev.target", "dev"])
def test_a_source_and_its_target(write, tmp_path, named):
    write("dev.source", "who?\nwhy?\n\n")
    write("dev.target", "a\tb\nbecause\n\n")
    assert read_questions(tmp_path / named) == [Question("who?", ("a", "b"), "1"), Question("why?", ("because",), "2")]


def test_no_code_in_a_table_is_run(write):
    path = write("q.tsv", "who?\t__import__('os').abort()\n")
    with pytest.raises(DataError, match="no list"):
        read_questions(path)


def test_a_limit_takes_the_first_or_draws_and_a_larger_draw_holds_the_smaller(write):
    path = write("q.jsonl", "\n".join(json.dumps({"question": f"{n}?", "answers": "a"}) for n in range(50)))
    every = read_questions(path)
    assert read_questions(path, limit=3) == every[:3]
    assert read_questions(path, limit=99, seed=1) == read_questions(path, seed=1) == every
    five, ten, other = (read_questions(path, limit=n, seed=s) for n, s in [(5, 1), (10, 1), (10, 2)])
    assert five == read_questions(path, limit=5, seed=1)
    assert set(five) < set(ten)
    assert set(ten) != set(other)
    assert ten == sorted(ten, key=every.index)
    with pytest.raises(InputError, match="limit=0"):
        read_questions(path, limit=0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("q.jsonl", "", "holds no question"),
        ("q.jsonl", "\n \n", "holds no question"),
        ("q.json", "[]", "holds no question"),
        ("q.jsonl", '{"question": "a?", "answers": ["b"]}\n{"question"', "line 2: not JSON"),
        ("q.jsonl", '"why?"', "line 1: 'why\\?' is no object"),
        ("q.json", "[1]", "item 1: 1 is no object"),
        ("q.json", '[{"question": "a?"', "not JSON"),
        ("q.jsonl", '{"answers": ["b"]}', '"question" is None'),
        ("q.jsonl", '{"question": " ", "answers": ["b"]}', "blank"),
        ("q.jsonl", '{"question": "a?"}', "no answer"),
        ("q.jsonl", '{"question": "a?", "answers": []}', "no answer"),
        ("q.jsonl", '{"question": "a?", "answers": [" "]}', "no answer"),
        ("q.jsonl", '{"question": "a?", "answers": [1, "b"]}', "not all strings"),
        ("q.jsonl", '{"question": "a?", "answers": ["b"], "id": [1]}', '"id" holds \\[1\\]'),
        ("q.jsonl", '{"question": "a?", "answers": ["b"], "positive_ids": [null]}', '"positive_ids" holds None'),
        ("q.jsonl", '{"question": "a?", "answers": "b", "id": "2"}\n{"question": "c?", "answers": "d"}', "the id '2'"),
        ("q.jsonl", '{"question": "a?", "answers": "b", "positive_ctxs": 3}', 'line 1: "positive_ctxs" is 3'),
        ("q.jsonl", "[" * 10**5, "not JSON \\(maximum recursion"),
        ("q.jsonl", '{"question": ' + "[" * 10**5, "line 1: not JSON \\(maximum recursion"),
        ("q.jsonl", '{"question": "a?", "answers": "b", "id": ' + "9" * 5000 + "}", "line 1: not JSON \\(Exceeds"),
        ("q.jsonl", '{"question": "a\\ud800?", "answers": "b"}', r"line 1: 'a\\ud800\?' is not valid Unicode"),
        ("q.jsonl", '{"question": "a?", "answers": ["b", "\\udfff"]}', r"line 1: '\\udfff' is not valid Unicode"),
        ("q.jsonl", '{"question": "a?", "answers": "b", "id": "\\ud800"}', "line 1: .* is not valid Unicode"),
        ("q.tsv", "who?\t" + "[" * 10**5, "line 1: the answers"),
        ("q.tsv", "who?\t" + "9" * 5000, "line 1: the answers"),
        ("q.tsv", "a?\t['x']\n\"b?\t['y']\n\"c?\t['z']\n", "line 2: a quote is open"),
        ("q.tsv", "a?\t['x']\n\"b?\t['y']\nc?\t['z']\n", "line 2: a quote is open"),
        ("q.tsv", "who?\n", "line 1: 1 columns"),
        ("q.tsv", "who?\t['a']\tmore\n", "line 1: 3 columns"),
        ("q.tsv", "ok?\t['a']\nwho?\tUdo\n", "line 2: the answers 'Udo'"),
        ("q.tsv", "who?\t[1, 2]\n", "not all strings"),
        ("q.tsv", "who?\t" + "x" * 200_000, "line 1: the answers 'xxx"),
        ("q.txt", "who?", "of no kind"),
        ("q.jsonl", b'{"question": "Z\xfcrich?", "answers": ["b"]}', "not UTF-8 at byte 15"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(write, name, text, words):
    path = write(name, text)
    with pytest.raises(DataError, match=words) as caught:
        read_questions(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_null_is_not_there(write):
    path = write(
        "q.jsonl",
        '{"question": "a?", "answers": null, "answer": "b", "id": null, "positive_ids": null, '
        '"positive_ctxs": [{"passage_id": null, "psg_id": "z"}]}',
    )
    assert read_questions(path) == [Question("a?", ("b",), "1", ("z",))]


def test_an_id_that_is_the_number_of_another_line_is_explained(write):
    named, unnamed = '{"question": "a?", "answers": "b", "id": "%s"}', '{"question": "c?", "answers": "d"}'
    with pytest.raises(DataError, match=r"the id '2' \(.*q\.jsonl, line 2 has no id of its own and gets its number\)"):
        read_questions(write("q.jsonl", f"{named % 2}\n{unnamed}"))
    with pytest.raises(DataError, match=r"the id '1' \(.*q\.json, item 1 has no id of its own and gets its number\)"):
        read_questions(write("q.json", f"[{unnamed}, {named % 1}]"))
    with pytest.raises(DataError, match="the id '7'; give each"):
        read_questions(write("q.jsonl", f"{named % 7}\n{named % 7}"))


def test_pairs_that_do_not_fit(write, tmp_path):
    write("a.source", "who?\nwhy?\n")
    with pytest.raises(DataError, match=r"a\.target cannot be read"):
        read_questions(tmp_path / "a.source")
    write("a.target", "a\n")
    with pytest.raises(DataError, match=r"a\.target, line 2 is blank or missing"):
        read_questions(tmp_path / "a")
    write("a.target", "a\nb\nc\n")
    with pytest.raises(DataError, match=r"a\.source, line 3 is blank or missing"):
        read_questions(tmp_path / "a")


def test_a_missing_file_is_named(tmp_path):
    for name in ("nowhere.jsonl", "nowhere.tsv", "nowhere"):
        with pytest.raises(DataError, match="nowhere"):
            read_questions(tmp_path / name)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no development data")
@pytest.mark.parametrize(
    ("name", "count", "gold"),
    [
        ("wiki18/questions.dev.jsonl", 1555, False),
        ("squad/questions.dev.jsonl", 5493, True),
        ("fever/questions.dev.jsonl", 1000, True),
    ],
)
def test_real_questions(name, count, gold):
    questions = read_questions(DATA / name)
    assert len(questions) == count
    assert all(bool(question.positive_ids) == gold for question in questions)
