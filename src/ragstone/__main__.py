"""``python -m ragstone``."""

from ragstone.cli import run

if __name__ == "__main__":  # a worker process imports this again
    run()
