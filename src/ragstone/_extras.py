"""Packages of the optional extras, loaded where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ragstone.errors import MissingExtraError

__all__ = ["extra"]


def extra(name: str, module: str, purpose: str) -> Any:
    """Import ``module``, which comes with the extra ``name``; ``purpose`` says in the error what it is needed for.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise MissingExtraError(f'{purpose} needs {package}; pip install "ragstone[{name}]"') from None
