"""One public door: its names, and what opening it costs."""

import subprocess
import sys

import ragstone

HEAVY = {"torch", "transformers", "numpy", "lance", "pyarrow", "turbovec", "typer", "rich"}


def loaded_by(code: str) -> set[str]:
    probe = f"{code}\nimport sys; print(*sorted(m.split('.')[0] for m in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())


def test_all_is_sorted_and_true():
    assert ragstone.__all__ == sorted(ragstone.__all__)
    assert set(ragstone.__all__) == set(ragstone._HOME)
    for name in ragstone.__all__:
        value = getattr(ragstone, name)
        assert value.__module__.startswith("ragstone.")
        assert value.__doc__
        assert name in dir(ragstone)


def test_the_contract_s_names_are_there():
    contract = {
        *("KnowledgeBase", "Passage", "RagConfig", "RagTokenizer", "RagRetriever", "RagModel"),
        *("RagSequenceForGeneration", "RagTokenForGeneration", "RagPipeline", "Answer", "Evidence"),
    }
    assert contract <= set(ragstone.__all__)


def test_importing_loads_nothing_heavy():
    assert not loaded_by("import ragstone") & HEAVY
    assert not loaded_by("from ragstone import Passage") & (HEAVY - {"numpy"})
    assert not loaded_by("import ragstone.testing") & {"torch", "transformers", "lance"}


def test_help_loads_no_model_library():
    code = "from ragstone.cli import main; main(['--help'])"
    assert not loaded_by(code) & {"torch", "transformers", "lance", "numpy"}


def test_unknown_names_are_attribute_errors():
    assert not hasattr(ragstone, "RagGenie")
