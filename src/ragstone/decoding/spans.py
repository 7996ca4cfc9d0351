"""Extractive answers: the spans of given texts, as the token sequences that targets have."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from ragstone.errors import InputError

__all__ = ["Spans"]

_WORD = re.compile(r"\S+")
_GAP = -1
"""Stands between the tokens of two texts; no span continues across it."""


class _Start(NamedTuple):
    """Where a span can begin: the tokens of the rest of its word at the beginning of a target, after which of them it can
    end, and where the tokens of the next word are."""

    tokens: list[int]
    ends: list[bool]
    then: int


class Spans:
    """Which tokens continue a span of one of some texts. A span begins and ends at the edge of a word; wide characters
    (Chinese, Japanese, Korean) are words of their own. White space counts as one space. An end within punctuation is out of
    reach where the tokenizer joins it to what follows.

    Args:
        tokenizer: the generator's tokenizer, a fast one.
        texts: any number of them.
        opening: the tokens that every target begins with.
        end: the token that ends it.
        limit: of each text, only so many words.

    Raises:
        InputError: the tokenizer does not say where its tokens stand.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], opening: Sequence[int], end: int, limit: int | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"extractive answers need a fast tokenizer, and {type(tokenizer).__name__} is none; set extractive=False."
            )
        self.opening, self.end = list(opening), end
        self._tokens: list[int] = []
        self._ends: list[bool] = []
        self._starts: dict[int, list[_Start]] = {}
        words = [[match.group() for match in islice(_WORD.finditer(text), limit)] for text in texts]
        joined = [" ".join(row) for row in words if row]
        tails = list(dict.fromkeys(word[place:] for row in words for word in row for place in _edges(word)))
        encoded = iter(_encode(tokenizer, [*joined, *tails]))
        wholes = [next(encoded) for _ in joined]
        heads = dict(zip(tails, encoded, strict=True))
        for (tokens, offsets), text, row in zip(wholes, joined, filter(None, words), strict=True):
            base, place = len(self._tokens), 0
            self._tokens += [*tokens, _GAP]
            self._ends += [*_span_ends(text, offsets), False]
            lasts = [stop - 1 for _, stop in offsets]  # of a token with a space before its word, the word's
            for word in row:
                then = base + bisect_left(lasts, place + len(word))
                for edge in _edges(word):
                    head, where = heads[word[edge:]]
                    if head:
                        start = _Start(head, _span_ends(word[edge:], where), then)
                        self._starts.setdefault(head[0], []).append(start)
                place += len(word) + 1

    def next_tokens(self, tokens: Sequence[int]) -> list[int]:
        """What may follow ``tokens``, the beginning of a target; its end alone where they begin no span."""
        said = list(tokens[len(self.opening) :])
        if len(tokens) < len(self.opening):
            return [self.opening[len(tokens)]]
        if not said:
            return list(self._starts) or [self.end]
        following = set()
        for start in self._starts.get(said[0], ()):
            path = self._path(start)
            if all(next(path)[0] == token for token in said[:-1]):
                token, ends = next(path)
                if token == said[-1]:
                    following |= {self.end} if ends else set()
                    following |= {token for token, _ in [next(path)] if token != _GAP}
        return sorted(following) or [self.end]

    def _path(self, start: _Start) -> Iterator[tuple[int, bool]]:
        """The tokens from ``start`` to the end of its text and a gap, and whether a span can end behind each."""
        yield from zip(start.tokens, start.ends, strict=True)
        place = start.then
        while True:
            yield self._tokens[place], self._ends[place]
            place += self._tokens[place] != _GAP


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Tokens and where each stands, as of targets, without special tokens."""
    if texts:
        found = tokenizer(text_target=texts, add_special_tokens=False, padding=False, return_offsets_mapping=True)
        yield from zip(found["input_ids"], found["offset_mapping"], strict=True)


def _span_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether a span can end behind each token: at an edge, all of its last character written, which is no space."""
    following = [start for start, _ in offsets[1:]] + [len(text)]
    return [
        stop <= start and text[stop - 1 : stop] != " " and _is_edge(text, stop)
        for (_, stop), start in zip(offsets, following, strict=True)
    ]


def _edges(word: str) -> list[int]:
    """Where a span can begin in a word."""
    if word.isascii() and word.isalnum():
        return [0]
    return [place for place in range(len(word)) if _is_edge(word, place)]


def _is_edge(text: str, place: int) -> bool:
    """Whether no word goes on at ``place``."""
    if place == 0 or place == len(text):
        return True
    before, after = text[place - 1], text[place]
    return not (_in_word(before) and _in_word(after)) and unicodedata.category(after)[0] != "M"


def _in_word(character: str) -> bool:
    """Whether a letter, a digit or a mark, of a script with spaces between words."""
    return unicodedata.category(character)[0] in "LNM" and unicodedata.east_asian_width(character) not in "WF"
