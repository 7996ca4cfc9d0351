import pytest

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase
from ragstone.knowledge.memory import default_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GB", 2e9), ("2 gb", 2e9), ("500M", 5e8), ("1.5GiB", 1.5 * 2**30), ("64k", 64_000), ("1TiB", 2**40), ("77", 77)],
)
def test_amounts_of_memory(text, amount):
    assert parse_memory(text) == amount


def test_a_number_counts_bytes_and_none_is_half_of_the_machine():
    assert parse_memory(123) == 123
    assert parse_memory(None) == default_memory() > 100e6


@pytest.mark.parametrize("value", ["", "much", "2 GBs", "-1GB", "1e9", 0, -5, True, 2.5, "0", []])
def test_what_is_no_amount_of_memory_is_named(value, tmp_path):
    with pytest.raises(InputError, match="memory="):
        parse_memory(value)
    with pytest.raises(InputError, match="memory="):
        KnowledgeBase.create(tmp_path / "kb", encoder=None, width=2, memory=value)
    assert not (tmp_path / "kb").exists()
