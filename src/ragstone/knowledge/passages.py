"""Passages, and how a long text becomes many of them."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

from ragstone.errors import InputError

__all__ = [
    "Passage",
    "SplitOptions",
    "as_passage",
    "as_passages",
    "check_metadata",
    "check_text",
    "content_hash",
    "fits",
    "instances",
    "iter_passages",
    "record_fields",
    "split_text",
]

_PAGES = 2**31  # they are stored in 32 bits


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text with an identity: what is retrieved, shown to the generator and cited as evidence.

    ``page`` counts from 1. ``metadata`` holds whatever JSON can hold, integers of at most 64 bits.
    """

    id: str
    title: str = ""
    text: str = ""
    document_id: str | None = None
    source: str | None = None
    page: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.id == "":
            raise InputError("a passage id is empty; give every passage an id of its own")
        check_text("passage id", self.id)
        check_text(f"title of passage {self.id!r}", self.title)
        check_text(f"text of passage {self.id!r}", self.text)
        for name, value in (("document_id", self.document_id), ("source", self.source)):
            if value is not None:
                check_text(f"{name} of passage {self.id!r}", value)
        storable = isinstance(self.page, int) and not isinstance(self.page, bool) and -_PAGES <= self.page < _PAGES
        if self.page is not None and not storable:
            raise InputError(
                f"page of passage {self.id!r} must be a whole number of at most {_PAGES - 1:,}, not {_shorten(self.page)}"
            )
        check_metadata(f"metadata of passage {self.id!r}", self.metadata)


Kind = TypeVar("Kind")


def instances(kind: type[Kind], columns: Sequence[Sequence[Any]]) -> list[Kind]:
    """Return n instances of the dataclass ``kind``, which has slots, without its checks: ``columns`` hold their values.

    There is a column (n,) per field, in the fields' order.
    """
    made = [kind.__new__(kind) for _ in columns[0]]
    for entry, values in zip(fields(kind), columns, strict=True):  # type: ignore[arg-type]
        deque(map(getattr(kind, entry.name).__set__, made, values), maxlen=0)
    return made


def check_text(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a string that UTF-8 can write."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, not {_shorten(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode at character {error.start}; decode it as UTF-8") from None


def check_metadata(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a mapping that JSON can write."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a mapping, not {_shorten(value)}")
    if value:
        try:
            written = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
            written.encode()
            json.loads(written, parse_int=_stored_integer)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{name} must be what JSON can hold: {error}") from None


def _stored_integer(digits: str) -> int:
    if not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"{digits} has more than 64 bits; make it a string")
    return number


def content_hash(*parts: object) -> str:
    """Return a short fingerprint of JSON-like ``parts``: equal content, equal hash, on any machine.

    >>> content_hash("Hamlet", "A tragedy.") == content_hash("Hamlet", "A tragedy.")
    True
    """
    return blake2b(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode(), digest_size=16).hexdigest()


# What other tools call the same things: Pyserini (contents), BEIR (_id), and everyday tables.
_FIELD_NAMES = {
    "id": ("id", "_id"),
    "title": ("title", "name"),
    "text": ("text", "contents", "content", "body"),
}


