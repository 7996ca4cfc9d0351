"""A knowledge base that keeps up with a passage encoder in training: re-encoded by a process of its own (paper §4.5).

Training goes on with the old vectors meanwhile. When the new ones are in place, one `KnowledgeBase.refresh` moves over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from ragstone.errors import InputError, KnowledgeBaseError, RagstoneError

__all__ = ["PassageRefresher"]

_WAIT_FOR_WRITERS = 60.0  # seconds


class PassageRefresher:
    """Re-encodes a knowledge base in the background, one encoder after the other.

    ::

        with PassageRefresher(knowledge_base.path) as refresher:
            for step, batch in enumerate(batches):
                if step % 500 == 0 and not refresher.running:
                    refresher.start(save_passage_encoder(step))
                if refresher.poll() is not None:
                    knowledge_base.refresh()
                ...

    The worker is a fresh interpreter (Lance is not fork-safe) and ends with the process that started it. Whenever it
    ends, the base is whole; an encoder that is started again goes on from where it was. The base names the folder as
    that of its encoder from then on, so the folder of the version in use has to stay.

    Args:
        folder: the knowledge base's.
        device: where the worker's encoder runs, best not where the model is trained.
        dtype: what it computes in.
        threads: how many threads the worker computes in; by default as many as it finds, which on a CPU slows training
            down.
        chunk: how many passages are encoded and put aside at once.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        chunk: int = 2048,
    ) -> None:
        self.folder = Path(folder)
        self._options = {"folder": str(folder), "device": device, "dtype": dtype, "chunk": chunk}
        self._threads = threads
        self._worker: subprocess.Popen[str] | None = None
        self._encoder = ""

    def __enter__(self) -> PassageRefresher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether a re-encoding was started whose end `poll` has not told yet."""
        return self._worker is not None

    def start(self, encoder_folder: str | Path) -> None:
        """Begin to re-encode with the encoder saved in a folder; return at once.

        Raises:
            InputError: the last one is still under way.
        """
        if self.running:
            raise InputError(
                f"{self.folder} is still being re-encoded with {self._encoder}; start when `running` is false"
            )
        self._encoder = str(encoder_folder)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, json.dumps({**self._options, "encoder": self._encoder})],
            stdin=subprocess.PIPE,  # its end is how the worker learns that this process is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def poll(self) -> int | None:
        """Return the version with the new vectors, once, when it is there; None until then and ever after.

        Raises:
            KnowledgeBaseError: the re-encoding failed; the base is as it was.
        """
        if self._worker is None or self._worker.poll() is None:
            return None
        code, (told, _) = self._worker.returncode, self._worker.communicate()
        self._worker = None
        result: dict[str, Any] = json.loads(told) if told else {"error": f"the worker ended with exit code {code}"}
        if "version" in result:
            return int(result["version"])
        raise KnowledgeBaseError(f"{self.folder} was not re-encoded with {self._encoder}: {result['error']}")

    def close(self) -> None:
        """End a re-encoding that is under way; what it has put aside stays for the next one with that encoder."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _work(folder: str, encoder: str, device: str | None, dtype: str | None, chunk: int) -> dict[str, Any]:
    from ragstone.encoders.checkpoint import quiet
    from ragstone.knowledge import KnowledgeBase

    try:
        with quiet():
            base = KnowledgeBase.open(folder, device=device, dtype=dtype, wait=_WAIT_FOR_WRITERS)
            return {"version": base.reencode(encoder, chunk=chunk)}
    except RagstoneError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no result
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    out.write(json.dumps(_work(**json.loads(sys.argv[1]))))
    out.flush()
    os._exit(0)  # without waiting for the thread, which reads
