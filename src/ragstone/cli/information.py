"""``ragstone info``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ragstone.cli.console import out, print_json, quiet_libraries
from ragstone.errors import InputError, KnowledgeBaseError

__all__ = ["show"]


def show(what: str, *, memory: str | None, as_json: bool) -> None:
    """Print what the knowledge base or model ``what`` holds."""
    from ragstone.knowledge import KnowledgeBase

    values = asdict(KnowledgeBase.open(what, memory=memory).info()) if KnowledgeBase.exists(what) else _model(what)
    if as_json:
        print_json(values)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # all of a path, however narrow the terminal
    for name, value in values.items():
        shown = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(f"[bold]{name}[/]", f"{shown:,}" if isinstance(shown, int) else Text(str(shown)))
    out.print(table)


def _model(name: str) -> dict[str, Any]:
    """The values of a model's config that a person asks for; nothing is loaded but the config."""
    from ragstone import local
    from ragstone.models import RagConfig

    quiet_libraries()
    if name == local.LOCAL:
        return {
            "model": name,
            "question_encoder": str(local.encoder_folder()),
            "generator": str(local.generator_folder()),
            "method": "token",
        }
    if not Path(name).exists() and "/" not in name:  # a model of the hub has its owner before its name
        raise KnowledgeBaseError(f"There is neither a knowledge base nor a model {name!r}; name the folder of one.")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name} is neither a knowledge base nor a model: it has no manifest.json and no config.json.")
    config = RagConfig.load(name)
    return {
        "model": name,
        "class": (config.architectures or ["unknown"])[0],
        "question_encoder": config.question_encoder.model_type,
        "generator": config.generator.model_type,
        "passages": config.n_docs,
        "score_scale": config.tau,
        "keyword_scale": config.keyword_scale,
        "max_combined_length": config.max_combined_length,
        "index": config.knowledge_base or config.passages_path or config.index_name,
        "written_by": f"ragstone {config.ragstone_version}" if config.ragstone_version else "transformers",
    }
