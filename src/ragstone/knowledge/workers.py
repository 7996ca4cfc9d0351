"""Several processes that read files and encode passages for one writer.

They are spawned, since Lance is not fork-safe, and end with the process that started them, however that ends: each
watches a pipe whose other end only that process holds. What they return is taken in the order in which it was asked
for, so the result does not depend on which of them is quicker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ragstone.errors import InputError, KnowledgeBaseError, ModelError
from ragstone.knowledge import encoding
from ragstone.knowledge.documents import Document, Skipped, iter_documents
from ragstone.knowledge.encoding import TextEncoder
from ragstone.knowledge.formats import READERS
from ragstone.knowledge.passages import Passage

__all__ = ["Workers", "check_workers", "encode_chunks", "read_documents"]

Workers = int | Sequence[str]
"""How many processes encode, or the devices of each, such as ``["cuda:0", "cuda:1"]``."""

PIECE_PASSAGES = 256
"""A worker gets this many passages at once: enough to batch by length, few enough to share a chunk evenly."""

_AHEAD = 4
"""Pieces, and files, that are asked for ahead of the one that is waited for, for each worker."""
_QUICKLY_READ = (".txt", ".md")

T = TypeVar("T")


def check_workers(workers: Workers) -> list[str | None]:
    """Return the device of each worker, None being the encoder's own; raise InputError if there is none."""
    devices = [None] * workers if isinstance(workers, int) else workers
    if isinstance(devices, str) or not devices:
        raise InputError(f"workers={workers!r} must be a number from 1 up, or a list of devices such as ['cuda:0']")
    return [*devices]


def encode_chunks(
    chunks: Iterable[T],
    passages: Callable[[T], Sequence[Passage]],
    load_encoder: Callable[[], TextEncoder],
    *,
    workers: Workers,
    encoded: Callable[[int], None],
) -> contextlib.AbstractContextManager[Iterator[tuple[T, np.ndarray]]]:
    """Open the way from chunks to vectors: an iterator over each chunk, in order, with the vectors (n, D) of its passages.

    At most two chunks, or ``4 * workers`` pieces of `PIECE_PASSAGES` passages, are in memory.

    Args:
        chunks: what is committed together.
        passages: the passages of a chunk.
        load_encoder: gives the encoder; called only if there is something to encode.
        workers: in how many processes; with 1 it is this one.
        encoded: called with the number of passages just encoded.

    Raises:
        InputError: the encoder cannot be sent to another process.
        KnowledgeBaseError: a worker died.
    """
    return contextlib.closing(_encode(iter(chunks), passages, load_encoder, check_workers(workers), encoded))


def _encode(
    chunks: Iterator[T],
    passages: Callable[[T], Sequence[Passage]],
    load_encoder: Callable[[], TextEncoder],
    devices: Sequence[str | None],
    encoded: Callable[[int], None],
) -> Generator[tuple[T, np.ndarray], None, None]:
    begun = [*islice(chunks, 2)]
    chunks = chain(begun, chunks)
    few = len(begun) < 2 and all(len(passages(chunk)) <= PIECE_PASSAGES for chunk in begun)
    if few or devices == [None]:  # for a few, to start processes would take longer
        for chunk in chunks:
            found = passages(chunk)
            yield chunk, encoding.encode_passages(load_encoder(), found, encoded)
    else:
        yield from _encode_apart(chunks, passages, load_encoder(), devices, encoded)


def _encode_apart(
    chunks: Iterator[T],
    passages: Callable[[T], Sequence[Passage]],
    encoder: TextEncoder,
    devices: Sequence[str | None],
    encoded: Callable[[int], None],
) -> Generator[tuple[T, np.ndarray], None, None]:
    held: deque[tuple[T, Sequence[Passage], deque[Future[np.ndarray]]]] = deque()

    with _Processes(devices, _recipe(encoder, len(devices))) as processes:

        def ask(chunk: T) -> None:
            found = passages(chunk)
            pairs = [(passage.title, passage.text) for passage in found]
            pieces = (pairs[start : start + PIECE_PASSAGES] for start in range(0, len(pairs), PIECE_PASSAGES))
            held.append((chunk, found, deque(processes.submit(_encode_piece, piece) for piece in pieces)))

        while True:
            while len(held) < 2 or sum(len(futures) for *_, futures in held) < _AHEAD * len(devices):
                if (chunk := next(chunks, None)) is None:
                    break
                ask(chunk)
            if not held:
                return
            chunk, found, futures = held.popleft()
            vectors = [np.empty((0, encoder.width), np.float32)]
            while futures:
                vectors.append(processes.result(futures.popleft()))
                encoded(len(vectors[-1]))
            yield chunk, encoding.check_finite(np.concatenate(vectors), found)


