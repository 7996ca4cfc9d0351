"""What a knowledge base will take: by formula for N passages, and from a measured sample of files to be indexed."""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ragstone.errors import InputError, MissingExtraError
from ragstone.knowledge.axes import padded
from ragstone.knowledge.codes import codes_bytes
from ragstone.knowledge.documents import Document, Skipped, find_files, read_file
from ragstone.knowledge.encoding import TextEncoder, encode_passages
from ragstone.knowledge.indexing import Reading
from ragstone.knowledge.passages import Passage, SplitOptions
from ragstone.knowledge.records import RECORD_READERS
from ragstone.knowledge.search import EXACT_BELOW
from ragstone.knowledge.storage import PassageStore, StoredDocument, passage_table
from ragstone.knowledge.workers import Workers, check_workers

__all__ = ["IndexEstimate", "Plan", "estimate_documents", "plan"]

# On disk, as measured with English passages of 100 words (600 bytes).
_TEXT_SHARE = 0.69  # of the bytes of text that Lance writes, ids and source included
_WORDS_SHARE = 0.29  # of the bytes of text that the keyword index takes, besides its vocabulary
_VOCABULARY_BYTES, _VOCABULARY_GROWTH = 5500, 0.6  # of N passages: 5500 · N^0.6 bytes (Heaps' law)
_CODE_ROW_BYTES = 12  # of a row in the file of codes: its id and length
# In memory, counted.
_ROW_MEMORY = 24  # of a passage: its row id, which version wrote it, and where it lies
_READING_ROW_MEMORY = 400  # of a passage that waits to be encoded: its id, and its document's
_PROCESS_MEMORY = 200_000_000  # Python, Lance and Arrow
_INDEX_CACHE = 128_000_000  # the least for the index on disk: half for its parts, half for what describes files

_SAMPLE_DOCUMENTS = 200
_SAMPLE_FILES = 4  # of a kind
_SIZE_BITS = 3  # files of a kind differ in size by less than 8
_SAMPLE_SECONDS = 10.0
_FILE_BYTES = 256_000  # of a file of records
_BLOCKS = 8  # stretches of a file of JSON lines
_ENCODED = 256
_CHUNK_PASSAGES = 2048
_COPIES = 4  # of a chunk on its way from text to disk


@dataclass(frozen=True)
class Plan:
    """What a base of N passages takes, in bytes.

    Attributes:
        passages: N.
        width: D, the width of the vectors.
        data_bytes: on disk, of passages and vectors; older versions come on top until they are cleaned up.
        words_bytes: of the keyword index.
        codes_bytes: of the file of 4-bit codes; 0 where so few passages are searched exactly.
        memory_bytes: of a process that searches, codes included, but without an encoder.
        coarse_memory_bytes: the same with codes of 2 bits.
        least_memory_bytes: the same with the index on disk in the place of the codes.
    """

    passages: int
    width: int
    data_bytes: int
    words_bytes: int
    codes_bytes: int
    memory_bytes: int
    coarse_memory_bytes: int
    least_memory_bytes: int

    @property
    def disk_bytes(self) -> int:
        """All that is on disk."""
        return self.data_bytes + self.words_bytes + self.codes_bytes


