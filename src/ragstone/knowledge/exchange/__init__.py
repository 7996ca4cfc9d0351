"""Collections and indexes of other tools, in and out: legacy DPR, saved Datasets, Parquet, faiss, BEIR, Pyserini."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragstone._lazy import loader

if TYPE_CHECKING:
    from ragstone.knowledge.exchange.exporting import ExportReport, export_passages
    from ragstone.knowledge.exchange.importing import ImportReport, import_collection
    from ragstone.knowledge.exchange.named import named_base
    from ragstone.knowledge.exchange.sources import FORMATS, Chunk, Source, open_source

__all__ = [
    "FORMATS",
    "Chunk",
    "ExportReport",
    "ImportReport",
    "Source",
    "export_passages",
    "import_collection",
    "named_base",
    "open_source",
]

_HOMES = {
    "FORMATS": "sources",
    "Chunk": "sources",
    "ExportReport": "exporting",
    "ImportReport": "importing",
    "Source": "sources",
    "export_passages": "exporting",
    "import_collection": "importing",
    "named_base": "named",
    "open_source": "sources",
}


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
