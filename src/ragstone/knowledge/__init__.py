"""Knowledge bases: files become documents, documents become passages, passages are stored and found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragstone._lazy import loader

if TYPE_CHECKING:
    from ragstone.knowledge.base import KnowledgeBase
    from ragstone.knowledge.checking import CheckReport, Fault
    from ragstone.knowledge.compaction import CompactionReport
    from ragstone.knowledge.documents import Document, Skipped, document_passages, find_files, iter_documents, read_file
    from ragstone.knowledge.estimate import IndexEstimate, Plan, estimate_documents, plan
    from ragstone.knowledge.history import Version
    from ragstone.knowledge.indexing import IndexReport
    from ragstone.knowledge.info import KnowledgeBaseInfo
    from ragstone.knowledge.passages import Passage, SplitOptions, as_passages
    from ragstone.knowledge.search import Hit

__all__ = [
    "CheckReport",
    "CompactionReport",
    "Document",
    "Fault",
    "Hit",
    "IndexEstimate",
    "IndexReport",
    "KnowledgeBase",
    "KnowledgeBaseInfo",
    "Passage",
    "Plan",
    "Skipped",
    "SplitOptions",
    "Version",
    "as_passages",
    "document_passages",
    "estimate_documents",
    "find_files",
    "iter_documents",
    "plan",
    "read_file",
]

_HOMES = {
    "CheckReport": "checking",
    "CompactionReport": "compaction",
    "Document": "documents",
    "Fault": "checking",
    "Hit": "search",
    "IndexEstimate": "estimate",
    "IndexReport": "indexing",
    "KnowledgeBase": "base",
    "KnowledgeBaseInfo": "info",
    "Passage": "passages",
    "Plan": "estimate",
    "Skipped": "documents",
    "SplitOptions": "passages",
    "Version": "history",
    "as_passages": "passages",
    "document_passages": "documents",
    "estimate_documents": "estimate",
    "find_files": "documents",
    "iter_documents": "documents",
    "plan": "estimate",
    "read_file": "documents",
}


__getattr__ = loader(__name__, _HOMES)  # a passage needs neither Lance nor numpy


def __dir__() -> list[str]:
    return __all__
