"""The command line: a typed function per verb. ``ragstone VERB --help`` explains each."""

from __future__ import annotations

import errno
import os
import sys

__all__ = ["main"]

_RESUMED = ("setup", "index", "reindex", "import", "compact")
"""Verbs that go on from where they were interrupted."""


def main(arguments: list[str] | None = None) -> int:
    """Run ``ragstone`` with ``arguments`` (those of the process by default) and return the exit code.

    0: done. 1: a knowledge base, a model or an optional package is missing or unfit. 2: bad usage or input.
    130: interrupted. One sentence on standard error says what is wrong and what to do.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # while modules are still read
        sys.stderr.write("error: Interrupted.\n")
        return 130


def _main(arguments: list[str] | None) -> int:
    import typer

    from ragstone.cli.app import app
    from ragstone.cli.console import INTERRUPTED, complain
    from ragstone.errors import RagstoneError

    try:
        code = int(app(arguments, standalone_mode=False) or 0)
    except typer.Exit as stop:
        code = stop.exit_code
    except RagstoneError as error:
        complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        _silence()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _silence()
        complain("The output cannot be written: the disk is full; make room, or write it elsewhere.")
        return 1
    except Exception as error:
        # click's usage errors, known by what they can do: typer keeps a click of its own in some versions.
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()
        return int(error.exit_code)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        kept = " Everything committed so far is kept; run the same command again to go on." if verb in _RESUMED else ""
        complain(f"Interrupted.{kept}")
    return code


def _silence() -> None:
    """Let nobody have the rest of the output: Python would try to write it once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """The ``ragstone`` script."""
    sys.exit(main())
