"""The tree of errors. A message names the value that is wrong and the remedy, in one sentence.

RagstoneError
├── InputError            an argument, question, option or file that cannot be used (also a ValueError)
│   ├── DataError         a file of questions, predictions or rankings that cannot be used
│   └── DocumentError     a file that cannot be read as text
├── KnowledgeBaseError    a knowledge base that is missing, damaged, of a newer format, or fits no request
│   ├── EncoderMismatchError   vectors of one encoder met questions of another
│   └── LockedError       another process is writing
├── ModelError            a model, tokenizer or checkpoint that cannot be loaded or does not fit
└── MissingExtraError     an optional package is not installed (also an ImportError)
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "DocumentError",
    "EncoderMismatchError",
    "InputError",
    "KnowledgeBaseError",
    "LockedError",
    "MissingExtraError",
    "ModelError",
    "RagstoneError",
]


class RagstoneError(Exception):
    """Base of every error that Ragstone raises on purpose; ``exit_code`` is what the command line returns for it."""

    exit_code: int = 1


class InputError(RagstoneError, ValueError):
    """An argument, question, option or file that cannot be used."""

    exit_code = 2


class DataError(InputError):
    """A file of questions, predictions or rankings that cannot be used."""


class DocumentError(InputError):
    """A file that cannot be read as text."""


class KnowledgeBaseError(RagstoneError):
    """A knowledge base that is missing, damaged, of a newer format, or that does not fit the request."""


class EncoderMismatchError(KnowledgeBaseError):
    """Vectors of one encoder met questions of another."""


class LockedError(KnowledgeBaseError):
    """Another process is writing to the knowledge base."""


class ModelError(RagstoneError):
    """A model, tokenizer or checkpoint that cannot be loaded or that does not fit."""


class MissingExtraError(RagstoneError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""
