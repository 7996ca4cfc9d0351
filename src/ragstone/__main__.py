"""``python -m ragstone``."""

from ragstone.cli import run

run()
