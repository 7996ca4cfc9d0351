"""Files and records become documents with ids that last, and documents become passages."""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read, reason, write

from ragstone.errors import DocumentError, InputError
from ragstone.knowledge import documents
from ragstone.knowledge.documents import Document, Section, Skipped, document_passages, find_files, iter_documents
from ragstone.knowledge.passages import SplitOptions


def test_a_bad_line_of_jsonl_costs_only_itself(tmp_path: Path) -> None:
    lines = [
        b'{"id": "a", "title": "T", "text": "one", "year": 1, "score": NaN, "page": 3}',
        b"",
        b'{"id": "b", "text"',
        b"[1]",
        b'{"id": "c", "text": null}',
        b'{"id": "d", "text": 5}',
        b'{"id": "e", "text": "caf\xe9"}',
        b'{"id": "f", "text": "\\ud800"}',
        b'{"id": 7, "contents": "two"}',
        b"[" * 100_000,
        b'{"text": "no id"}',
    ]
    path = write(tmp_path / "a.jsonl", b"\r\n".join(lines))
    found = list(iter_documents(path))
    good = [item for item in found if isinstance(item, Document)]
    assert [item.line for item in found if isinstance(item, Skipped)] == [3, 4, 5, 6, 7, 8, 10]
    assert [item.sections[0].text for item in good] == ["one", "two", "no id"]
    assert good[0] == Document("a", "T", (Section("one"),), path.as_posix(), {"year": 1, "page": 3}, is_record=True)
    assert good[1].id == "7"
    assert len(good[2].id) == 32


def test_a_file_that_holds_no_such_records_is_given_up_soon(tmp_path: Path) -> None:
    found = list(iter_documents(write(tmp_path / "a.jsonl", json.dumps([{"text": "x"}] * 999, indent=1))))
    assert len(found) == documents.MAX_FAULTS + 1


