"""What is said beforehand against what comes of it."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, SplitOptions, estimate_documents, plan
from ragstone.knowledge.loose import dummy_passages
from ragstone.testing import ToyEncoder

TEN_WORDS = SplitOptions(words=10)
WORDS = [f"word{n}" for n in range(500)]


def text(chance, count):
    return " ".join(chance.choice(WORDS) for _ in range(count))


@pytest.fixture
def files(tmp_path):
    """Text files, JSON lines longer than what is read of them, whose records grow, a table and Parquet."""
    chance, folder = random.Random(0), tmp_path / "files"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.txt").write_text(text(chance, chance.randint(5, 60)))
    rows = [{"id": f"r{i}", "title": "T", "text": text(chance, 20 + i // 15)} for i in range(1200)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.csv").write_text("id,text\n" + "".join(f"c{i},{text(chance, 30)}\n" for i in range(1000)))
    pq.write_table(
        pa.table({"id": [f"p{i}" for i in range(500)], "text": [text(chance, 25)] * 500}), folder / "a.parquet"
    )
    (folder / "broken.parquet").write_bytes(b"no")
    (folder / "empty.txt").write_text("")
    return folder


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_counts_are_near_what_indexing_then_makes(files, tmp_path):
    said = estimate_documents(files, ToyEncoder(), split=TEN_WORDS)
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    report = base.add_documents(files, split=TEN_WORDS)
    assert (said.files, said.width) == (125, 32)
    assert said.documents == pytest.approx(report.documents, rel=0.1)
    assert said.passages == pytest.approx(report.passages, rel=0.1)
    assert 0 < said.sampled_passages < said.passages
    assert said.seconds == said.reading_seconds + said.encoding_seconds + said.storing_seconds > 0
    assert said.memory_bytes > 0


def test_counts_are_near_where_files_are_of_very_different_sizes(tmp_path):
    chance, folder = random.Random(0), tmp_path / "files"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.txt").write_text(text(chance, 2))
    (folder / "long.txt").write_text(text(chance, 50_000))
    for name, words in (("short", 5), ("long", 100)):
        rows = [{"id": f"{name}{i}", "text": text(chance, words)} for i in range(800)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = estimate_documents(folder, ToyEncoder(), split=TEN_WORDS)
    report = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder()).add_documents(folder, split=TEN_WORDS)
    assert said.documents == pytest.approx(report.documents, rel=0.1)
    assert said.passages == pytest.approx(report.passages, rel=0.1)


def test_disk_is_near_what_real_text_then_takes(tmp_path):
    records = [{"id": str(n), "title": p.title, "text": p.text} for n, p in enumerate(dummy_passages())]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(256))
    said = base.estimate_documents(tmp_path / "p.jsonl")
    before = size(tmp_path / "kb")
    base.add_documents(tmp_path / "p.jsonl")
    assert said.disk_bytes == pytest.approx(size(tmp_path / "kb") - before, rel=0.25)


def test_nothing_is_written(files, tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    base.estimate_documents(files, split=TEN_WORDS)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert base.info().split == SplitOptions()


def test_what_is_stored_as_it_stands_costs_nothing(files, tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    base.add_documents(files, split=TEN_WORDS)
    again = base.estimate_documents(files)
    assert (again.passages, again.disk_bytes, again.encoding_seconds) == (0, 0, 0)
    assert again.documents > 0
    assert base.estimate_documents(files, split=SplitOptions(words=5)).passages > 0


def test_a_sample_that_is_the_whole_is_exact(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven")
    said = estimate_documents(tmp_path / "a.txt", ToyEncoder(), split=SplitOptions(words=3))
    assert (said.files, said.documents, said.passages, said.sampled_passages) == (1, 1, 3, 3)


def test_an_empty_folder_takes_nothing(tmp_path):
    said = estimate_documents(tmp_path, ToyEncoder(), split=None)
    assert (said.files, said.documents, said.passages, said.disk_bytes, said.seconds) == (0, 0, 0, 0, 0)


def test_devices_share_the_time_and_processes_add_up_in_memory(files):
    one, two = (estimate_documents(files, ToyEncoder(delay=0.001), split=TEN_WORDS, workers=w) for w in (1, ["a", "b"]))
    assert two.encoding_seconds < 0.8 * one.encoding_seconds
    assert two.memory_bytes > 2 * one.memory_bytes
    with pytest.raises(InputError, match="workers=0"):
        estimate_documents(files, ToyEncoder(), split=None, workers=0)


def test_a_plan_is_the_sum_of_its_parts_and_grows_with_the_passages():
    small, large = plan(100_000, 768), plan(21_000_000, 768)
    assert large.disk_bytes == large.data_bytes + large.words_bytes + large.codes_bytes
    assert large.data_bytes == 210 * small.data_bytes > 21_000_000 * 768 * 4
    assert large.codes_bytes == 210 * small.codes_bytes > 21_000_000 * 768 // 2
    assert (
        small.words_bytes < large.words_bytes < 210 * small.words_bytes
    )  # the vocabulary does not grow as the text does
    assert plan(1000, 768).codes_bytes == 0
    half = plan(21_000_000, 768, axes=384)
    assert half.codes_bytes == large.codes_bytes - 21_000_000 * 384 // 2
    assert large.memory_bytes - half.memory_bytes == 21_000_000 * 384 // 2
    assert (half.data_bytes, half.least_memory_bytes) == (large.data_bytes, large.least_memory_bytes)
    for passages, width, axes in ((-1, 3, None), (1, 0, None), (1, 3, 0)):
        with pytest.raises(InputError, match="describe no base"):
            plan(passages, width, axes=axes)
