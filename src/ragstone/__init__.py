"""Retrieval-augmented generation as one trainable probabilistic model (Lewis et al. 2020, arXiv 2005.11401).

The public door. Names are loaded on first use (PEP 562), so that importing the package costs next to nothing and does
nothing: no model, no thread, no logger set-up.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "ragstone.knowledge": ("Hit", "KnowledgeBase", "Passage"),
    "ragstone.models": (
        "RagConfig",
        "RagModel",
        "RagSequenceForGeneration",
        "RagTokenForGeneration",
        "RagTokenizer",
    ),
    "ragstone.pipeline": ("RagPipeline",),
    "ragstone.answers": ("Answer", "Evidence"),
    "ragstone.retriever": ("RagRetriever",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ragstone' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