def record_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Sort a record's entries into ``id`` (or None), ``title``, ``text`` and ``metadata`` (all the rest).

    Names are matched without regard to case. None counts as absent, but a text that is None as an empty one.

    >>> record_fields({"_id": 7, "Contents": "To be.", "act": 3})
    {'id': '7', 'title': '', 'text': 'To be.', 'metadata': {'act': 3}}
    """
    rest = {key: value for key, value in record.items() if value is not None}
    spelling = {str(key).lower(): key for key in reversed(rest)}
    found: dict[str, Any] = {}
    for name, aliases in _FIELD_NAMES.items():
        key = next((spelling[alias] for alias in aliases if alias in spelling), None)
        found[name] = None if key is None else rest.pop(key)
    if found["text"] is None and any(str(key).lower() in _FIELD_NAMES["text"] for key in record):
        found["text"] = ""
    if found["text"] is None:
        raise InputError(f"no field is named {' or '.join(_FIELD_NAMES['text'])}, only {_shorten(list(record))}")
    check_text("text", found["text"])
    found["title"] = found["title"] or ""
    check_text("title", found["title"])
    if not (found["text"].strip() or found["title"].strip()):
        raise InputError("the text is empty")
    if isinstance(found["id"], int) and not isinstance(found["id"], bool):
        found["id"] = str(found["id"])
    if found["id"] is not None:
        check_text("id", found["id"])
    nested = rest.pop("metadata", {})
    found["metadata"] = {**rest, **(nested if isinstance(nested, Mapping) else {"metadata": nested})}
    check_metadata("metadata", found["metadata"])
    return found


def as_passage(value: Passage | str | Mapping[str, Any], *, default_id: str | None = None) -> Passage:
    """Turn a string or a mapping into a passage; without an id it gets ``default_id``, else a hash of its content.

    >>> as_passage({"id": 7, "title": "Hamlet", "contents": "To be.", "act": 3})
    Passage(id='7', title='Hamlet', text='To be.', document_id=None, source=None, page=None, metadata={'act': 3})
    """
    if isinstance(value, Passage):
        return value
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise InputError(f"a passage is a string, a mapping with a text, or a Passage, not {_shorten(value)}")
    origin = {name: value[name] for name in ("document_id", "source", "page") if name in value}
    fields = record_fields({key: entry for key, entry in value.items() if key not in origin})
    fields["id"] = fields["id"] or default_id or content_hash(fields["title"], fields["text"], fields["metadata"])
    return Passage(**fields, **origin)


def as_passages(values: Iterable[Passage | str | Mapping[str, Any]]) -> list[Passage]:
    """Turn each of ``values`` into a passage.

    >>> [passage.text for passage in as_passages(["one", {"text": "two"}])]
    ['one', 'two']
    """
    return list(iter_passages(values))


def iter_passages(values: Iterable[Passage | str | Mapping[str, Any]]) -> Iterator[Passage]:
    """Turn each of ``values`` into a passage as it is wanted."""
    if isinstance(values, (str, Mapping, Passage)):
        raise InputError(f"passages come as a list: write [{_shorten(values)}]")
    if not isinstance(values, Iterable):
        raise InputError(f"passages come as a list, not as {_shorten(values)}")
    return map(as_passage, values)


_MOST_WORDS = 1_000_000


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """How documents are split: at most ``words`` words a passage, ``overlap`` of them repeated from the one before.

    ``sentences`` keeps sentences whole where they fit (and then repeats whole sentences of at most ``overlap`` words).
    """

    words: int = 100
    overlap: int = 0
    sentences: bool = False

    def __post_init__(self) -> None:
        for name in ("words", "overlap"):
            if type(value := getattr(self, name)) is not int:
                raise InputError(f"{name}={value!r} must be a whole number")
        if not 1 <= self.words <= _MOST_WORDS:
            raise InputError(f"words={self.words}: a passage has 1 to {_MOST_WORDS:,} words (100 is usual)")
        if not 0 <= self.overlap < self.words:
            raise InputError(f"overlap={self.overlap} must be at least 0 and less than words={self.words}")
        if type(self.sentences) is not bool:
            raise InputError(f"sentences={self.sentences!r} must be True or False")


# A word is a run without white space. Chinese and Japanese are written without spaces, so there each character
# counts (with the punctuation that follows it). Longer runs than any word (base64, minified code) count in pieces,
# so that no passage is unbounded.
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = rf"(?:[{_CJK}][\u3001-\u303f\uff01-\uff20]{{0,8}}|[^\s{_CJK}]{{1,200}})"
_WORDS = re.compile(_WORD)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s++(?![a-z])|(?<=[。！？])(?![」』”’）])|\n\s*\n")


@lru_cache
def _window(step: int, overlap: int) -> re.Pattern[str]:
    return re.compile(rf"((?:{_WORD}\s*){{1,{step}}})(?=((?:{_WORD}\s*){{0,{overlap}}}))")


def _by_words(text: str, words: int, overlap: int) -> Iterator[str]:
    for match in _window(words - overlap, overlap).finditer(text):
        yield match[1] + match[2]
        if match.end(2) == len(text):
            return


def _by_sentences(text: str, words: int, overlap: int) -> Iterator[str]:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    sentences = (text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    held: deque[tuple[str, int]] = deque()
    total = 0
    for piece in (piece for sentence in sentences for piece in _by_words(sentence, words, 0)):
        count = len(_WORDS.findall(piece))
        if total + count > words:
            yield "".join(sentence for sentence, _ in held)
            while held and (total > overlap or total + count > words):
                total -= held.popleft()[1]
        held.append((piece, count))
        total += count
    if held:
        yield "".join(sentence for sentence, _ in held)


def fits(text: str, words: int) -> bool:
    """Return whether ``text`` has at most ``words`` words."""
    return len(list(islice(_WORDS.finditer(text), words + 1))) <= words


def split_text(text: str, options: SplitOptions) -> list[str]:
    """Split ``text`` into disjoint chunks of 100 words (Lewis et al. 2020, §3), or as ``options`` say.

    White space inside a chunk becomes single spaces; nothing else changes.

    >>> split_text("the  quick brown fox jumps", SplitOptions(words=3, overlap=1))
    ['the quick brown', 'brown fox jumps']
    >>> split_text("It rains. It pours all day. The end.", SplitOptions(words=4, sentences=True))
    ['It rains.', 'It pours all day.', 'The end.']
    """
    pieces = _by_sentences if options.sentences else _by_words
    return [" ".join(piece.split()) for piece in pieces(text, options.words, options.overlap)]


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
