"""The versions of a knowledge base: which can be opened, which have names, and which are being removed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ragstone.errors import InputError, KnowledgeBaseError
from ragstone.knowledge.faults import reading, writing
from ragstone.knowledge.ledger import ledger_of
from ragstone.knowledge.manifest import write_file

__all__ = ["REMOVING_FILE", "History", "Version"]

REMOVING_FILE = "removing.json"
# No number, which would be taken for a version; the rest is what Lance and the length of a file's name allow.
_TAG = re.compile(r"(?!\d+$)(?!.*\.\.)(?!.*\.(?:lock)?$)[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Version:
    """One commit of a knowledge base: its ``number``, when it was made, and how many ``passages`` it holds."""

    number: int
    created: datetime
    passages: int


class History:
    """The versions of the Lance dataset at ``path``.

    ``dataset`` has it open at one of them, which is not needed to look for the number of a version.
    """

    def __init__(self, path: Path, dataset: Any = None) -> None:
        self._path, self._folder = path, path.parent
        self._dataset = dataset

    def versions(self) -> list[Version]:
        """Return every version that can be opened, oldest first."""
        with reading(self._path):
            entries = self._dataset.versions()
        going = self.condemned()
        return [
            Version(entry["version"], entry["timestamp"], int(entry["metadata"]["total_rows"]))
            for entry in entries
            if entry["version"] not in going
        ]

    def tags(self) -> dict[str, int]:
        """Return the numbers of the versions that have names, by name."""
        with reading(self._path):
            tags = {name: int(tag["version"]) for name, tag in self._dataset.tags.list().items()}
        return dict(sorted(tags.items()))

    def number(self, version: int | str) -> int:
        """Return the number of a version, given by number or tag, or raise KnowledgeBaseError if it can't be opened."""
        if isinstance(version, str):
            return self._tagged(version)
        going = self.condemned()
        known = [number for number in ledger_of(self._path).versions() if number not in going]
        if version in known or not known:
            return version
        # They are counted from 1, and nothing but compaction takes one away.
        fate = "no longer has version {}: compaction removed it" if 0 < version < known[-1] else "has no version {}"
        raise KnowledgeBaseError(f"{self._folder} {fate.format(version)}, only {_ranges(known)}")

    def tag(self, name: str, version: int, *, move: bool) -> None:
        """Name a version; a name that another version has is refused unless it is to ``move``."""
        if not isinstance(name, str) or not _TAG.fullmatch(name):
            raise InputError(
                f"the tag {name!r} is no name; use at most 200 letters, digits, '.', '-' and '_', beginning with a letter "
                "or digit, not digits alone, without '..' and without '.' or '.lock' at the end"
            )
        held = self.tags().get(name)
        if held is not None and held != version and not move:
            raise KnowledgeBaseError(
                f"{self._folder} has the tag {name!r} at version {held}; move it with move=True (--move)"
            )
        with writing(self._path):
            if held is None:
                self._dataset.tags.create(name, version)
            else:
                self._dataset.tags.update(name, version)

    def untag(self, name: str) -> None:
        """Take a name away from its version, which stays."""
        self._tagged(name)
        with writing(self._path):
            self._dataset.tags.delete(name)

    def condemned(self) -> set[int]:
        """Return the versions that a compaction began to remove and may have left in parts."""
        path = self._folder / REMOVING_FILE
        try:
            return set(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError) as error:
            raise KnowledgeBaseError(f"{path} is damaged ({error}); delete it and compact the base again") from error

    def condemn(self, versions: Iterable[int]) -> None:
        """From now on refuse to open ``versions``, so that none is seen in parts; with none, forget about it."""
        path = self._folder / REMOVING_FILE
        if numbers := sorted(versions):
            write_file(path, json.dumps(numbers).encode())
        else:
            path.unlink(missing_ok=True)

    def _tagged(self, name: str) -> int:
        tags = self.tags()
        if name not in tags:
            there = f"only {', '.join(map(repr, tags))}" if tags else "and no other"
            raise KnowledgeBaseError(f"{self._folder} has no tag {name!r}, {there}")
        return tags[name]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending ``numbers`` in words: 1, 2, 3 and 7 are "1 to 3, 7"."""
    starts = [place for place in range(len(numbers)) if not place or numbers[place] > numbers[place - 1] + 1]
    runs = [numbers[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
