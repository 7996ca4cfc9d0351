"""Lines of the files that runs are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ragstone.errors import DataError

__all__ = ["numbered_lines"]


def numbered_lines(path: Path, *, remedy: str) -> Iterator[tuple[str, str]]:
    """Yield the place (file and number) and the text of every line that is not blank.

    Raises:
        DataError: the file cannot be read, or is not UTF-8, for which ``remedy`` says what to do.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; {remedy}") from None
