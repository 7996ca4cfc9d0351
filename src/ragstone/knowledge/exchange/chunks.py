"""What a collection is read as: passages in chunks, with their vectors where it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ragstone.errors import InputError
from ragstone.knowledge.documents import Skipped
from ragstone.knowledge.passages import Passage, record_fields

__all__ = ["Chunk", "Source", "build_chunk"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive passages of a source.

    Attributes:
        passages: n of them.
        vectors: theirs, (n, D) float32; None where they have to be encoded.
        skipped: the rows in between that hold no passage, and why.
    """

    passages: Sequence[Passage]
    vectors: np.ndarray | None = None
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Source:
    """A collection that can be imported. Opening one reads what it says of itself, not its passages.

    Attributes:
        kind: its format.
        path: where it lies.
        count: how many rows it has; of text files an estimate, for showing progress.
        width: D, of its vectors; None where it has none.
        chunks: ``chunks(rows)`` reads it from the beginning, at most so many rows at once, always in the same order.
        notes: what whoever imports it should know.
    """

    kind: str
    path: Path
    count: int
    width: int | None
    chunks: Callable[[int], Iterator[Chunk]] = field(repr=False)
    notes: tuple[str, ...] = ()


def build_chunk(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    first: int,
    vectors: np.ndarray | None,
    origins: Sequence[Mapping[str, Any]] | None = None,
) -> Chunk:
    """Turn ``rows``, fields as `record_fields` sorts them, into passages; a row that is none is skipped and named.

    Args:
        path: of the source.
        rows: n of them; one without an id is named by its number.
        first: number of the first of them in the source, from 0.
        vectors: (n, D), or None.
        origins: the ``document_id``, ``source`` and ``page`` of each.
    """
    passages, kept, skipped = [], [], []
    for place, row in enumerate(rows):
        try:
            fields = record_fields(row)
            fields["id"] = fields["id"] or str(first + place)
            passages.append(Passage(**fields, **(origins[place] if origins else {})))
            kept.append(place)
        except InputError as error:
            skipped.append(Skipped(str(path), f"{path} row {first + place}: {error}", first + place))
    if vectors is not None and len(kept) < len(rows):
        vectors = vectors[kept]
    return Chunk(passages, vectors, tuple(skipped))
