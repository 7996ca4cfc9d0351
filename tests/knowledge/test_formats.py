"""Whole files are read exactly; what cannot be read is reported with a remedy and never stops the rest."""

from __future__ import annotations

import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from reading import read, reason, text_of, write

from ragstone.knowledge import documents, formats
from ragstone.knowledge.documents import Document, Section, Skipped, document_passages, iter_documents
from ragstone.knowledge.passages import SplitOptions

docx = pytest.importorskip("docx")
canvas = pytest.importorskip("reportlab.pdfgen.canvas")
pytest.importorskip("pypdfium2")


def pdf(path: Path, *pages: str, **options: Any) -> Path:
    page = canvas.Canvas(str(path), **options)
    for text in pages:
        for line, content in enumerate(text.splitlines()):
            page.drawString(72, 750 - 20 * line, content)
        page.showPage()
    page.save()
    return path


def word(path: Path, *paragraphs: str, title: str = "") -> Path:
    file = docx.Document()
    file.core_properties.title = title
    for paragraph in paragraphs:
        file.add_paragraph(paragraph)
    file.save(str(path))
    return path


def test_text_is_decoded_by_its_byte_order_mark_or_as_utf8(tmp_path: Path) -> None:
    for number, data in enumerate(["Größe 東京".encode(c) for c in ("utf-8", "utf-8-sig", "utf-16")]):
        (document,) = read(write(tmp_path / f"note{number}.txt", data))
        assert document.sections == (Section("Größe 東京"),)
        assert document.title == f"note{number}"
        assert document.id == document.source == (tmp_path / f"note{number}.txt").as_posix()


