import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import ragstone

from ragstone.encoders import load_encoder
from ragstone.knowledge import KnowledgeBase
from ragstone.testing import TOY_PASSAGES


@pytest.fixture
def wiki_dpr(tmp_path, models):
    """Parquet in the form of wiki_dpr, with the vectors of an encoder; the last row is empty."""
    vectors = load_encoder(models / "encoder", dtype="float32").encode_passages(TOY_PASSAGES)
    titles, texts = zip(*TOY_PASSAGES, ("", ""), strict=True)
    ids = [str(n) for n in range(len(texts))]
    table = {"id": ids, "title": titles, "text": texts, "embeddings": [*vectors, vectors[0]]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    return tmp_path / "train.parquet", vectors


def test_import_search_and_export(tmp_path, models, wiki_dpr):
    file, vectors = wiki_dpr
    done = ragstone("import", file, "--kb", tmp_path / "kb", "--encoder", models / "encoder", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["format"], report["passages"], report["encoded"]) == ("parquet", 8, False)
    assert [skipped["line"] for skipped in report["skipped"]] == [8]
    again = ragstone("import", file, "--kb", tmp_path / "kb", "--encoder", models / "encoder", "--format", "parquet")
    assert "0 passages" in again.stdout
    assert "8 that were there already" in again.stdout
    assert len(again.stdout.splitlines()) == 1  # however long the paths are: no terminal shows it
    assert "row 8: the text is empty" in " ".join(again.stderr.split())
    found = ragstone("search", tmp_path / "kb", "who wrote hamlet?", "-k", 8, "--json")
    assert found.returncode == 0, found.stderr
    written = ragstone("export", tmp_path / "kb", tmp_path / "kb.faiss", "--json")
    assert json.loads(written.stdout)["files"] == [str(tmp_path / "kb.faiss"), str(tmp_path / "kb.faiss.ids.json")]
    assert ragstone("export", tmp_path / "kb", tmp_path / "out", "--format", "parquet").returncode == 0
    np.testing.assert_array_equal(np.stack(pq.read_table(tmp_path / "out")["embeddings"].to_numpy()), vectors)


def test_import_of_texts_makes_the_vectors(tmp_path, models):
    lines = [json.dumps({"id": str(n), "contents": f"{t}\n{x}"}) for n, (t, x) in enumerate(TOY_PASSAGES)]
    (tmp_path / "collection.jsonl").write_text("\n".join(lines))
    done = ragstone("import", tmp_path / "collection.jsonl", "--kb", tmp_path / "kb", "--encoder", models / "encoder")
    assert "8 passages" in done.stdout, done.stderr
    assert [p.title for p in KnowledgeBase.open(tmp_path / "kb").get(["0", "1"])] == ["Hamlet", "Mount Everest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "--kb", "kb"], "nowhere does not exist"),
        (["import", "train.parquet", "--kb", "kb", "--format", "legacy"], "train.parquet is no legacy index"),
        (["import", "train.parquet", "--kb", "kb", "--index", "none.faiss"], "none.faiss is not a file"),
        (["export", "nowhere", "x.parquet"], "nowhere does not exist"),
    ],
)
def test_errors_are_one_sentence(tmp_path, wiki_dpr, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = ragstone(*arguments)
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "kb").exists()
