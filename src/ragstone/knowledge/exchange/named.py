"""The indexes that transformers' ``RagConfig`` names by path, as knowledge bases: imported at first use, then kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from ragstone import local
from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge.base import KnowledgeBase
from ragstone.knowledge.exchange.importing import import_collection
from ragstone.knowledge.exchange.sources import open_source
from ragstone.knowledge.passages import content_hash

__all__ = ["cached_base", "named_base"]

logger = logging.getLogger(__name__)

_INDEX_IT = "make a knowledge base of it with `ragstone import` and pass index=KnowledgeBase.open(…)"
_READABLE = "save_to_disk's folder, Parquet with title, text and embeddings, or a knowledge base"


def named_base(
    index_name: str,
    *,
    dataset: str | None = None,
    dataset_split: str | None = None,
    passages_path: str | None = None,
    index_path: str | None = None,
    beside: Path | None = None,
) -> KnowledgeBase | None:
    """Return the base that these fields of a ``RagConfig`` name, or None where they name nothing on this machine.

    Whichever path leads to a knowledge base of Ragstone, that is the one. Otherwise ``"legacy"`` is the folder
    ``index_path`` of DPR's files; ``"custom"`` is the saved Dataset ``passages_path``, to which ``index_path`` is the
    faiss file; any other (``"exact"``, ``"compressed"``) is the Dataset or Parquet that ``passages_path`` or ``dataset``
    leads to.

    Args:
        beside: the folder of the checkpoint; paths that lead nowhere from here are looked for there.

    Raises:
        InputError: a path that is needed leads nowhere, or to something else.
    """
    index, passages = _find(index_path, beside), _find(passages_path, beside)
    named = _find(dataset, beside) if index_name not in ("legacy", "custom") else None
    for place in (index, passages, named):
        if place is not None and KnowledgeBase.exists(place):
            return KnowledgeBase.open(place)
    if index_name == "legacy":
        return None if index_path is None else cached_base(_needed(index, "index_path", index_path), "legacy")
    if index_path is None and passages_path is None and named is None:
        return None
    if passages_path is not None:
        named = _needed(passages, "passages_path", passages_path)
    if named is None:
        return None
    if dataset_split and (named / "dataset_dict.json").is_file():
        named = _needed(named / dataset_split, "dataset_split", str(named / dataset_split))
    flat = None if index_path is None else _needed(index, "index_path", index_path)
    return cached_base(named, "auto", index=flat)


def cached_base(source: Path, format: str, *, index: Path | None = None) -> KnowledgeBase:
    """Open the base that was imported from ``source``; import it first where there is none of these very files.

    It lies in the user's cache folder, named by paths, sizes and times of change, and is of no use once these change.
    Processes that ask at once wait for one of them.
    """
    from filelock import FileLock

    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(source, index)]
    folder = local.cache_folder() / "imported" / content_hash(format, files)
    done = folder.with_suffix(".json")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not done.is_file():
                logger.warning("Importing %s, once, into %s; later uses open that.", source, folder)
                opened = open_source(source, format, index=index)
                if opened.width is None:
                    raise InputError(f"{source} has no vectors, in a column embeddings or in a faiss file; {_INDEX_IT}")
                report = import_collection(opened, folder)
                for note in report.notes:
                    logger.warning("%s", note)
                done.write_text(json.dumps({"source": str(source), "passages": report.passages + report.unchanged}))
    except OSError as error:
        raise KnowledgeBaseError(
            f"{folder} cannot be written ({error.strerror or error}); set RAGSTONE_CACHE to a folder with space, or import "
            f"{source} with `ragstone import`"
        ) from error
    return KnowledgeBase.open(folder)


def _files(source: Path, index: Path | None) -> Iterator[Path]:
    yield from [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    if index is not None:
        yield index


def _find(path: str | None, beside: Path | None) -> Path | None:
    """Return where ``path`` leads: from here, or in the folder ``beside``, to which old checkpoints give it in full."""
    if path is None:
        return None
    places = [Path(path).expanduser()]
    if beside is not None:
        places += [beside / path, beside / Path(path).name]
    return next((place.resolve() for place in places if place.exists()), None)


def _needed(place: Path | None, field: str, value: str) -> Path:
    if place is None or not place.exists():
        raise InputError(f"config.{field} is {value!r}, where there is nothing; name {_READABLE}")
    return place
