"""The Lance dataset of a knowledge base: passages and vectors in, rows out. Every write is one commit, so one version.

A row is named by its *row id*: a number that Lance gives it once and keeps through updates and compaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge.faults import first_sentence, reading, writing
from ragstone.knowledge.manifest import PASSAGES_FOLDER
from ragstone.knowledge.passages import Passage

__all__ = ["PassageStore", "StoredDocument", "Version", "passage_table"]

KEYWORD_COLUMNS = ("title", "text")
PASSAGE_COLUMNS = ("id", "title", "text", "document_id", "source", "page", "metadata")
# ICU finds the words of languages written without spaces too; "split" parts l'école and O'Hara. The rest is Lance's
# default: lower case, no accents, English stems and stop words. With stop words kept, keyword search answered no more
# questions of wiki18 and took four times as long.
_TOKENIZER = {"base_tokenizer": "icu/split"}
# A row that the keyword index does not hold yet costs a search about 30 microseconds.
_UNINDEXED_ROWS = 2048
_SCAN_ROWS = 16_384


@dataclass(frozen=True)
class Version:
    """One commit of a knowledge base: its ``number``, when it was made, and how many ``passages`` it holds."""

    number: int
    created: datetime
    passages: int


@dataclass(frozen=True)
class StoredDocument:
    """What is stored of a document as a whole; ``content_hash`` is None if its passages do not agree."""

    content_hash: str | None
    source: str | None


def _schema(width: int) -> pa.Schema:
    """Return the columns on disk (DESIGN §4). ``metadata`` is JSON that predicates can look into."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("page", pa.int32()),
            ("position", pa.int32()),
            ("content_hash", pa.string()),
            ("title", pa.string()),
            ("text", pa.string()),
            ("metadata", pa.json_()),
            ("vector", pa.list_(pa.float32(), width)),
        ]
    )


def passage_table(
    passages: Sequence[Passage],
    vectors: np.ndarray,
    positions: Sequence[int | None] | None = None,
    content_hashes: Sequence[str | None] | None = None,
) -> pa.Table:
    """Return N passages and their (N, D) ``vectors`` as rows to store."""
    count, width = vectors.shape
    columns: dict[str, Any] = {name: [getattr(passage, name) for passage in passages] for name in PASSAGE_COLUMNS}
    metadata = [json.dumps(dict(values), ensure_ascii=False) if values else None for values in columns["metadata"]]
    columns["metadata"] = pa.ExtensionArray.from_storage(pa.json_(), pa.array(metadata, pa.string()))
    columns["position"] = [None] * count if positions is None else positions
    columns["content_hash"] = [None] * count if content_hashes is None else content_hashes
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    try:
        return pa.table(columns, schema=_schema(width))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputError(
            f"a passage cannot be stored, its document_id, source or page is of another type: {error}"
        ) from None


