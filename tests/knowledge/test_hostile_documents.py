"""Documents that are built, or happen, to do harm: each is reported with its reason, and the run goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
from reading import read, reason, text_of, write

from ragstone.knowledge import KnowledgeBase, Passage, SplitOptions, document_passages, documents, formats, records
from ragstone.knowledge.documents import Document, Skipped, iter_documents
from ragstone.testing import ToyEncoder

MIB = 1 << 20


def docx(path: Path, document: str, **other: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", document)
        for name, content in other.items():
            archive.writestr(name, content)
    return path


def pdf(path: Path, content: bytes, filters: bytes = b"/FlateDecode") -> Path:
    """A PDF of one page with ``content`` as its stream."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d/Filter%s>>stream\n%b\nendstream" % (len(content), filters, content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, entry in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%bendobj\n" % (number, entry)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"xref\n0 6\n0000000000 65535 f \n%btrailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )
    path.write_bytes(out)
    return path


def deflated(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(b" " * MIB) for _ in range(mebibytes)) + packer.flush()


def peak_memory(path: Path) -> tuple[int, str]:
    """MiB that a process needed to read ``path`` beyond what it needed before, and what it said."""
    code = f"""
import resource
from pathlib import Path
import pypdfium2
from ragstone.knowledge.documents import iter_documents
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
found = list(iter_documents(Path({str(path)!r})))
print(peak() - before, found[0].reason, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    grown, said = done.stdout.strip().split("|")
    return int(grown), said


def test_a_small_stream_of_a_pdf_is_read(tmp_path: Path) -> None:
    assert (
        text_of(pdf(tmp_path / "a.pdf", zlib.compress(b"BT /F1 12 Tf 10 100 Td (Hello there) Tj ET"))) == "Hello there"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_a_pdf_that_unpacks_to_a_gigabyte_is_refused_in_little_memory(tmp_path: Path) -> None:
    bomb = deflated(1024)
    once = pdf(tmp_path / "once.pdf", bomb)
    twice = pdf(tmp_path / "twice.pdf", zlib.compress(bomb, 9), b"[/FlateDecode/FlateDecode]")
    assert twice.stat().st_size < 10_000
    for path in (once, twice):
        grown, said = peak_memory(path)
        assert "would unpack to more than 200,000,000 bytes" in said
        assert grown < 100


def test_a_pdf_of_too_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pdf(tmp_path / "a.pdf", zlib.compress(b"BT /F1 12 Tf 10 100 Td (Hello there) Tj ET"))
    monkeypatch.setattr(formats, "MAX_BYTES", 10)
    assert reason(path).endswith("would unpack to more than 10 bytes; split it")
    plain = pdf(tmp_path / "b.pdf", b"42 42 re BT /F1 12 Tf 10 100 Td (Hello there) Tj ET", b"[]")
    assert reason(plain).endswith("holds more than 10 characters of text; split it")


def test_a_docx_that_unpacks_to_many_times_its_size_is_refused(tmp_path: Path) -> None:
    path = docx(tmp_path / "a.docx", f"<d>{'<p/>' * 4_000_000}</d>")
    assert "more than 200 times its size" in reason(path)
    inner = docx(tmp_path / "inner.zip", "<d/>", big=" " * 11_000_000)  # what is nested is never opened
    with zipfile.ZipFile(tmp_path / "b.docx", "w") as archive:
        archive.writestr("word/document.xml", "<d><p><t>words</t></p></d>")
        archive.write(inner, "word/embeddings/inner.zip")
    assert text_of(tmp_path / "b.docx") == "words"


def test_a_docx_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = docx(tmp_path / "a.docx", f"<d><p><t>{'x' * 50_000}</t></p></d>")
    content = path.read_bytes()
    size = (50_000 + len("<d><p><t></t></p></d>")).to_bytes(4, "little")
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (100).to_bytes(4, "little")))
    assert "is not a readable DOCX" in reason(path)


@pytest.mark.parametrize("part", ["word/document.xml", "word/footnotes.xml", "docProps/core.xml"])
def test_entities_of_a_docx_are_refused(tmp_path: Path, part: str) -> None:
    laughs = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 99}">' for n in range(1, 9))
    secret = write(tmp_path / "secret", "a secret")
    for number, declared in enumerate([f'<!ENTITY e0 "ha">{laughs}', f'<!ENTITY e8 SYSTEM "file://{secret}">', ""]):
        xml = f"<!DOCTYPE d [{declared}]><d><title>&e8;</title><p><t>&e8;</t></p></d>"
        with zipfile.ZipFile(tmp_path / f"{number}.docx", "w") as archive:
            archive.writestr("word/document.xml", "<d/>" if part != "word/document.xml" else xml)
            if part != "word/document.xml":
                archive.writestr(part, xml)
        assert "declares a document type" in reason(tmp_path / f"{number}.docx")


def test_a_docx_nested_a_million_deep_is_read(tmp_path: Path) -> None:
    chance = "".join(f"<a{number}>" for number in range(200_000))
    ends = "".join(f"</a{number}>" for number in reversed(range(200_000)))
    assert text_of(docx(tmp_path / "a.docx", f"<d>{chance}<p><t>deep</t></p>{ends}</d>")) == "deep"


def test_a_word_of_a_megabyte_is_stored_and_found_again(tmp_path: Path) -> None:
    word = "x" * MIB
    write(tmp_path / "in/a.txt", f"lion {word} zebra")
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    report = kb.add_documents(tmp_path / "in")
    assert report.passages == len(document_passages(read(tmp_path / "in/a.txt")[0], SplitOptions())) > 50
    assert kb.search("zebra", search="keyword")[0].passage.text.endswith("x zebra")
    kb.upsert([Passage("whole", text=f"{word} unusual")])
    assert kb.get("whole")[0].text == f"{word} unusual"
    assert [hit.passage.id for hit in kb.search("unusual", search="keyword")] == ["whole"]
    kb.search(word, search="hybrid")


def test_a_line_too_long_for_memory_ends_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps({"id": "a", "text": "fine"}) + "\n"
    monkeypatch.setattr(records, "MAX_BYTES", 1000)
    for name, content in {
        "a.jsonl": good + '{"id": "b", "text": "' + "x" * 2000,
        "b.csv": "id,text\na,fine\nb," + "x" * 2000,
        "c.csv": 'id,text\na,fine\nb,"' + "x x\n" * 2000,
    }.items():
        found = list(iter_documents(write(tmp_path / name, content)))
        assert isinstance(found[0], Document)
        assert isinstance(found[1], Skipped)
        assert "1,000 characters" in found[1].reason or "limit (1000)" in found[1].reason


def test_a_file_that_changes_while_it_is_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lines = write(tmp_path / "a.txt", "old words"), write(tmp_path / "b.jsonl", '{"id": "a", "text": "one"}\n')
    whole = Path.read_bytes

    def changed_after(self: Path) -> bytes:
        content = whole(self)
        self.write_text("new words, and more")
        return content

    monkeypatch.setattr(Path, "read_bytes", changed_after)
    assert "changed while it was read" in reason(path)
    monkeypatch.undo()
    assert text_of(path) == "new words, and more"
    reading = iter_documents(lines)
    assert next(reading).id == "a"
    with lines.open("a") as file:
        file.write('{"id": "b", "text": "two"}\n')
    assert "changed while it was read" in [*reading][-1].reason


def test_a_file_that_vanishes_is_reported_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"):
        write(tmp_path / "in" / name, '{"text": "words"}')
    read_whole = documents._read_whole

    def read_and_remove(path: Path, size: int) -> Document:
        for name in ("b.txt", "c.jsonl"):
            (tmp_path / "in" / name).unlink(missing_ok=True)
        return read_whole(path, size)

    monkeypatch.setattr(documents, "_read_whole", read_and_remove)
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    report = kb.add_documents(tmp_path / "in")
    assert report.added == 2
    assert [Path(skipped.path).name for skipped in report.skipped] == ["b.txt", "c.jsonl"]


def test_pipes_sockets_devices_and_broken_links_in_a_folder_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    write(folder / "good.txt", "words")
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.chdir(folder)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.txt")
        (folder / "device.txt").symlink_to("/dev/zero")
        (folder / "loop.txt").symlink_to("loop.txt")
        (folder / "loop").symlink_to(folder)
        (folder / "folder.txt").mkdir()
        kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
        report = kb.add_documents(folder)
        skipped = [item for item in iter_documents(folder) if isinstance(item, Skipped)]
    assert (report.added, len(report.skipped)) == (1, 4)
    assert sorted(Path(item.path).name for item in skipped) == ["device.txt", "loop.txt", "pipe.txt", "socket.txt"]


def test_a_file_without_permission_is_reported() -> None:
    code = """
import os, sys
from ragstone.knowledge.documents import iter_documents
if os.getuid() == 0:  # root may read everything
    os.seteuid(65534)
print([getattr(item, "reason", "read") for item in iter_documents(sys.argv[1])])
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        write(Path(folder) / "good.txt", "words")
        write(Path(folder) / "secret.txt", "words").chmod(0)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("['read', "), done.stderr
    assert "secret.txt cannot be opened: Permission denied" in done.stdout


def test_a_reader_that_chokes_costs_only_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.md", "words")
    write(tmp_path / "b.txt", "words")

    def choke(path: Path) -> None:
        raise RecursionError("too deep")

    monkeypatch.setitem(formats.READERS, ".md", choke)
    first, second = iter_documents(tmp_path)
    assert isinstance(first, Skipped)
    assert "RecursionError: too deep" in first.reason
    assert isinstance(second, Document)
