import json

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from made import rows

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, Passage, read_file
from ragstone.knowledge.exchange import exporting, import_collection
from ragstone.testing import ToyEncoder

IDS, TITLES, TEXTS, VECTORS = rows()
PASSAGES = [
    Passage(i, t, x, f"doc {i}" if n % 2 else None, "ä.txt", n or None, {"year": n, "tags": ["a"]} if n % 3 else {})
    for n, (i, t, x) in enumerate(zip(IDS, TITLES, TEXTS, strict=True))
]


@pytest.fixture
def base(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    base.add(PASSAGES[:25], vectors=VECTORS[:25])
    base.add([*PASSAGES[25:], Passage("gone", text="gone")], vectors=[*VECTORS[25:], VECTORS[0]])
    base.delete("gone")
    return base


def test_parquet_goes_out_and_comes_back(base, tmp_path):
    report = base.export(tmp_path / "out" / "kb.parquet")
    assert (report.format, report.passages, report.width) == ("parquet", 40, 16)
    assert report.bytes == (tmp_path / "out" / "kb.parquet").stat().st_size
    import_collection(tmp_path / "out" / "kb.parquet", tmp_path / "again")
    again = KnowledgeBase.open(tmp_path / "again")
    assert again.get(IDS) == PASSAGES
    np.testing.assert_array_equal(again.vectors(IDS), VECTORS)


def test_parquet_is_what_datasets_and_transformers_read(base, tmp_path, monkeypatch):
    from datasets import Dataset, load_dataset
    from transformers.models.rag.retrieval_rag import CustomHFIndex

    base.export(tmp_path / "kb.parquet")
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "kb.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    dataset = Dataset.from_parquet(str(tmp_path / "kb.parquet"), cache_dir=str(tmp_path / "c"))
    assert loaded.column_names[:4] == ["id", "title", "text", "embeddings"]
    assert list(loaded["id"]) == list(dataset["id"]) == IDS
    dataset.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    index = CustomHFIndex(16, dataset)
    found, vectors = index.get_top_docs(VECTORS[:3] + 0.1, 5)
    for row, ids, near in zip(VECTORS[:3] + 0.1, found, vectors, strict=True):
        expected = np.argsort(-(VECTORS @ row))[:5]
        assert ids.tolist() == expected.tolist()
        np.testing.assert_allclose(near @ row, VECTORS[expected] @ row, rtol=1e-5)


def test_a_faiss_file_is_the_one_that_faiss_would_write(base, tmp_path):
    base.export(tmp_path / "kb.faiss")
    ids = json.loads((tmp_path / "kb.faiss.ids.json").read_text())
    assert ids == IDS
    flat = faiss.IndexFlatIP(16)
    flat.add(VECTORS)
    faiss.write_index(flat, str(tmp_path / "reference"))
    assert (tmp_path / "kb.faiss").read_bytes() == (tmp_path / "reference").read_bytes()
    index = faiss.read_index(str(tmp_path / "kb.faiss"))
    _, places = index.search(VECTORS[:1], 5)
    assert places[0].tolist() == np.argsort(-(VECTORS @ VECTORS[0]))[:5].tolist()


def test_an_empty_base_goes_out_too(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=4)
    for name in ("a.parquet", "a.faiss", "a.jsonl"):
        assert base.export(tmp_path / name).passages == 0
    assert faiss.read_index(str(tmp_path / "a.faiss")).ntotal == 0
    assert json.loads((tmp_path / "a.faiss.ids.json").read_text()) == []
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0


def test_json_lines_are_what_index_reads(base, tmp_path):
    base.export(tmp_path / "kb.jsonl")
    documents = list(read_file(tmp_path / "kb.jsonl"))
    assert [(d.id, d.title, d.sections[0].text) for d in documents] == [*zip(IDS, TITLES, TEXTS, strict=True)]
    assert documents[4].metadata == {"year": 4, "tags": ["a"], "source": "ä.txt", "page": 4}


def test_the_vectors_that_count_are_written(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder(8))
    base.add(PASSAGES)
    base.reencode(ToyEncoder(12, fingerprint="toy-2"))
    base.export(tmp_path / "kb.faiss")
    base.export(tmp_path / "kb.parquet")
    index = faiss.read_index(str(tmp_path / "kb.faiss"))
    np.testing.assert_array_equal(index.reconstruct_n(0, 40), base.vectors(IDS))
    np.testing.assert_array_equal(
        np.stack(pq.read_table(tmp_path / "kb.parquet")["embeddings"].to_numpy()), base.vectors(IDS)
    )


def test_an_older_version_can_be_written(base, tmp_path):
    version = base.version
    base.delete(IDS[:10])
    assert KnowledgeBase.open(base.path, version=version).export(tmp_path / "old.jsonl").passages == 40
    assert base.export(tmp_path / "new.jsonl").passages == 30


def test_nothing_is_overwritten_and_nothing_half_written(base, tmp_path, monkeypatch):
    (tmp_path / "kb.faiss.ids.json").write_text("mine")
    with pytest.raises(InputError, match=r"kb.faiss.ids.json exists already"):
        base.export(tmp_path / "kb.faiss")
    with pytest.raises(InputError, match=r"does not say its format; end it in \.parquet, \.faiss, \.jsonl"):
        base.export(tmp_path / "kb.csv")
    with pytest.raises(InputError, match="cannot be written"):
        base.export(tmp_path / "kb.faiss.ids.json" / "kb.jsonl")

    def full(self, vectors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.FlatWriter, "write", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        base.export(tmp_path / "x.faiss")
    assert not [file.name for file in tmp_path.iterdir() if "x.faiss" in file.name]