class PassageStore:
    """One version of the stored passages: reads it, and commits the next."""

    def __init__(self, path: Path, dataset: Any, width: int) -> None:
        self.path = path
        self.width = width
        self._dataset = dataset

    @classmethod
    def create(cls, folder: Path, width: int) -> PassageStore:
        """Make the empty dataset in ``folder``."""
        import lance

        path = folder / PASSAGES_FOLDER
        with writing(path):
            dataset = lance.write_dataset(_schema(width).empty_table(), path, mode="create", enable_stable_row_ids=True)
            # An empty index fixes how words are told apart. Rows are found through it from the first on; while it
            # does not hold them yet, Lance scans them with the same words and the same scores.
            for column in KEYWORD_COLUMNS:
                dataset.create_scalar_index(column, "INVERTED", **_TOKENIZER)
        return cls(path, dataset, width)

    @classmethod
    def open(cls, folder: Path, width: int, version: int | None = None) -> PassageStore:
        """Open the dataset in ``folder``, at its newest version or at ``version``."""
        import lance

        path = folder / PASSAGES_FOLDER
        with reading(path):
            dataset = lance.dataset(path)
            if version is not None:
                known = [entry["version"] for entry in dataset.versions()]
                if version not in known:
                    raise KnowledgeBaseError(
                        f"{folder} has no version {version}, only {_ranges(known)}; see KnowledgeBase.versions()"
                    )
                dataset = dataset.checkout_version(version)
            stored = dataset.schema.field("vector").type.list_size
        if stored != width:
            raise KnowledgeBaseError(
                f"{path} holds vectors of width {stored}, but manifest.json beside it says {width}; "
                "the two are not of the same base: restore them from a backup"
            )
        return cls(path, dataset, width)

    @property
    def version(self) -> int:
        """The version that is read, counted from 1."""
        return int(self._dataset.version)

    def __len__(self) -> int:
        with reading(self.path):
            return int(self._dataset.count_rows())

    def refresh(self) -> None:
        """Move to the newest version."""
        with reading(self.path):
            self._dataset.checkout_latest()

    def versions(self) -> list[Version]:
        """Return every version that can still be opened, oldest first."""
        with reading(self.path):
            entries = self._dataset.versions()
        return [Version(e["version"], e["timestamp"], int(e["metadata"]["total_rows"])) for e in entries]

    # Reading

    def check_where(self, where: str | None) -> None:
        """Raise InputError unless ``where`` is a predicate over the stored columns."""
        if where is None:
            return
        try:
            self._dataset.scanner(columns=["id"], filter=where).explain_plan()
        except Exception as error:
            raise InputError(
                f"where={where!r} is not a predicate: {first_sentence(error).split('. ')[0]}. The columns are "
                f"{', '.join(self._dataset.schema.names)}; an example is where=\"source LIKE '%.pdf' AND page < 10\""
            ) from error

    def scan(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Return ``columns`` and ``_rowid`` of all rows that fulfil ``where``."""
        with reading(self.path, where):
            return self._dataset.to_table(columns=[*columns, "_rowid"], filter=where)

    def row_ids(self, where: str | None = None) -> np.ndarray:
        """Return the sorted row ids of all rows that fulfil ``where``."""
        return np.sort(_row_ids(self.scan([], where)))

    def row_stamps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted row ids (N,) and, of each, the version that last wrote it (N,)."""
        table = self.scan(["_row_last_updated_at_version"])
        row_ids, stamps = _row_ids(table), table["_row_last_updated_at_version"].to_numpy()
        order = np.argsort(row_ids)
        return row_ids[order], stamps[order]

    def vectors(self, where: str | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of (row ids (n,), vectors (n, D)) of all rows that fulfil ``where``."""
        with reading(self.path, where):
            for batch in self._dataset.to_batches(columns=["vector", "_rowid"], filter=where, batch_size=_SCAN_ROWS):
                if batch.num_rows:
                    yield _row_ids(batch), self._matrix(batch.column("vector"))

    def fetch(self, row_ids: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return ``columns`` of the rows ``row_ids`` (n,), in that order."""
        if not len(row_ids):
            return self._dataset.schema.empty_table().select(columns)
        unique, order = np.unique(row_ids, return_inverse=True)
        table = self.scan(columns, f"_rowid IN ({', '.join(map(str, unique.tolist()))})")
        if table.num_rows != len(unique):
            raise KnowledgeBaseError(f"{self.path} lacks rows that its index names; restore the folder from a backup")
        return table.take(np.argsort(_row_ids(table))[order]).select(columns)

    def fetch_vectors(self, row_ids: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the passage ids and the vectors (n, D) of the rows ``row_ids`` (n,), in that order."""
        table = self.fetch(row_ids, ["id", "vector"])
        return table["id"].to_pylist(), self._matrix(table["vector"])

    def fetch_passages(self, row_ids: np.ndarray) -> tuple[list[Passage], np.ndarray]:
        """Return the passages and the vectors (n, D) of the rows ``row_ids`` (n,), in that order."""
        table = self.fetch(row_ids, [*PASSAGE_COLUMNS, "vector"])
        rows = table.select(PASSAGE_COLUMNS).to_pylist()
        passages = [Passage(**{**row, "metadata": json.loads(row["metadata"] or "{}")}) for row in rows]
        return passages, self._matrix(table["vector"])

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """Return the row ids of those of the passages ``ids`` that are stored."""
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return {}
        table = self.scan(["id"], _is_in("id", wanted))
        return dict(zip(table["id"].to_pylist(), table["_rowid"].to_pylist(), strict=True))

    def documents(self) -> dict[str, StoredDocument]:
        """Return what is stored, by document id."""
        found: dict[str, StoredDocument] = {}
        table = self.scan(["document_id", "content_hash", "source"], "document_id IS NOT NULL")
        for row in zip(*(table[name].to_pylist() for name in ("document_id", "content_hash", "source")), strict=True):
            document = StoredDocument(*row[1:])
            if found.setdefault(row[0], document).content_hash != document.content_hash:
                found[row[0]] = StoredDocument(None, document.source)
        return found

    def search_words(
        self, question: str, count: int, where: str | None = None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return row ids (n,), passage ids and BM25 scores (n,) of ``count`` rows that share words with ``question``.

        The score is the sum over title and text. A question of nothing but stop words and punctuation finds nothing.
        """
        from lance.query import BooleanQuery, MatchQuery, Occur

        query = BooleanQuery([(Occur.SHOULD, MatchQuery(question, column)) for column in KEYWORD_COLUMNS])
        with reading(self.path, where):
            table = self._dataset.to_table(
                columns=["id", "_rowid", "_score"],
                filter=where,
                prefilter=True,
                full_text_query=query,
                limit=count,
                disable_scoring_autoprojection=True,
            )
        return _row_ids(table), table["id"].to_pylist(), table["_score"].to_numpy()

    # Writing

    def append(self, table: pa.Table) -> None:
        """Commit the rows of ``table``, whose ids are new."""
        with writing(self.path):
            self._dataset.insert(table)

    def merge(self, table: pa.Table, documents: Sequence[str] = ()) -> None:
        """Commit the rows of ``table`` by id; rows of ``documents`` that are not in ``table`` go in the same commit."""
        with writing(self.path):
            merge = self._dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            if documents:
                merge = merge.when_not_matched_by_source_delete(_is_in("document_id", documents))
            merge.execute(table)

    def delete(self, column: str, values: Iterable[str]) -> int:
        """Commit the removal of the rows whose ``column`` is among ``values``; return how many there were."""
        wanted = list(dict.fromkeys(values))
        if not wanted:
            return 0
        with writing(self.path):
            return int(self._dataset.delete(_is_in(column, wanted))["num_deleted_rows"])

    def index_words(self, *, all_rows: bool = False) -> None:
        """Bring the keyword index up to date if a tenth of the rows, or with ``all_rows`` any, are missing from it."""
        with writing(self.path):
            indexed = min((index.num_rows_indexed for index in self._dataset.describe_indices()), default=0)
            missing = len(self) - indexed
            if missing > (0 if all_rows else max(_UNINDEXED_ROWS, indexed // 10)):
                self._dataset.optimize.optimize_indices()

    def _matrix(self, column: Any) -> np.ndarray:
        """Return a column of vectors as an (n, D) float32 matrix."""
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width) for chunk in chunks]
        matrix: np.ndarray = np.concatenate(parts) if parts else np.empty((0, self.width), np.float32)
        return matrix


def _row_ids(table: Any) -> np.ndarray:
    row_ids: np.ndarray = table.column("_rowid").to_numpy()
    return row_ids


def _is_in(column: str, values: Sequence[str]) -> str:
    """Return the SQL predicate that ``column`` is one of ``values``; a quote inside a value is doubled."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def _ranges(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else f"{numbers[0]}"
