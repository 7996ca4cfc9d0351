"""The text of one file: ``.txt``, ``.md``, ``.html``, ``.pdf`` and ``.docx``.

HTML and DOCX are read with the standard library, because exactness counts here: the plain-text output of kreuzberg
4.10 drops ``&``, ``<`` and ``>`` from DOCX ("AT&T" becomes "ATT"), and from HTML it drops text that stands outside
paragraphs and repeats paragraphs whose end tag is missing. For PDF it is fast and gives pages.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from ragstone._extras import extra
from ragstone.errors import DocumentError

__all__ = ["MAX_BYTES", "READERS", "Extract", "Section", "encoding_of"]

MAX_BYTES = 200_000_000
"""Larger files (a DOCX: larger once decompressed) are refused: they are held in memory whole."""


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of text that is split on its own, and the page it stands on, where there are pages."""

    text: str
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Extract:
    """What is read from a file; ``title`` is empty where the file does not say."""

    title: str
    sections: tuple[Section, ...]


def encoding_of(head: bytes) -> str:
    """Return the encoding that a file's byte order mark declares, else UTF-8."""
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not {encoding.upper()} text at byte {error.start}; save it as UTF-8") from None
    except LookupError:
        raise DocumentError(f"{path} declares the unknown encoding {encoding!r}; save it as UTF-8") from None


def _read_txt(path: Path) -> Extract:
    data = path.read_bytes()
    return Extract("", (Section(_decode(path, data, encoding_of(data))),))


_FRONT_MATTER = re.compile(r"---[ \t]*\n(?=[\w-]+[ \t]*:).*?\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*)$", re.MULTILINE)


def _read_md(path: Path) -> Extract:
    text = _read_txt(path).sections[0].text.replace("\r\n", "\n")
    if front_matter := _FRONT_MATTER.match(text):
        text = text[front_matter.end() :]
    heading = _HEADING.search(text)
    return Extract(heading[1].strip() if heading else "", (Section(text),))


_HTML_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|q|ruby|s|samp|small|span|strike|"
    "strong|sub|sup|time|tt|u|var|wbr"
)
_HTML_UNREAD = re.compile("script|style|template|noscript|svg|nav|footer|button|select|textarea|iframe")


class _HtmlText(HTMLParser):
    """Collects the readable text of a page, a form feed between blocks, and its title."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.titles: dict[str, str] = {"title": "", "h1": ""}
        self._heading = ""  # the element of `titles` that is open
        self._skipped = ""  # the outermost unread element that is open
        self._depth = 0  # how many elements of that name are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
        elif _HTML_UNREAD.fullmatch(tag) or ("role", "navigation") in attrs:
            self._skipped, self._depth = tag, 1
        elif not _HTML_INLINE.fullmatch(tag):
            self.text.append("\f")
            self._heading = tag if not self.titles.get(tag, tag) else ""

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
        elif not _HTML_INLINE.fullmatch(tag):
            self.text.append("\f")
            self._heading = ""

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if self._heading:
            self.titles[self._heading] += data
        if self._heading != "title":
            self.text.append(data)


_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def _read_html(path: Path) -> Extract:
    data = path.read_bytes()
    encoding = encoding_of(data)
    if encoding == "utf-8" and not data.startswith(b"\xef\xbb\xbf") and (declared := _CHARSET.search(data, 0, 4096)):
        encoding = declared[1].decode().lower()
    parser = _HtmlText()
    # Browsers read what declares itself Latin-1 as Windows-1252, which has the curly quotes.
    text = _decode(path, data, "cp1252" if encoding in ("iso-8859-1", "latin-1", "us-ascii") else encoding)
    text = text.replace("<![", "<!")  # HTML has no marked sections: this is a comment, where HTMLParser raises
    end = text.rfind(">") + 1  # a tag that is cut off by the end is no text, and costs HTMLParser quadratic time
    parser.feed(text[:end] + text[end:].partition("<")[0])
    parser.close()
    blocks = (" ".join(block.split()) for block in "".join(parser.text).split("\f"))
    title = parser.titles["title"].split() or parser.titles["h1"].split()
    return Extract(" ".join(title), (Section("\n\n".join(block for block in blocks if block)),))


_DOCX_BREAKS = {"p": "\n\n", "br": "\n", "cr": "\n", "tab": "\t", "noBreakHyphen": "-"}
# What was deleted or moved away, and the second rendering of what is there already.
_DOCX_UNREAD = {"del", "moveFrom", "Fallback"}


def _docx_text(part: IO[bytes]) -> Iterator[tuple[str, bool]]:
    """Yield pieces of a WordprocessingML part's text, and whether each stands in a title or heading."""
    unread, heading = 0, False
    for event, element in ElementTree.iterparse(part, ("start", "end")):
        name = element.tag.rpartition("}")[2]
        if name in _DOCX_UNREAD:
            unread += 1 if event == "start" else -1
        elif event == "end" and not unread:
            if name == "t":
                yield element.text or "", heading
            elif name == "pStyle":
                heading = any(value.startswith(("Title", "Heading")) for value in element.attrib.values())
            elif name in _DOCX_BREAKS and (name != "tab" or not element.attrib):  # attributes: a tab stop's definition
                yield _DOCX_BREAKS[name], heading
                heading = heading and name != "p"
        if event == "end" and name == "p":
            element.clear()


_DOCX_FAULTS = (zipfile.BadZipFile, ElementTree.ParseError, zlib.error, EOFError, RuntimeError, LookupError)


def _read_docx(path: Path) -> Extract:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise DocumentError(f"{path} would unpack to {size:,} bytes; the limit is {MAX_BYTES:,}: split it")
            parts = [
                name for name in archive.namelist() if re.fullmatch(r"word/(document\d*|footnotes|endnotes)\.xml", name)
            ]
            pieces = [piece for part in sorted(parts) for piece in _docx_text(archive.open(part))]
            title = ""
            if "docProps/core.xml" in archive.namelist():
                title = ElementTree.parse(archive.open("docProps/core.xml")).findtext("{*}title") or ""
    except _DOCX_FAULTS as error:
        raise DocumentError(
            f"{path} is not a readable DOCX file ({error}); open it in Word and save it again"
        ) from None
    headings = "".join(text for text, heading in pieces if heading).strip().split("\n")
    return Extract(title.strip() or headings[0], (Section("".join(text for text, _ in pieces)),))


def _read_pdf(path: Path) -> Extract:
    pypdfium2 = extra("documents", "pypdfium2", f"{path}: reading PDF")
    try:
        with pypdfium2.PdfDocument(path) as pdf:
            pages = [page.get_textpage().get_text_bounded() for page in pdf]
            title = pdf.get_metadata_dict().get("Title", "").strip()
    except pypdfium2.PdfiumError as error:
        if "password" in str(error):
            raise DocumentError(f"{path} is protected by a password; save it without one") from None
        raise DocumentError(f"{path} is damaged or no PDF file; open it in a PDF viewer and save it again") from None
    # PDFium marks a word that is hyphenated at the end of a line with \x02, and joins it.
    texts = (page.replace("\x02", "").replace("\r\n", "\n") for page in pages)
    sections = tuple(Section(text, number) for number, text in enumerate(texts, 1))
    if not any(section.text.strip() for section in sections):
        raise DocumentError(f"{path} holds no text, only images; run it through OCR (for example ocrmypdf) first")
    return Extract("" if title.lower() == "untitled" else title, sections)


READERS: dict[str, Callable[[Path], Extract]] = {
    ".txt": _read_txt,
    ".md": _read_md,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