def plan(passages: int, width: int, *, text_bytes: float = 600.0, axes: int | None = None) -> Plan:
    """Return what a base of ``passages`` with vectors of ``width`` takes, each having ``text_bytes`` of title and text.

    Codes are of how far a vector goes along each of ``axes`` (see `KnowledgeBaseInfo`); without that, of ``width``, the
    most there can be.

    >>> wikipedia = plan(21_000_000, 768)
    >>> round(wikipedia.disk_bytes / 1e9), round(wikipedia.memory_bytes / 1e9, 1)
    (85, 10.4)
    >>> round(wikipedia.coarse_memory_bytes / 1e9, 1), round(wikipedia.least_memory_bytes / 1e9, 1)
    (6.4, 0.8)
    """
    axes = width if axes is None else axes
    if passages < 0 or width < 1 or axes < 1:
        raise InputError(
            f"passages={passages}, width={width} and axes={axes} describe no base; give counts from 0, 1 and 1 up"
        )
    text = passages * text_bytes
    codes = 0 if passages < EXACT_BELOW else passages * (padded(axes) // 2 + _CODE_ROW_BYTES)
    rows = _PROCESS_MEMORY + (_ROW_MEMORY * passages if codes else 0)
    return Plan(
        passages=passages,
        width=width,
        data_bytes=round(passages * 4 * width + _TEXT_SHARE * text),
        words_bytes=round(_WORDS_SHARE * text + _VOCABULARY_BYTES * passages**_VOCABULARY_GROWTH),
        codes_bytes=codes,
        memory_bytes=rows + (codes_bytes(passages, axes) if codes else 0),
        coarse_memory_bytes=rows + (codes_bytes(passages, axes, 2) if codes else 0),
        least_memory_bytes=rows + _INDEX_CACHE if codes else rows,
    )


@dataclass(frozen=True)
class IndexEstimate:
    """What indexing will take, extrapolated from a sample of the files.

    Attributes:
        files: how many files there are.
        documents: about how many documents they hold.
        passages: about how many passages are new or changed, so that they would be encoded.
        width: D, the width of the vectors.
        disk_bytes: about what the base grows by, keyword index and codes included.
        memory_bytes: about the most that indexing holds in memory, over all its processes.
        search_memory_bytes: about what a process that searches the base holds, without the encoder.
        seconds: about how long indexing takes: the sum of the three that follow.
        reading_seconds: of that, to read and split.
        encoding_seconds: of that, to encode.
        storing_seconds: of that, to commit and to bring the keyword index up to date.
        sampled_files: how many files were read, whole or in part.
        sampled_passages: how many passages they gave; the encoder was timed on up to 256 of them.
    """

    files: int
    documents: int
    passages: int
    width: int
    disk_bytes: int
    memory_bytes: int
    search_memory_bytes: int
    seconds: float
    reading_seconds: float
    encoding_seconds: float
    storing_seconds: float
    sampled_files: int
    sampled_passages: int


@dataclass
class _Kind:
    """The files of one suffix and of about the same size, and what was found in a sample of them."""

    files: list[Path]
    bytes: int
    read_bytes: float = 0.0
    read_files: int = 0
    seconds: float = 0.0
    documents: int = 0
    passages: list[Passage] = field(default_factory=list)  # new or changed

    def read(self, file: Path, reading: Reading) -> None:
        """Read ``file``, or a sample of it where it is a long file of records."""
        started, size = time.perf_counter(), file.stat().st_size
        with tempfile.TemporaryDirectory() as work:
            part, share, documents = file, 1.0, read_file(file)
            if file.suffix.lower() == ".parquet":
                share, documents = _first_rows(file, documents)
            elif file.suffix.lower() in RECORD_READERS and size > _FILE_BYTES:
                part = Path(work, file.name)
                share, documents = _write_sample(file, part) / size, read_file(part)
            with suppress(InputError, MissingExtraError):  # it will be skipped
                for document in documents:
                    if isinstance(document, Skipped):
                        continue
                    self.documents += 1
                    pending = reading.examine(replace(document, source=file.as_posix()) if part != file else document)
                    self.passages += pending.passages if pending is not None else []
        self.read_files += 1
        self.read_bytes += share * size
        self.seconds += time.perf_counter() - started

    @property
    def factor(self) -> float:
        """How many times as much as the sample there is in all."""
        return self.bytes / self.read_bytes if self.read_bytes else 0.0


def estimate_documents(
    paths: str | Path | Iterable[str | Path],
    encoder: TextEncoder,
    *,
    split: SplitOptions | None,
    stored: Mapping[str, StoredDocument] | None = None,
    held: int = 0,
    workers: Workers = 1,
) -> IndexEstimate:
    """Return what it will take to index ``paths``; nothing is written but to a temporary folder.

    At least 200 documents, if there are so many, drawn at random over the files and, in long files of JSON lines, over
    their length, are read and split as `KnowledgeBase.add_documents` does; up to 256 of their passages are encoded, and
    stored in a base that is thrown away. Counts grow with the bytes of the files of each kind, times with the counts.

    Args:
        paths: files and folders.
        encoder: what will make the vectors.
        split: how documents will be split.
        stored: the documents of the base that is brought up to date; what is stored as it stands costs nothing.
        held: how many passages that base holds.
        workers: as in `KnowledgeBase.add_documents`. Several on one device share it, so they count as one here; devices
            count as equally quick.
    """
    devices = check_workers(workers)
    files = find_files(paths)
    kinds = _kinds(files)
    _sample(kinds, Reading(stored or {}, split))
    passages = [passage for kind in kinds for passage in kind.passages]
    count = round(sum(kind.factor * len(kind.passages) for kind in kinds))
    text_bytes = sum(map(_text_bytes, passages)) / max(1, len(passages))
    cost = _measure(encoder, random.Random(0).sample(passages, min(_ENCODED, len(passages))))
    before, after = (plan(n, encoder.width, text_bytes=text_bytes) for n in (held, held + count))
    reading = sum(kind.factor * kind.seconds for kind in kinds)
    encoding = count * cost.encoding_seconds / len({*devices})
    storing = count * cost.storing_seconds
    chunk = min(_CHUNK_PASSAGES, count) * (text_bytes + 4 * encoder.width) * _COPIES
    here = _peak_memory()
    return IndexEstimate(
        files=len(files),
        documents=round(sum(kind.factor * kind.documents for kind in kinds)),
        passages=count,
        width=encoder.width,
        disk_bytes=round(
            count * cost.data_bytes
            + (after.words_bytes - before.words_bytes)
            + (after.codes_bytes - before.codes_bytes)
        ),
        memory_bytes=round(here * (1 if devices == [None] else 1 + len(devices)) + chunk + count * _READING_ROW_MEMORY),
        search_memory_bytes=after.memory_bytes,
        seconds=reading + encoding + storing,
        reading_seconds=reading,
        encoding_seconds=encoding,
        storing_seconds=storing,
        sampled_files=sum(kind.read_files for kind in kinds),
        sampled_passages=len(passages),
    )


def _kinds(files: Sequence[Path]) -> list[_Kind]:
    """Group files by suffix and size, in random order, so that the first few are a sample.

    By size, for counts grow with the bytes: a small file gives more passages a byte than a large one.
    """
    groups: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for file in files:
        groups[file.suffix.lower(), _size(file).bit_length() // _SIZE_BITS].append(file)
    chance = random.Random(0)
    for group in groups.values():
        chance.shuffle(group)
    return [_Kind(group, sum(_size(file) for file in group)) for group in groups.values()]


def _sample(kinds: Sequence[_Kind], reading: Reading) -> None:
    """Read a file of each kind, then others of each, until there are enough files and documents or it takes too long."""
    started = time.perf_counter()
    for turn in range(max((len(kind.files) for kind in kinds), default=0)):
        for kind in kinds:
            enough = turn >= _SAMPLE_FILES and kind.documents >= _SAMPLE_DOCUMENTS // len(kinds)
            if turn < len(kind.files) and not enough:
                with suppress(OSError):
                    kind.read(kind.files[turn], reading)
                if turn and time.perf_counter() - started > _SAMPLE_SECONDS:
                    return


@dataclass(frozen=True)
class _Cost:
    """What a passage costs: seconds to encode and to store, and bytes on disk without the keyword index."""

    encoding_seconds: float = 0.0
    storing_seconds: float = 0.0
    data_bytes: float = 0.0


def _measure(encoder: TextEncoder, passages: Sequence[Passage]) -> _Cost:
    if not passages:
        return _Cost()
    encode_passages(encoder, passages[:8])  # the first time takes longer
    with tempfile.TemporaryDirectory() as work:
        store = PassageStore.create(Path(work), encoder.width)
        started = time.perf_counter()
        vectors = encode_passages(encoder, passages)
        encoded = time.perf_counter()
        store.append(passage_table(passages, vectors))
        data = sum(file.stat().st_size for file in store.path.glob("data/*"))
        store.index_words(all_rows=True)
        stored = time.perf_counter()
    count = len(passages)
    return _Cost((encoded - started) / count, (stored - encoded) / count, data / count)


def _first_rows(file: Path, documents: Iterator[Document | Skipped]) -> tuple[float, Iterator[Document | Skipped]]:
    """Return the first rows of a Parquet file, and what share of it they are."""
    import pyarrow.parquet as pq

    try:
        rows = max(1, pq.read_metadata(file).num_rows)
    except (OSError, ValueError):  # it will be skipped
        return 1.0, documents
    return min(1.0, _SAMPLE_DOCUMENTS / rows), islice(documents, _SAMPLE_DOCUMENTS)


def _write_sample(file: Path, target: Path) -> int:
    """Write whole lines of ``file`` to ``target``; return how many bytes. Of a table they are the first ones."""
    size = file.stat().st_size
    blocks = _BLOCKS if file.suffix.lower() == ".jsonl" else 1
    with file.open("rb") as source, target.open("wb") as out:
        for block in range(blocks):
            source.seek(block * (size // blocks))
            if block:
                source.readline()  # the rest of a line
            end = source.tell() + _FILE_BYTES // blocks
            while source.tell() < end and (line := source.readline()):
                out.write(line)
        return out.tell()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _text_bytes(passage: Passage) -> int:
    return len(passage.title.encode()) + len(passage.text.encode())


def _peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
