"""What `KnowledgeBase.info` tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragstone.knowledge.axes import Axes
from ragstone.knowledge.codes import AXES_FILE
from ragstone.knowledge.compaction import folder_bytes
from ragstone.knowledge.manifest import Manifest
from ragstone.knowledge.passages import SplitOptions
from ragstone.knowledge.search import Searcher
from ragstone.knowledge.selftest import SelfTest
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
        dense_search: what ``search="dense"`` does at this size and memory: "exact", "quantised", "coarse" or "disk".
        axes: along how many directions vectors are quantised, of ``width``; None where they are not.
        self_test: what that finds of what exact search finds; None where it is exact.
        memory: how many bytes search structures may use.
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
    axes: int | None
    self_test: SelfTest | None
    memory: int
    tags: dict[str, int]
    bytes: int
    created: str


def describe(folder: Path, manifest: Manifest, store: PassageStore, searcher: Searcher) -> KnowledgeBaseInfo:
    """Return what the base in ``folder`` holds, how it was made and how ``searcher`` searches it."""
    self_test, way = searcher.self_test(store), searcher.dense_way(store)
    axes = Axes.load(folder / AXES_FILE) if way in ("quantised", "coarse") else None
    return KnowledgeBaseInfo(
        path=str(folder),
        version=store.version,
        passages=len(store),
        documents=store.count_documents(),
        width=manifest.width,
        metric=manifest.metric,
        encoder=manifest.encoder,
        split=manifest.split,
        dense_search=way,
        axes=None if axes is None else axes.matrix.shape[1],
        self_test=self_test,
        memory=searcher.memory,
        tags=store.history.tags(),
        bytes=folder_bytes(folder),
        created=manifest.created,
    )
