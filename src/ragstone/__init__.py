"""Retrieval-augmented generation as one trainable probabilistic model (Lewis et al. 2020, arXiv 2005.11401).

The public door. Names are loaded on first use (PEP 562), so that importing the package costs next to nothing and does
nothing: no model, no thread, no logger set-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragstone._lazy import loader

if TYPE_CHECKING:
    from ragstone.answers import Answer, Evidence
    from ragstone.knowledge import Hit, KnowledgeBase, Passage
    from ragstone.models import (
        RagConfig,
        RagModel,
        RagSequenceForGeneration,
        RagTokenForGeneration,
        RagTokenizer,
    )
    from ragstone.pipeline import RagPipeline
    from ragstone.retriever import RagRetriever

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Evidence",
    "Hit",
    "KnowledgeBase",
    "Passage",
    "RagConfig",
    "RagModel",
    "RagPipeline",
    "RagRetriever",
    "RagSequenceForGeneration",
    "RagTokenForGeneration",
    "RagTokenizer",
]

_HOMES = {
    "knowledge": ("Hit", "KnowledgeBase", "Passage"),
    "models": (
        "RagConfig",
        "RagModel",
        "RagSequenceForGeneration",
        "RagTokenForGeneration",
        "RagTokenizer",
    ),
    "pipeline": ("RagPipeline",),
    "answers": ("Answer", "Evidence"),
    "retriever": ("RagRetriever",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


__getattr__ = loader(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