def test_the_tsv_of_dpr(tmp_path: Path) -> None:
    rows = (
        'id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet, and\tmore."\tAaron\n2\tPlain text.\t"The ""A"""\n'
    )
    found = read(write(tmp_path / "psgs_w100.tsv", rows))
    assert [(item.id, item.title, item.sections[0].text) for item in found] == [
        ("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet, and\tmore.'),
        ("2", 'The "A"', "Plain text."),
    ]


def test_csv_with_its_delimiter_long_cells_and_ragged_rows(tmp_path: Path) -> None:
    long = "word " * 100_000
    path = write(tmp_path / "a.csv", f"\ufeffText;Title;Year\n{long};T;\n\nshort\na;b;c;d\n".encode())
    found = list(iter_documents(path))
    good = [item for item in found if isinstance(item, Document)]
    assert [item.sections[0].text for item in good] == [long, "short"]
    assert good[0].title == "T"
    assert good[0].metadata == {}
    (skipped,) = (item for item in found if isinstance(item, Skipped))
    assert (skipped.line, "4 columns" in skipped.reason) == (5, True)


def test_an_unclosed_quote_takes_no_other_rows_with_it_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\n1,"all, well"\n2,"unclosed\n3,x\n4,y\n')
    row, fault = iter_documents(path)
    assert row.sections[0].text == "all, well"
    assert "a.csv line 3 is no row of a table" in fault.reason  # where the quote is, not where the file ends
    loose = write(tmp_path / "b.tsv", 'id\ttext\n1\t"A" is a "letter"\n2\t"two\nlines" or so\n3\tlast "one\n')
    assert [item.sections[0].text for item in iter_documents(loose)] == [
        'A is a "letter"',
        "two\nlines or so",
        'last "one',
    ]


def test_a_row_of_several_lines_has_the_number_of_its_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\n1,"two\nlines",more\n2,x\n')
    assert [item.line for item in iter_documents(path) if isinstance(item, Skipped)] == [2]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_title_without_a_text_is_kept_in_every_format(tmp_path: Path, ending: str) -> None:
    rows = [("1", "Only a title", ""), ("2", "", ""), ("3", "T", "text")]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        columns = dict(zip(("id", "title", "text"), zip(*rows, strict=True), strict=True))
        pq.write_table(pa.table(columns | {"text": [None, None, "text"]}), path)
    elif ending == "jsonl":
        texts = (json.dumps({"id": id_, "title": title, "text": text or None}) for id_, title, text in rows)
        write(path, "\n".join(texts))
    else:
        delimiter = "\t" if ending == "tsv" else ","
        write(path, "\n".join(delimiter.join(row) for row in [("id", "title", "text"), *rows]))
    kept, skipped, whole = iter_documents(path)
    assert (kept.id, kept.title, kept.sections[0].text) == ("1", "Only a title", "")
    assert [passage.title for passage in document_passages(kept, SplitOptions())] == ["Only a title"]
    assert skipped.reason.endswith("the text is empty")
    assert whole.sections[0].text == "text"


def test_of_two_columns_of_text_the_one_that_holds_it_counts(tmp_path: Path) -> None:
    (document,) = read(write(tmp_path / "a.csv", "id,text,body,x,x\n1,,words,seen,\n"))
    assert (document.sections[0].text, document.metadata) == ("words", {"x": "seen"})


def test_parquet_in_batches_without_its_vectors(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": list(range(1500)),
            "text": [None, *(f"text {number}" for number in range(1, 1500))],
            "day": [date(2020, 1, 2)] * 1500,
            "rate": [float("nan")] * 1500,
            "tags": [["a", "b"]] * 1500,
            "embeddings": pa.array([[0.5, 1.5]] * 1500, pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, *rest = iter_documents(tmp_path / "a.parquet")
    assert isinstance(first, Skipped)
    assert first.line == 1
    assert len(rest) == 1499
    assert rest[-1] == Document(
        "1499",
        sections=(Section("text 1499"),),
        source=(tmp_path / "a.parquet").as_posix(),
        metadata={"day": "2020-01-02", "tags": ["a", "b"]},
        is_record=True,
    )


def test_a_very_long_line_is_one_document(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    (record,) = read(write(tmp_path / "a.jsonl", json.dumps({"id": "x", "text": text})))
    assert len(document_passages(record, SplitOptions())) == 20_000
    (file,) = read(write(tmp_path / "a.txt", text))
    assert len(document_passages(file, SplitOptions())) == 20_000


def passage_ids(text: str, split: SplitOptions | None, is_record: bool = True) -> list[str]:
    document = Document("r7", "T", (Section(text),), "s", {"k": 1}, is_record)
    passages = document_passages(document, split)
    assert all((p.document_id, p.source, p.title, p.metadata) == ("r7", "s", "T", {"k": 1}) for p in passages)
    return [passage.id for passage in passages]


def test_a_record_of_passage_size_keeps_its_id_and_its_text() -> None:
    assert passage_ids("word " * 150, SplitOptions()) == ["r7"]
    assert passage_ids("word " * 151, SplitOptions()) == ["r7#0", "r7#1"]
    assert passage_ids("word " * 999, None) == ["r7"]
    assert passage_ids("word " * 101, SplitOptions(), is_record=False) == ["r7#0", "r7#1"]
    assert passage_ids("word " * 100, SplitOptions(), is_record=False) == ["r7"]
    (passage,) = document_passages(Document("r", sections=(Section("as  it\nis"),), is_record=True), SplitOptions())
    assert passage.text == "as  it\nis"


def test_a_fingerprint_changes_with_everything_a_passage_shows() -> None:
    variants = [
        Document("a"),
        Document("b"),
        Document("a", "T"),
        Document("a", source="s"),
        Document("a", metadata={"k": 1}),
        Document("a", sections=(Section("x"),)),
        Document("a", sections=(Section("x", 1),)),
        Document("a", is_record=True),
    ]
    assert len({document.fingerprint for document in variants}) == len(variants)
    assert Document("a", metadata={"x": 1, "y": 2}).fingerprint == Document("a", metadata={"y": 2, "x": 1}).fingerprint


def test_folders_are_walked_in_order_without_hidden_or_foreign_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.MD", "a/.hidden.txt", ".git/c.txt", "a/image.png", "C.csv"):
        write(tmp_path / name, "x")
    expected = [tmp_path / name for name in ("C.csv", "a/z.MD", "b.txt")]
    assert find_files([tmp_path, tmp_path / "b.txt", str(tmp_path / "a" / ".." / "b.txt")]) == expected
    assert find_files(tmp_path / ".git") == [tmp_path / ".git/c.txt"]


def test_the_same_folder_has_the_same_ids_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "notes/a.txt", "x")
    here = read(tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    assert list(iter_documents("notes")) == here
    assert [item.id for item in here] == [(tmp_path / "notes/a.txt").as_posix()]


def test_links_neither_loop_nor_repeat(tmp_path: Path) -> None:
    file = write(tmp_path / "notes/sub/a.txt", "x")
    (tmp_path / "notes/sub/up").symlink_to(tmp_path / "notes")
    (tmp_path / "notes/same.txt").symlink_to(file)
    (tmp_path / "notes/gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    gone = tmp_path / "notes/gone.txt"
    assert find_files(tmp_path / "notes") == [gone, file]
    assert ["No such file" in item.reason for item in iter_documents(tmp_path / "notes") if isinstance(item, Skipped)]
    with pytest.raises(InputError, match=r"self\.txt"):
        find_files(tmp_path / "self.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (skipped,) = iter_documents(tmp_path)
    assert "is a pipe" in skipped.reason
    with pytest.raises(InputError, match=r"pipe\.txt"):
        find_files(tmp_path / "pipe.txt")


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*does not exist"):
        find_files([tmp_path, tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("x" * 301, "x' cannot be followed: File name too long; give"),
        (["a\0b"], r"'a\\x00b' cannot be followed: embedded null byte; give"),
        (None, "paths must be a path or a list of paths, not None"),
        (5, "paths must be a path or a list of paths, not 5"),
        ([5], "a path is a string or a Path, not 5"),
        ([None], "a path is a string or a Path, not None"),
    ],
)
def test_what_is_no_path_is_refused_in_one_sentence(paths: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_files(paths)  # type: ignore[arg-type]


def test_faults_of_the_file_system_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "Permission denied" in reason(path)
    with pytest.raises(DocumentError, match="listed"):
        next(documents.read_file(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are no Unicode")
def test_a_file_name_that_is_no_unicode_is_reported_printably(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    (skipped,) = iter_documents(tmp_path)
    assert isinstance(skipped, Skipped)
    assert "caf\\udce9.txt" in skipped.reason
    skipped.reason.encode()