@pytest.mark.parametrize("ending", ["txt", "md", "html", "csv", "tsv", "jsonl"])
def test_binary_files_are_no_text(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    utf_16 = "looks like UTF-16 without a byte order mark; save it as UTF-8"
    text = 'id,text\n{"text": "für alle"}\n1,<p>word\n'
    for content, words in [
        (b"\0" * 5000, "holds NUL characters, as no text does"),
        (b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0", "holds NUL characters"),
        (text.replace("ü", "u").encode("utf-32-le"), "holds NUL characters"),
        (text.replace("ü", "u").encode("utf-16-le"), utf_16),
        (text.replace("ü", "u").encode("utf-16-be"), utf_16),
        ("text\n".encode("utf-16-le"), utf_16),
    ]:
        assert words in reason(write(path, content))
    assert text_of(write(tmp_path / "b.txt", text.encode("utf-16")))


def test_a_nul_far_inside_a_text_costs_no_file(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a.txt", "word " * 2000 + "\0"))) == 1
    first, bad, last = iter_documents(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "\0"}\n{"text": "b"}\n'))
    assert (first.sections[0].text, bad.line, last.sections[0].text) == ("a", 2, "b")


def test_markdown_has_its_first_heading_as_title_and_no_front_matter(tmp_path: Path) -> None:
    (document,) = read(write(tmp_path / "a.md", "---\ntitle: x\ntags: [y]\n---\nIntro\r\n\n## About C#\nBody [a](b)."))
    assert (document.title, document.sections[0].text) == ("About C#", "Intro\n\n## About C#\nBody [a](b).")
    rules = "---\n\nNo front matter.\n\n---\nMore."
    (document,) = read(write(tmp_path / "rules.md", rules))
    assert (document.title, document.sections[0].text) == ("rules", rules)


def test_html_gives_its_readable_text_once_and_in_order(tmp_path: Path) -> None:
    page = """<!doctype html><html><head><title>T &amp; U</title><style>p{}</style><script>if (a<b) "</p>"</script>
    </head><body><nav><ul><li>Home<nav>deep</nav></li><li>About</li></ul></nav>
    <div role="navigation">Menu<div>x</div></div><main>loose
    <b>bo</b>ld &lt;tag&gt; AT&amp;T<h1>Head</h1><p>one<p>two<br>three<ul>
    <li>a<ul><li>b</li></ul></li><li>c
    </li></ul><table><tr><td>d<td>e</table><a href="u"><div>card</div></a><![if x]>last<![endif]><!-- no --></main>
    <footer>Imprint</footer></body></html>"""
    path = write(tmp_path / "page.HTM", page)
    assert text_of(path) == "loose bold <tag> AT&T Head one two three a b c d e card last"
    assert read(path)[0].title == "T & U"
    assert read(write(tmp_path / "b.html", "<h1>He<i>ad</i></h1>text"))[0].title == "Head"


def test_html_is_less_than_a_tag_where_no_tag_begins(tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.html", "text a < b")) == "text a < b"
    tail = "tail 3 < 4 and more > done. 5 < 6 really"
    assert text_of(write(tmp_path / "b.html", f"<p>x</p> {tail} <b cut")) == f"x {tail}"
    assert text_of(write(tmp_path / "c.html", '<img role="navigation"><p>after')) == "after"


def test_html_is_decoded_as_it_declares(tmp_path: Path) -> None:
    assert text_of(write(tmp_path / "a.html", b'<meta charset="ISO-8859-1"><p>Na\xefve \x93q\x94')) == "Naïve “q”"
    assert text_of(write(tmp_path / "b.html", "<p>Naïve")) == "Naïve"
    assert "byte 5" in reason(write(tmp_path / "c.html", b"<p>Na\xefve"))
    assert "klingon" in reason(write(tmp_path / "d.html", b'<meta charset="klingon"><p>x'))


@pytest.mark.parametrize("piece", ["<b ", "<a b='", '<a b="x" ', "<!--", "</", "<![", "<script>", "<div>", "&", "< "])
def test_broken_html_is_read_in_linear_time(tmp_path: Path, piece: str) -> None:
    start = time.perf_counter()
    list(iter_documents(write(tmp_path / "a.html", "text" + piece * 30_000)))
    assert time.perf_counter() - start < 5


def test_docx_keeps_every_character_and_the_order(tmp_path: Path) -> None:
    path = word(tmp_path / "a.docx", "AT&T: a < b > c", "x_y *z* [1]", title="The Title")
    assert text_of(path) == "AT&T: a < b > c x_y *z* [1]"
    assert read(path)[0].title == "The Title"
    file = docx.Document()
    file.add_heading("A heading", 1)
    table = file.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    file.add_paragraph("tab\tstop").add_run("ed")
    file.save(str(tmp_path / "b.docx"))
    assert text_of(tmp_path / "b.docx") == "A heading left right tab stoped"
    assert read(tmp_path / "b.docx")[0].title == "A heading"


def test_docx_leaves_out_what_was_deleted_or_stands_there_twice(tmp_path: Path) -> None:
    xml = """<w:document xmlns:w="w" xmlns:mc="mc"><w:body><w:p>
    <w:del><w:r><w:delText>no</w:delText></w:r></w:del><w:ins><w:r><w:t>yes</w:t></w:r></w:ins>
    <w:moveFrom><w:r><w:t>no</w:t></w:r></w:moveFrom>
    <mc:AlternateContent><mc:Choice><w:t> box</w:t></mc:Choice>
    <mc:Fallback><w:t> box</w:t></mc:Fallback></mc:AlternateContent>
    </w:p></w:body></w:document>"""
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", xml)
        archive.writestr("word/footnotes.xml", "<f><p><t>A note.</t></p></f>")
    assert text_of(tmp_path / "a.docx") == "yes box A note."


def test_pdf_evidence_names_the_page(tmp_path: Path) -> None:
    page = canvas.Canvas(str(tmp_path / "a.pdf"))
    page.setTitle("Annual Report")
    page.drawString(72, 700, "words")
    page.save()
    assert read(tmp_path / "a.pdf")[0].title == "Annual Report"
    path = pdf(tmp_path / "b.pdf", "First page, AT&T.", "", "Third\npage.")
    (document,) = read(path)
    assert document.title == "b"
    passages = document_passages(document, SplitOptions())
    assert [(passage.id, passage.text, passage.page) for passage in passages] == [
        (f"{path.as_posix()}#0", "First page, AT&T.", 1),
        (f"{path.as_posix()}#1", "Third page.", 3),
    ]
    assert {passage.source for passage in passages} == {path.as_posix()}


def test_unreadable_files_are_reported_with_a_remedy_and_the_rest_is_read(tmp_path: Path) -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption

    whole = pdf(tmp_path / "whole.pdf", "words").read_bytes()
    files = {
        "latin1.txt": ("caf\xe9".encode("latin-1"), "byte 3"),
        "empty.txt": (b"", "empty"),
        "blank.md": (b" \n ", "no text"),
        "cut.pdf": (whole[: len(whole) // 2], "damaged"),
        "image.pdf": (pdf(tmp_path / "image.pdf", "").read_bytes(), "OCR"),
        "locked.pdf": (pdf(tmp_path / "l.pdf", "x", encrypt=StandardEncryption("secret")).read_bytes(), "password"),
        "cut.docx": (word(tmp_path / "whole.docx", "words").read_bytes()[:5000], "DOCX"),
        "old.docx": (b"\xd0\xcf\x11\xe0", "DOCX"),
        "blank.docx": (word(tmp_path / "blank.docx").read_bytes(), "no text"),
        "blank.html": (b"<nav>x</nav>", "no text"),
        "blank.jsonl": (b"\n", "no records"),
        "a.parquet": (b"PAR1", "Parquet"),
        "a.csv": (b"name,price\nx,1\n", "text"),
    }
    (tmp_path / "l.pdf").unlink()
    for name, (content, remedy) in files.items():
        assert remedy in reason(write(tmp_path / name, content))
    skipped = [item for item in iter_documents(tmp_path) if isinstance(item, Skipped)]
    assert {Path(item.path).name for item in skipped} == set(files)
    good = [item.source for item in iter_documents(tmp_path) if isinstance(item, Document)]
    assert good == [(tmp_path / "whole.docx").as_posix(), (tmp_path / "whole.pdf").as_posix()]
    assert "kind" in reason(write(tmp_path / "a.exe", b"x"))


def test_bombs_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 99}">' for n in range(1, 9))
    with zipfile.ZipFile(tmp_path / "xml.docx", "w") as archive:
        archive.writestr("word/document.xml", f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><p><t>&e8;</t></p>')
    assert "DOCX" in reason(tmp_path / "xml.docx")
    with zipfile.ZipFile(tmp_path / "zip.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", " " * 1_000_000)
    for module in (formats, documents):
        monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    assert "unpack to 1,000,000 bytes" in reason(tmp_path / "zip.docx")
    assert "limit" in reason(write(tmp_path / "big.txt", "x" * 10_001))


def test_without_the_extra_pdf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert 'pip install "ragstone[documents]"' in reason(pdf(tmp_path / "a.pdf", "words"))
