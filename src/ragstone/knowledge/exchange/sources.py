"""Which format a collection has, and opening it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Literal, get_args

from ragstone.errors import InputError
from ragstone.knowledge.exchange.chunks import Chunk, Source
from ragstone.knowledge.exchange.legacy import INDEX_SUFFIX, legacy_source
from ragstone.knowledge.exchange.tables import table_source
from ragstone.knowledge.exchange.texts import CORPUS, text_source
from ragstone.knowledge.manifest import MANIFEST_FILE

__all__ = ["FORMATS", "Chunk", "Format", "Source", "open_source"]

Format = Literal["auto", "legacy", "dataset", "parquet", "beir", "dpr", "pyserini"]
FORMATS: tuple[str, ...] = get_args(Format)
"""``legacy``: DPR's index. ``dataset``: a saved Dataset. The rest as they are called."""

_ASK = f"say which it is with format= (--format), one of {', '.join(FORMATS[1:])}, or index it as documents"


def open_source(path: str | Path, format: str = "auto", *, index: str | Path | None = None) -> Source:
    """Open a collection of another tool.

    Args:
        path: its file or folder.
        format: one of `FORMATS`; "auto" goes by the files that are there.
        index: the faiss file that belongs to a Dataset or to Parquet: it is checked against them, and is where the
            vectors come from if they have no column ``embeddings``.

    Raises:
        InputError: it is of no such format, incomplete or damaged.
        MissingExtraError: faiss is needed and not installed.
    """
    place = Path(path).expanduser()
    if format not in FORMATS:
        raise InputError(f"format={format!r} is none of {', '.join(FORMATS)}")
    if not place.exists():
        raise InputError(f"{place} does not exist; give the file or folder of a collection")
    kind = _detect(place) if format == "auto" else format
    if kind in ("dataset", "parquet"):
        return table_source(place, kind, None if index is None else Path(index).expanduser())
    if index is not None:
        raise InputError(f"{place} has the format {kind}, which has no index beside it; leave {index} out")
    return legacy_source(place) if kind == "legacy" else text_source(place, kind)


def _detect(path: Path) -> str:
    if path.is_dir():
        return _detect_folder(path)
    suffixes = {".parquet": "parquet", ".arrow": "dataset"}
    if path.name.endswith(INDEX_SUFFIX):
        return "legacy"
    if path.suffix in suffixes:
        return suffixes[path.suffix]
    if path.suffix == ".jsonl":
        return _detect_json(path)
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = {name.strip().lower() for name in next(csv.reader(file, delimiter="\t"), [])}
        if {"id", "text"} <= header:
            return "dpr"
        raise InputError(f"{path} does not begin with the line id, text, title that DPR's tables have; {_ASK}")
    if path.suffix in (".faiss", ".index"):
        raise InputError(
            f"{path} holds vectors without passages; give the Dataset that it belongs to, and this as index="
        )
    raise InputError(f"{path} is of no format that is known here; {_ASK}")


def _detect_folder(path: Path) -> str:
    if (path / MANIFEST_FILE).is_file():
        raise InputError(f"{path} is a knowledge base of Ragstone already; open it, or export it first")
    signs = {
        f"*{INDEX_SUFFIX}": "legacy",
        "state.json": "dataset",
        "dataset_dict.json": "dataset",
        CORPUS: "beir",
        "*.arrow": "dataset",
        "**/*.parquet": "parquet",
    }
    for sign, kind in signs.items():
        if any(path.glob(sign)):
            return kind
    lines = sorted(path.glob("*.jsonl"))
    if lines:
        return _detect_json(lines[0])
    raise InputError(f"{path} holds nothing of a format that is known here; {_ASK}")


def _detect_json(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} does not begin with a JSON object ({error}); {_ASK}") from None
    if isinstance(first, dict) and "_id" in first:
        return "beir"
    if isinstance(first, dict) and "contents" in first:
        return "pyserini"
    raise InputError(f"{path} has neither BEIR's _id nor Pyserini's contents in its first line; {_ASK}")
