"""``python -m ragstone.cli``."""

from ragstone.cli import run

run()
