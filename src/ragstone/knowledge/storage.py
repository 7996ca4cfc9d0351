"""The Lance dataset of a knowledge base: passages and vectors in, rows out. Every write is one commit, so one version.

A row is named by its *row id*: a number that Lance gives it once and keeps through updates and compaction.

Re-encoding adds a second column of vectors, whose metadata names the encoder. The commit that adds it is the switch:
from that version on it is the one that counts. Then the old column is dropped and the new one takes over its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge.faults import first_sentence, reading, writing
from ragstone.knowledge.history import History
from ragstone.knowledge.ledger import VersionGuard, ledger_of
from ragstone.knowledge.manifest import PASSAGES_FOLDER
from ragstone.knowledge.mapped import APART, DataFiles, MappedTexts, MappedVectors
from ragstone.knowledge.passages import Passage, instances

__all__ = ["PassageStore", "Rows", "StoredDocument", "passage_schema", "passage_table", "vector_column"]

KEYWORD_COLUMNS = ("title", "text")
PASSAGE_COLUMNS = ("id", "title", "text", "document_id", "source", "page", "metadata")
# ICU finds the words of languages written without spaces too; "split" parts l'école and O'Hara. The rest is Lance's
# default: lower case, no accents, English stems and stop words. With stop words kept, keyword search answered no more
# questions of wiki18 and took four times as long.
_TOKENIZER = {"base_tokenizer": "icu/split"}
# A row that the keyword index does not hold yet costs a search about 30 microseconds.
_UNINDEXED_ROWS = 2048
_SCAN_ROWS = 16_384
_ALL_INDICES = 1_000_000
_AGES = timedelta(days=365_000)
_SCAN_BYTES = 8 << 20  # of vectors in a batch
_READ_AHEAD = 2  # batches
_IO_BUFFER = 32 << 20
_CACHES = {"index_cache_size_bytes": 512 << 20, "metadata_cache_size_bytes": 128 << 20}  # Lance's own: 6 GB and 1 GB
_LISTED_IDS = 1000  # more are looked for by reading all ids, not by a predicate that lists them
_VECTOR, _NEW_VECTOR = "vector", "new_vector"
_MAPPED = ("id", "title", "text")
_ENCODER_KEY = "ragstone:encoder"
_NO_COLUMN = "ragstone_no_such_column"


@dataclass(frozen=True)
class StoredDocument:
    """What is stored of a document as a whole; ``content_hash`` is None if its passages do not agree."""

    content_hash: str | None
    source: str | None


Columns = dict[str, MappedTexts | MappedVectors]


@dataclass(frozen=True)
class Rows:
    """All rows of a version, by row id: 24 bytes a passage.

    Attributes:
        ids: the sorted row ids (N,).
        stamps: the versions that last wrote them (N,).
        addresses: where they lie, fragment and place in it (N,).
    """

    ids: np.ndarray
    stamps: np.ndarray
    addresses: np.ndarray


def passage_schema(width: int) -> pa.Schema:
    """Return the columns on disk (DESIGN §4). ``metadata`` is JSON that predicates can look into."""
    return pa.schema(
        [
            pa.field("id", pa.string(), metadata=APART),
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("page", pa.int32()),
            ("position", pa.int32()),
            ("content_hash", pa.string()),
            pa.field("title", pa.string(), metadata=APART),
            pa.field("text", pa.string(), metadata=APART),
            ("metadata", pa.json_()),
            (_VECTOR, pa.list_(pa.float32(), width)),
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
    columns[_VECTOR] = vector_column(vectors)
    try:
        return pa.table(columns, schema=passage_schema(width))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputError(
            f"a passage cannot be stored, its document_id, source or page is of another type: {error}"
        ) from None


def vector_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return (n, D) ``vectors`` as a column of n rows."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


class PassageStore:
    """One version of the stored passages: reads it, and commits the next."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset
        self._rows: tuple[int, Rows, Columns] | None = None  # of a version, once they are needed
        self._described: tuple[int, pa.Schema, int] | None = None  # columns and rows of a version
        self._guard = VersionGuard(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageStore:
        return PassageStore(self.path, self._dataset.checkout_version(self.version))  # mapped files are not copied

    @classmethod
    def create(cls, folder: Path, width: int) -> PassageStore:
        """Make the empty dataset in ``folder``."""
        import lance

        path = folder / PASSAGES_FOLDER
        with writing(path):
            dataset = lance.write_dataset(
                passage_schema(width).empty_table(), path, mode="create", enable_stable_row_ids=True
            )
            # An empty index fixes how words are told apart. Rows are found through it from the first on; while it
            # does not hold them yet, Lance scans them with the same words and the same scores.
            _index_words(dataset)
        return cls(path, lance.dataset(path, **_CACHES))

    @classmethod
    def open(cls, folder: Path, width: int, version: int | str | None = None) -> PassageStore:
        """Open the dataset in ``folder`` at its newest version, at a ``version`` or at a tag.

        ``width`` is that of the manifest.
        """
        import lance

        path = folder / PASSAGES_FOLDER
        ledger_of(path).verify_manifest(None if isinstance(version, str) else version)
        with reading(path):
            if isinstance(version, str):
                version = History(path, lance.dataset(path)).number(version)
                ledger_of(path).verify_manifest(version)
            elif version is not None:
                version = History(path).number(version)
            store = cls(path, lance.dataset(path, version=version, **_CACHES))
            store.verify()
        if store.encoder is None and store.width != width:
            raise KnowledgeBaseError(
                f"{path} holds vectors of width {store.width}, but manifest.json beside it says {width}; "
                "the two are not of the same base: restore them from a backup"
            )
        return store

    @property
    def version(self) -> int:
        """The version that is read, counted from 1."""
        return int(self._dataset.version)

    def __len__(self) -> int:
        return self._description()[1]

    @property
    def _schema(self) -> pa.Schema:
        return self._description()[0]

    def _description(self) -> tuple[pa.Schema, int]:
        """Return columns and number of rows of this version, which Lance puts together anew whenever it is asked."""
        described, version = self._described, self.version
        if described is None or described[0] != version:
            with reading(self.path):
                self._described = described = version, self._dataset.schema, int(self._dataset.count_rows())
        return described[1:]

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return int(self._schema.field(self.vector_name).type.list_size)

    @property
    def encoder(self) -> dict[str, Any] | None:
        """The fields of the ``EncoderSpec`` of what re-encoded the passages; None where nothing has."""
        metadata = self._schema.field(self.vector_name).metadata or {}
        spec = metadata.get(_ENCODER_KEY.encode())
        return None if spec is None else json.loads(spec)

    @property
    def vector_name(self) -> str:
        """The column of the vectors that count."""
        return _NEW_VECTOR if _NEW_VECTOR in self._schema.names else _VECTOR

    def newest(self) -> PassageStore:
        """Return the newest version; this one stays as it is."""
        ledger_of(self.path).verify_manifest(None)
        with reading(self.path):
            store = PassageStore(self.path, self._dataset.checkout_version(self._dataset.latest_version))
            store.verify()
        return store

    def verify(self) -> None:
        """Raise KnowledgeBaseError if a file of this version is missing or damaged, as far as a quick look tells."""
        self._guard.check(self._dataset)

    @property
    def history(self) -> History:
        """All versions of these passages."""
        return History(self.path, self._dataset)

    # Reading

    def check_where(self, where: str | None) -> None:
        """Raise InputError unless ``where`` is a predicate over the stored columns."""
        if where is None:
            return
        if not isinstance(where, str):
            raise InputError(f"where={where!r} must be an SQL predicate, as a string")
        try:
            self._plan(where)
        except Exception as error:
            fault = first_sentence(error).split(". ")[0]
            if "LargeBinary is not Struct" in fault:
                fault = "metadata is JSON and has no columns of its own"
            raise InputError(
                f"where={where!r} is not a predicate: {fault}. The columns are {', '.join(self._schema.names)}; an "
                "example is where=\"source LIKE '%.pdf' AND page < 10\", and metadata is looked into with "
                "json_get_int(metadata, 'year') > 1990 or json_get_string(metadata, 'language') = 'en'"
            ) from error
        # Lance drops without a word what follows the first complete predicate. Then it drops this condition too, which
        # else cannot be planned; the line break ends a comment.
        try:
            self._plan(f"{where}\nAND {_NO_COLUMN} = 1")
        except Exception:
            return
        raise InputError(
            f"where={where!r} goes on after the end of its predicate; join conditions with AND or OR, and leave out what "
            "is none"
        )

    def _plan(self, where: str) -> None:
        """Have Lance plan a scan of the rows that fulfil ``where``, which raises if it cannot be done."""
        self._dataset.scanner(columns=["id"], filter=where).explain_plan()

    def scan(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Return ``columns`` and ``_rowid`` of all rows that fulfil ``where``."""
        with reading(self.path, where):
            return self._dataset.to_table(columns=[*columns, "_rowid"], filter=where)

    def row_ids(self, where: str | None = None) -> np.ndarray:
        """Return the sorted row ids of all rows that fulfil ``where``."""
        return np.sort(_row_ids(self.scan([], where)))

    def row_stamps(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted row ids (N,) and, of each, the version that last wrote it (N,)."""
        rows = self._all_rows()[0]
        return rows.ids, rows.stamps

    def _all_rows(self) -> tuple[Rows, Columns]:
        """Return the rows of this version, and the columns that are read from where they lie, by name."""
        if self._rows is None or self._rows[0] != self.version:
            version = self.version
            table = self.scan(["_row_last_updated_at_version", "_rowaddr"])
            order = np.argsort(_row_ids(table), kind="stable")
            names = ("_rowid", "_row_last_updated_at_version", "_rowaddr")
            rows = Rows(*(table[name].to_numpy()[order] for name in names))
            files = DataFiles(self.path, self._dataset)
            columns: Columns = {name: MappedTexts(files, name) for name in _MAPPED}
            columns[self.vector_name] = MappedVectors(files, self.vector_name, self.width)
            self._rows = version, rows, columns
        return self._rows[1:]

    def vectors(self, where: str | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of (row ids (n,), vectors (n, D)) of all rows that fulfil ``where``."""
        with reading(self.path, where):
            for batch in self._dataset.to_batches(
                columns=[self.vector_name, "_rowid"],
                filter=where,
                batch_size=max(1, min(_SCAN_ROWS, _SCAN_BYTES // (4 * self.width))),
                batch_readahead=_READ_AHEAD,
                io_buffer_size=_IO_BUFFER,
            ):
                if batch.num_rows:
                    yield _row_ids(batch), self._matrix(batch.column(self.vector_name))

    def batches(self, columns: Sequence[str], *, vectors: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield ``columns`` of all rows in batches, with ``vectors`` those that count too, as the column "vector"."""
        names = {name: name for name in columns} | ({_VECTOR: self.vector_name} if vectors else {})
        with reading(self.path):
            for batch in self._dataset.to_batches(columns=[*names.values()], batch_size=_SCAN_ROWS):
                if batch.num_rows:
                    yield batch.select([*names.values()]).rename_columns([*names])

    def fetch(self, row_ids: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return ``columns`` of the rows ``row_ids`` (n,), in that order."""
        if not len(row_ids):
            return self._schema.empty_table().select(columns)
        with reading(self.path):
            table = self._dataset._take_rows(row_ids, columns=list(columns))
        if table.num_rows != len(row_ids):
            raise self._lacks_rows()
        return table

    def fetch_passages(self, row_ids: np.ndarray) -> tuple[list[Passage], np.ndarray]:
        """Return the passages and the vectors (n, D) of the rows ``row_ids`` (n,), in that order."""
        return self.passages_of(row_ids), self.vectors_of(row_ids)

    def ids_of(self, row_ids: np.ndarray) -> list[str]:
        """Return the passage ids of the rows ``row_ids`` (n,), in that order."""
        ids: list[str] = self._take(["id"], row_ids)[0].tolist()
        return ids

    def vectors_of(self, row_ids: np.ndarray) -> np.ndarray:
        """Return the vectors (n, D) of the rows ``row_ids`` (n,), in that order."""
        return self._take([self.vector_name], row_ids)[0]

    def passages_of(self, row_ids: np.ndarray) -> list[Passage]:
        """Return the passages of the rows ``row_ids`` (n,), in that order."""
        table = self.fetch(row_ids, [name for name in PASSAGE_COLUMNS if name not in _MAPPED])
        columns: dict[str, Any] = dict(zip(_MAPPED, self._take(_MAPPED, row_ids), strict=True))
        written = table["metadata"].cast(pa.string()).to_pylist()  # without the cast it takes 20 times as long
        columns |= {name: table[name].to_pylist() for name in table.column_names if name != "metadata"}
        columns["metadata"] = [json.loads(text) if text else {} for text in written]
        return instances(Passage, [columns[name] for name in PASSAGE_COLUMNS])

    def _take(self, columns: Sequence[str], row_ids: np.ndarray) -> list[np.ndarray]:
        """Return the values (n, …) of each of the mapped ``columns`` of the rows ``row_ids`` (n,), in that order."""
        rows, mapped = self._all_rows()
        places = np.searchsorted(rows.ids, row_ids)
        if len(row_ids) and (places.max() == len(rows.ids) or not np.array_equal(rows.ids[places], row_ids)):
            raise self._lacks_rows()
        with reading(self.path):
            return [mapped[column].take(row_ids, rows.addresses[places]) for column in columns]

    def _lacks_rows(self) -> KnowledgeBaseError:
        return KnowledgeBaseError(f"{self.path} lacks rows that its index names; restore the folder from a backup")

    def find(self, ids: Iterable[str]) -> dict[str, int]:
        """Return the row ids of those of the passages ``ids`` that are stored."""
        return self._of_ids(ids, "_rowid")

    def owners(self, ids: Iterable[str]) -> dict[str, str | None]:
        """Return the documents, or None, of those of the passages ``ids`` that are stored."""
        return self._of_ids(ids, "document_id")

    def _of_ids(self, ids: Iterable[str], column: str) -> dict[str, Any]:
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return {}
        columns = ["id", column]
        if len(wanted) <= _LISTED_IDS:
            table = self.scan([name for name in columns if name != "_rowid"], _is_in("id", wanted))
            return dict(zip(*(table[name].to_pylist() for name in columns), strict=True))
        sought = pa.array(wanted)
        found: dict[str, Any] = {}
        with reading(self.path):
            for batch in self._dataset.to_batches(columns=columns):
                stored = batch.filter(pc.is_in(batch["id"], value_set=sought))
                found.update(zip(*(stored[name].to_pylist() for name in columns), strict=True))
        return found

    def documents(self) -> dict[str, StoredDocument]:
        """Return what is stored, by document id."""
        found: dict[str, StoredDocument] = {}
        columns = ["document_id", "content_hash", "source"]
        with reading(self.path):
            for batch in self._dataset.to_batches(columns=columns, filter="document_id IS NOT NULL"):
                for row in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    document = StoredDocument(*row[1:])
                    if found.setdefault(row[0], document).content_hash != document.content_hash:
                        found[row[0]] = StoredDocument(None, document.source)
        return found

    def count_documents(self) -> int:
        """Return how many documents the passages come from."""
        found: set[str] = set()
        with reading(self.path):
            for batch in self._dataset.to_batches(columns=["document_id"], filter="document_id IS NOT NULL"):
                found.update(pc.unique(batch["document_id"]).to_pylist())
        return len(found)

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

    def search_words_among(self, question: str, ids: Sequence[str]) -> list[str]:
        """Return those of the passages ``ids`` that share words with ``question``."""
        return self.search_words(question, len(ids), _is_in("id", ids))[1]

    # Writing

    def append(self, table: pa.Table | pa.RecordBatchReader) -> None:
        """Commit the rows of ``table``, whose ids are new."""
        with writing(self.path):
            self._dataset.insert(table)

    def merge(self, table: pa.Table | pa.RecordBatchReader, documents: Sequence[str] = ()) -> None:
        """Commit the rows of ``table`` by id; rows of ``documents`` that are not in ``table`` go in the same commit."""
        with writing(self.path):
            merge = self._dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            if documents:
                merge = merge.when_not_matched_by_source_delete(_is_in("document_id", documents))
            merge.execute(table)

    def delete(self, column: str, values: Iterable[str]) -> int:
        """Commit the removal of the rows whose ``column`` is among ``values``; return how many there were."""
        wanted = list(dict.fromkeys(values))
        if not wanted or not self._dataset.count_rows(_is_in(column, wanted)):  # Lance would commit it all the same
            return 0
        with writing(self.path):
            return int(self._dataset.delete(_is_in(column, wanted))["num_deleted_rows"])

    def index_words(self, *, all_rows: bool = False) -> None:
        """Bring the keyword index up to date if a tenth of the rows, or with ``all_rows`` any, are missing from it."""
        with writing(self.path):
            words = [index for index in self._dataset.describe_indices() if index.field_names[0] in KEYWORD_COLUMNS]
            indexed = min((index.num_rows_indexed for index in words), default=0)
            missing = len(self) - indexed
            if missing > (0 if all_rows else max(_UNINDEXED_ROWS, indexed // 10)):
                self._dataset.optimize.optimize_indices()

    def compact(self) -> None:
        """Write rows and indices anew, without what was deleted. The rows keep their ids."""
        with writing(self.path):
            self._dataset.optimize.compact_files()
            self._dataset.optimize.optimize_indices(num_indices_to_merge=_ALL_INDICES)

    def remove(self, versions: Iterable[int]) -> None:
        """Remove ``versions`` that are older, and all files that belong to no version. Tagged ones stay."""
        wanted = sorted(versions)
        chosen: dict[str, Any] = {"versions": wanted} if wanted else {"older_than": _AGES}
        with writing(self.path):
            self._dataset.cleanup_old_versions(
                **chosen,
                delete_unverified=True,  # nobody else writes
                error_if_tagged_old_versions=False,
            )

    def rebuild_indices(self) -> None:
        """Build the keyword index anew and drop that of vectors, which is built again when it is needed."""
        with writing(self.path):
            _index_words(self._dataset)
            for index in self._dataset.list_indices():
                if index["fields"] == [self.vector_name]:
                    self._dataset.drop_index(index["name"])

    def replace_vectors(self, blocks: Iterable[np.ndarray], width: int, encoder: Mapping[str, Any]) -> None:
        """Commit other vectors, ``blocks`` (n, width) in the order of `scan`, and the spec of their ``encoder``."""
        kind = pa.field(_NEW_VECTOR, pa.list_(pa.float32(), width), metadata={_ENCODER_KEY: json.dumps(dict(encoder))})
        batches = (pa.record_batch([vector_column(block)], [_NEW_VECTOR]) for block in blocks)
        with writing(self.path):
            self._dataset.add_columns(pa.RecordBatchReader.from_batches(pa.schema([kind]), batches))
        self.settle()

    def settle(self) -> None:
        """Drop vectors that were replaced. Where `replace_vectors` was cut short, the next writer does it."""
        if self.vector_name == _NEW_VECTOR:
            with writing(self.path):
                if _VECTOR in self._dataset.schema.names:
                    self._dataset.drop_columns([_VECTOR])
                self._dataset.alter_columns({"path": _NEW_VECTOR, "name": _VECTOR})

    def rename_encoder(self, encoder: Mapping[str, Any]) -> None:
        """Commit where the encoder lies now."""
        with writing(self.path):
            self._dataset.update_field_metadata({_VECTOR: {_ENCODER_KEY: json.dumps(dict(encoder))}})

    def _matrix(self, column: Any) -> np.ndarray:
        """Return a column of vectors as an (n, D) float32 matrix."""
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width) for chunk in chunks]
        matrix: np.ndarray = np.concatenate(parts) if parts else np.empty((0, self.width), np.float32)
        return matrix


def _index_words(dataset: Any) -> None:
    for column in KEYWORD_COLUMNS:
        dataset.create_scalar_index(column, "INVERTED", replace=True, **_TOKENIZER)


def _row_ids(table: Any) -> np.ndarray:
    row_ids: np.ndarray = table.column("_rowid").to_numpy()
    return row_ids


def _is_in(column: str, values: Sequence[str]) -> str:
    """Return the SQL predicate that ``column`` is one of ``values``; a quote inside a value is doubled."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"
