"""What `KnowledgeBase.info` tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragstone.knowledge.compaction import folder_bytes
from ragstone.knowledge.manifest import Manifest
from ragstone.knowledge.passages import SplitOptions
from ragstone.knowledge.storage import PassageStore

__all__ = ["KnowledgeBaseInfo", "describe"]


@dataclass(frozen=True)
class KnowledgeBaseInfo:
    """What a knowledge base holds.

    Attributes:
        path: its folder.
        version: the version that is open.
        passages: N, how many passages it holds.
        documents: how many documents they come from.
        width: D, the width of the vectors.
        metric: how vectors are compared.
        encoder: the fields of the encoder's ``EncoderSpec``; None where vectors are given.
        split: how documents are split; None where records and pages are kept whole.
        dense_search: what ``search="dense"`` does at this size: "exact" or "quantised".
        tags: the versions that have names, by name.
        bytes: size of the folder on disk, older versions included.
        created: when the base was made, in ISO 8601.
    """

    path: str
    version: int
    passages: int
    documents: int
    width: int
    metric: str
    encoder: dict[str, Any] | None
    split: SplitOptions | None
    dense_search: str
    tags: dict[str, int]
    bytes: int
    created: str


def describe(folder: Path, manifest: Manifest, store: PassageStore, dense_search: str) -> KnowledgeBaseInfo:
    """Return what the base in ``folder`` holds and how it was made."""
    return KnowledgeBaseInfo(
        path=str(folder),
        version=store.version,
        passages=len(store),
        documents=len(store.documents()),
        width=manifest.width,
        metric=manifest.metric,
        encoder=manifest.encoder,
        split=manifest.split,
        dense_search=dense_search,
        tags=store.history.tags(),
        bytes=folder_bytes(folder),
        created=manifest.created,
    )
