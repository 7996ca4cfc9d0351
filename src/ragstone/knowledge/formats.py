"""The text of one file: ``.txt``, ``.md``, ``.html``, ``.pdf`` and ``.docx``.

HTML and DOCX are read with the standard library, because exactness counts here: the plain-text output of kreuzberg
4.10 drops ``&``, ``<`` and ``>`` from DOCX ("AT&T" becomes "ATT"), and from HTML it drops text that stands outside
paragraphs and repeats paragraphs whose end tag is missing. For PDF it is fast and gives pages.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ragstone._extras import extra
from ragstone.errors import DocumentError

__all__ = ["MAX_BYTES", "READERS", "Extract", "Section", "check_is_text", "encoding_of"]

MAX_BYTES = 200_000_000
"""Larger files (a DOCX: larger once decompressed) are refused: they are held in memory whole."""

_START = 8000  # bytes or characters in which NUL would show
_ASCII_SHARE = 0.5  # of text in UTF-16 that UTF-8 can be taken for, at the least


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


def check_is_text(path: Path, data: bytes, text: str) -> None:
    """Raise DocumentError if the start of ``text``, which ``data`` was decoded to, holds NUL, as no text does."""
    if "\0" not in text[:_START]:
        return
    zeros = sorted(data[place:_START:2].count(0) for place in (0, 1))
    if zeros[1] > _ASCII_SHARE * min(len(data), _START) / 2 and zeros[0] * 10 < zeros[1]:
        raise DocumentError(f"{path} looks like UTF-16 without a byte order mark; save it as UTF-8")
    raise DocumentError(
        f"{path} holds NUL characters, as no text does; leave it out, or save it as UTF-8 if it is text"
    )


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not {encoding.upper()} text at byte {error.start}; save it as UTF-8") from None
    except LookupError:
        raise DocumentError(f"{path} declares the unknown encoding {encoding!r}; save it as UTF-8") from None
    check_is_text(path, data, text)
    return text


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
_HTML_VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")  # they have no end
_HTML_TAG = re.compile(r"<(?=[A-Za-z/!?])")
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
        elif (_HTML_UNREAD.fullmatch(tag) or ("role", "navigation") in attrs) and not _HTML_VOID.fullmatch(tag):
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
    parser.feed(text[:end] + _HTML_TAG.split(text[end:], 1)[0])
    parser.close()
    blocks = (" ".join(block.split()) for block in "".join(parser.text).split("\f"))
    title = parser.titles["title"].split() or parser.titles["h1"].split()
    return Extract(" ".join(title), (Section("\n\n".join(block for block in blocks if block)),))


_DOCX_BREAKS = {"p": "\n\n", "br": "\n", "cr": "\n", "tab": "\t", "noBreakHyphen": "-"}
# What was deleted or moved away, and the second rendering of what is there already.
_DOCX_UNREAD = {"del", "moveFrom", "Fallback"}


class _DocxText:
    """Collects the pieces of a WordprocessingML part's text, and whether each stands in a title or heading.

    It is what an XMLParser feeds, so no tree of elements is built, which could be many times as large as the file.
    """

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bool]] = []
        self.title = ""
        self._inside: list[str] = []  # the elements that are open and count: one that is not read, a text, a title
        self._heading = False

    def doctype(self, *_: str) -> None:
        raise ElementTree.ParseError("it declares a document type, as Word never does")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition("}")[2]
        if name in _DOCX_UNREAD or name in ("t", "title"):
            self._inside.append(name)
        elif self._unread:
            return
        elif name == "pStyle":
            self._heading = any(value.startswith(("Title", "Heading")) for value in attributes.values())
        elif name in _DOCX_BREAKS and name != "p" and (name != "tab" or not attributes):  # those define a tab stop
            self.pieces.append((_DOCX_BREAKS[name], self._heading))

    def end(self, tag: str) -> None:
        name = tag.rpartition("}")[2]
        if self._inside and name == self._inside[-1]:
            self._inside.pop()
        elif name == "p" and not self._unread:
            self.pieces.append((_DOCX_BREAKS[name], self._heading))
            self._heading = False

    def data(self, text: str) -> None:
        if self._inside and not self._unread:
            if self._inside[-1] == "t":
                self.pieces.append((text, self._heading))
            else:
                self.title += text

    def close(self) -> None:
        pass

    @property
    def _unread(self) -> bool:
        return not _DOCX_UNREAD.isdisjoint(self._inside)


_DOCX_FAULTS = (zipfile.BadZipFile, ElementTree.ParseError, zlib.error, EOFError, RuntimeError, LookupError)
_DOCX_PARTS = re.compile(r"word/(document\d*|footnotes|endnotes)\.xml|docProps/core\.xml")


def _read_docx(path: Path) -> Extract:
    found = _DocxText()
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise DocumentError(f"{path} would unpack to {size:,} bytes; the limit is {MAX_BYTES:,}: split it")
            if size > max(_PACKED_BYTES, _PACKED_SHARE * path.stat().st_size):
                raise DocumentError(
                    f"{path} would unpack to {size:,} bytes, more than {_PACKED_SHARE} times its size, as no text does; "
                    "open it in Word and save it again if it is sound"
                )
            for name in sorted(filter(_DOCX_PARTS.fullmatch, archive.namelist())):
                parser = ElementTree.XMLParser(target=found)
                with archive.open(name) as part:
                    while block := part.read(1 << 16):
                        parser.feed(block)
                parser.close()
    except _DOCX_FAULTS as error:
        raise DocumentError(
            f"{path} is not a readable DOCX file ({error}); open it in Word and save it again"
        ) from None
    headings = "".join(text for text, heading in found.pieces if heading).strip().split("\n")
    return Extract(found.title.strip() or headings[0], (Section("".join(text for text, _ in found.pieces)),))


_PACKED_BYTES, _PACKED_SHARE = 10_000_000, 200  # larger ones that unpack to more than this share are bombs
_PDF_STREAM = re.compile(rb"(?<!end)stream\r?\n")
_PDF_FILTERS = 8  # one after another on one stream


def _unpacked_bytes(layers: list[Any], depth: int, packed: bytes, limit: int) -> int:
    """Return how many bytes come of ``packed`` in all layers of deflate, one in the other; it stops above ``limit``."""
    if depth == len(layers):
        deflated = len(packed) > 1 and packed[0] & 15 == 8 and int.from_bytes(packed[:2]) % 31 == 0
        layers.append(zlib.decompressobj() if deflated and depth < _PDF_FILTERS else None)
    total = 0
    while packed and layers[depth] is not None and total <= limit:
        try:
            block = layers[depth].decompress(packed, 1 << 16)
        except zlib.error:
            layers[depth] = None
            break
        packed = layers[depth].unconsumed_tail
        total += len(block) + (_unpacked_bytes(layers, depth + 1, block, limit - total) if block else 0)
    return total


def _check_pdf(path: Path, data: bytes) -> None:
    """Raise DocumentError if the streams of a PDF unpack to more than MAX_BYTES: PDFium holds them in memory."""
    total = 0
    for match in _PDF_STREAM.finditer(data):
        end = data.find(b"endstream", match.end())
        total += _unpacked_bytes([], 0, data[match.end() : end if end >= 0 else len(data)], MAX_BYTES - total)
        if total > MAX_BYTES:
            raise DocumentError(f"{path} would unpack to more than {MAX_BYTES:,} bytes; split it")


def _read_pdf(path: Path) -> Extract:
    pypdfium2 = extra("documents", "pypdfium2", f"{path}: reading PDF")
    data = path.read_bytes()
    _check_pdf(path, data)
    pages, size = [], 0
    try:
        with pypdfium2.PdfDocument(data) as pdf:
            for page in pdf:
                pages.append(page.get_textpage().get_text_bounded())
                size += len(pages[-1])
                if size > MAX_BYTES:
                    raise DocumentError(f"{path} holds more than {MAX_BYTES:,} characters of text; split it")
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
