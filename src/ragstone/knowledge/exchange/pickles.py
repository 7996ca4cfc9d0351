"""Pickles of plain data, read without running any of them.

A pickle is a program: whatever it names may be called. The reader here refuses every name, so that only containers,
numbers, strings and bytes come out, which is all that a list of ids or a table of passages needs.
"""

from __future__ import annotations

import copyreg
import pickle
from pathlib import Path
from typing import Any, NoReturn

from ragstone.errors import InputError

__all__ = ["read_pickle"]

_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses everything that has a name."""

    path: Path

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise InputError(
            f"{self.path} is refused: it names {module_name}.{global_name}, and a pickle may call what it names; "
            "write it again with nothing but dicts, lists, tuples, strings and numbers"
        )

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise InputError(f"{self.path} is refused: it refers to an object {pid!r} outside of it; write it again whole")


def read_pickle(path: Path) -> Any:
    """Return the plain value that the pickle ``path`` holds.

    Raises:
        InputError: it names a class or function, is damaged, or cannot be opened.
    """
    # A registered extension is a name by number, and one that was used before would be taken from here unasked.
    copyreg.clear_extension_cache()
    try:
        with path.open("rb") as file:
            reader = _PlainUnpickler(file)
            reader.path = path
            return reader.load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged or no pickle ({type(error).__name__}: {error}); fetch it again") from None