def read_documents(
    files: Sequence[Path], *, workers: Workers
) -> contextlib.AbstractContextManager[Iterator[Iterable[Document | Skipped]]]:
    """Open the way from files to documents: an iterator over the documents of each file, in order.

    Formats that are slow to read (PDF, DOCX, HTML) are read by several processes, the others by this one: files of
    records, which may be of any size, are streamed.
    """
    devices = check_workers(workers)
    slow = [file for file in files if file.suffix.lower() in READERS and file.suffix.lower() not in _QUICKLY_READ]
    if len(devices) == 1 or len(slow) <= len(devices):
        return contextlib.closing(iter_documents([file]) for file in files)
    return contextlib.closing(_read_apart(files, set(slow), devices))


def _read_apart(
    files: Sequence[Path], slow: set[Path], devices: Sequence[str | None]
) -> Generator[Iterable[Document | Skipped], None, None]:
    with _Processes(devices, b"") as processes:
        queue = (file for file in files if file in slow)
        asked: deque[Future[Iterable[Document | Skipped]]] = deque()
        for file in files:
            while len(asked) < _AHEAD * len(devices) and (ahead := next(queue, None)) is not None:
                asked.append(processes.submit(_read, ahead))
            if file in slow:
                yield processes.result(asked.popleft())
            else:
                yield iter_documents([file])


class _Processes:
    """The worker processes. Those that are needed start with the first tasks; all end when the block is left."""

    def __init__(self, devices: Sequence[str | None], recipe: bytes) -> None:
        context = get_context("spawn")
        watched, self._lifeline = context.Pipe(duplex=False)
        shares = context.SimpleQueue()
        for device in devices:
            shares.put(device)
        threads = max(1, _threads() // len(devices))
        self._executor = ProcessPoolExecutor(len(devices), context, _begin, (watched, shares, recipe, threads))

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._lifeline.close()  # whatever a worker is doing, nobody waits for it any more
        self._executor.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        # A process is born without interest in Ctrl-C, which a terminal sends to all of them: this one decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(function, *arguments)
        except BrokenProcessPool as error:
            raise _died() from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def result(self, future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _died() from error


def _died() -> KnowledgeBaseError:
    return KnowledgeBaseError(
        "a worker process ended before its work was done; what was committed is kept and the next run goes on from "
        "there: take fewer workers if memory is short, and in a script of your own start below "
        "`if __name__ == '__main__':`"
    )


def _threads() -> int:
    """Return how many threads an encoder would compute in here."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else os.cpu_count() or 1


# How a worker comes by the encoder


@dataclass(frozen=True)
class _Named:
    """An encoder that is loaded again by the name in its spec."""

    spec: dict[str, Any]
    dtype: str
    device: str

    def load(self, device: str | None) -> TextEncoder:
        name = self.spec["name"]
        try:
            encoder = encoding.load(name, self.spec, device=device or self.device, dtype=self.dtype)
        except ModelError as error:
            raise ModelError(
                f"{error} Each worker loads the encoder by its name: save it into a folder and name that, or use 1 worker."
            ) from error
        if encoder.spec.to_dict() != self.spec:
            raise ModelError(
                f"What is loaded as {name!r} is not the encoder in memory: save that into a folder and name it, or use "
                "1 worker."
            )
        return encoder


def _recipe(encoder: TextEncoder, workers: int) -> bytes:
    """Return what makes ``encoder`` in another process: where its weights lie, or, of any other class, itself."""
    from ragstone.encoders import Encoder, fingerprint

    if isinstance(encoder, Encoder):
        spec = encoder.spec
        if fingerprint(encoder.model) != spec.fingerprint:
            raise InputError(
                f"workers={workers}: the encoder {spec.name!r} was trained since it was loaded, and a worker would load "
                "it as it was; save it into a folder and name that, or use workers=1"
            )
        dtype = str(encoder.dtype).removeprefix("torch.")
        return pickle.dumps(_Named(spec.to_dict(), dtype, str(encoder.device)))
    try:
        return pickle.dumps(encoder)
    except Exception as error:
        raise InputError(
            f"workers={workers}: the encoder {type(encoder).__name__} cannot be sent to another process ({error}); "
            "make it one that pickle can write, or use workers=1"
        ) from error


# Inside a worker

_share: tuple[bytes, str | None, int] = (b"", None, 1)
_encoder: TextEncoder | None = None


def _begin(watched: Any, shares: Any, recipe: bytes, threads: int) -> None:
    """Take a share of the devices and threads, and watch for the end of the process that started this one."""
    global _share
    _share = (recipe, shares.get(), threads)
    threading.Thread(target=_end_with_the_parent, args=(watched,), daemon=True).start()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # of torch and the tokenizers, unless they are loaded already
        os.environ[name] = str(threads)


def _end_with_the_parent(watched: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv()
    os._exit(1)


def _encode_piece(pairs: list[tuple[str, str]]) -> np.ndarray:
    global _encoder
    if _encoder is None:
        recipe, device, threads = _share
        made = pickle.loads(recipe)  # from the parent process, through a pipe
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(threads)
        _encoder = made.load(device) if isinstance(made, _Named) else made
    return _encoder.encode_passages(pairs)


def _read(file: Path) -> Iterable[Document | Skipped]:
    try:
        return list(iter_documents([file]))
    except InputError as error:  # it was there when the folder was listed
        return [Skipped(str(file), str(error))]
