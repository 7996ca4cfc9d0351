"""`RagRetriever` on the indexes that transformers' configs name: the same passages and scores as transformers' own."""

import logging
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from made import dataset_of, rows, save_custom, save_legacy
from transformers.models.rag import retrieval_rag as theirs

from ragstone import KnowledgeBase, RagRetriever
from ragstone.errors import InputError
from ragstone.knowledge.exchange import import_collection, named
from ragstone.testing import ToyEncoder, tiny_rag

IDS, TITLES, TEXTS, VECTORS = rows()
QUESTIONS = (VECTORS[[3, 17, 30]] + 0.3).astype(np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imported"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_rag("sequence", "bart")


def retriever_of(model_and_tokenizer, index=None, **fields):
    model, tokenizer = model_and_tokenizer
    config = type(model.config).from_dict({**model.config.to_dict(), "index_name": "custom", **fields})
    return RagRetriever(config, tokenizer.question_encoder, tokenizer.generator, index)


def ours(retriever, k=5):
    """Ids and scores q·d, as the model computes them: (B, K) each."""
    out = retriever(None, QUESTIONS, n_docs=k, return_tensors="pt", questions=["a?"] * len(QUESTIONS))
    scores = torch.einsum("bd,bkd->bk", torch.from_numpy(QUESTIONS), out["retrieved_doc_embeds"])
    texts = [[hit.passage.text for hit in row] for row in retriever.retrieve(QUESTIONS, k)]
    return out["doc_ids"], scores.numpy(), texts


def same(retriever, index, names, k=5):
    """Hold ``retriever`` to transformers' ``index``, whose ids mean the passage ids ``names``."""
    index.init_index()
    found, vectors = index.get_top_docs(QUESTIONS, k)
    ids, scores, texts = ours(retriever, k)
    assert ids == [[names[i] for i in row] for row in found.tolist()]
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", QUESTIONS, vectors), rtol=1e-5)
    assert texts == [list(docs["text"]) for docs in index.get_doc_dicts(found)]
    expected = np.argsort(-(QUESTIONS @ VECTORS.T), axis=1)[:, :k]
    assert texts == [[TEXTS[i] for i in row] for row in expected]


@pytest.mark.parametrize("with_ids", [False, True])
def test_custom(model_and_tokenizer, tmp_path, with_ids):
    folder, file = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS, with_ids=with_ids)
    index = theirs.CustomHFIndex.load_from_disk(16, str(folder), str(file))
    names = dict(enumerate(IDS if with_ids else map(str, range(40))))
    same(retriever_of(model_and_tokenizer, passages_path=str(folder), index_path=str(file)), index, names)
    import_collection(folder, tmp_path / "kb", index=file)
    for where in ("passages_path", "index_path"):
        same(retriever_of(model_and_tokenizer, **{where: str(tmp_path / "kb")}), index, names)
    same(retriever_of(model_and_tokenizer, KnowledgeBase.open(tmp_path / "kb")), index, names)


@pytest.mark.parametrize("numbers", [False, True])
def test_legacy(model_and_tokenizer, tmp_path, monkeypatch, numbers):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # transformers runs the pickles
    folder = save_legacy(tmp_path / "dpr", IDS, TITLES, TEXTS, VECTORS, numbers=numbers)
    index = theirs.LegacyIndex(16, str(folder))
    names = {int(i): i for i in IDS}
    retriever = retriever_of(model_and_tokenizer, index_name="legacy", index_path=str(folder))
    same(retriever, index, names)
    import_collection(folder, tmp_path / "kb")
    same(retriever_of(model_and_tokenizer, index_name="legacy", index_path=str(tmp_path / "kb")), index, names)


def test_legacy_in_8_bits(model_and_tokenizer, tmp_path, monkeypatch):
    """Its √(φ − |d|²) is rounded, so that transformers' order is not quite that of its own scores; these are the same."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    folder = save_legacy(tmp_path / "dpr", IDS, TITLES, TEXTS, VECTORS, kind="hnsw8")
    index = theirs.LegacyIndex(16, str(folder))
    index.init_index()
    found, vectors = index.get_top_docs(QUESTIONS, 40)
    scores = np.einsum("bd,bkd->bk", QUESTIONS, vectors)
    ids, ours_, _ = ours(retriever_of(model_and_tokenizer, index_name="legacy", index_path=str(folder)), 40)
    for b in range(len(QUESTIONS)):
        assert (np.diff(ours_[b]) <= 0).all()
        expected = dict(zip(map(str, found[b].tolist()), scores[b].tolist(), strict=True))
        assert dict(zip(ids[b], ours_[b].tolist(), strict=True)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["exact", "compressed"])
@pytest.mark.parametrize("form", ["saved", "parquet", "dict", "knowledge base"])
def test_exact_and_compressed(model_and_tokenizer, tmp_path, monkeypatch, name, form):
    from datasets import DatasetDict, load_from_disk

    saved, file = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    # transformers would run the script wiki_dpr, which `datasets` no longer does
    monkeypatch.setattr(theirs, "load_dataset", lambda *_, **__: load_from_disk(str(saved)))
    index = theirs.CanonicalHFIndex(16, index_path=str(file))
    place = tmp_path / "wiki_dpr"
    if form == "saved":
        saved.rename(place)
        saved = place
    elif form == "parquet":
        place.mkdir()
        dataset_of(IDS, TITLES, TEXTS, VECTORS).to_parquet(str(place / "train-00000-of-00001.parquet"))
    elif form == "dict":
        DatasetDict({"train": dataset_of(IDS, TITLES, TEXTS, VECTORS)}).save_to_disk(place)
    else:
        import_collection(saved, place)
    same(retriever_of(model_and_tokenizer, index_name=name, dataset=str(place)), index, dict(enumerate(IDS)))


def test_what_was_imported_is_kept_until_the_files_change(model_and_tokenizer, tmp_path, cache, monkeypatch, caplog):
    folder, file = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    fields = {"passages_path": str(folder), "index_path": str(file)}
    with caplog.at_level(logging.WARNING):
        first = ours(retriever_of(model_and_tokenizer, **fields))
    assert f"Importing {folder}, once, into {cache}" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(named, "import_collection", lambda *_, **__: pytest.fail("imported again"))
        again = ours(retriever_of(model_and_tokenizer, **fields))
    assert again[0] == first[0]
    shutil.rmtree(tmp_path / "passages")
    save_custom(tmp_path, IDS, TITLES, TEXTS, -VECTORS)
    assert ours(retriever_of(model_and_tokenizer, **fields))[0] != first[0]
    assert len(list(cache.glob("*.json"))) == 2


def test_an_import_that_was_cut_short_is_completed(model_and_tokenizer, tmp_path, cache, monkeypatch):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)

    def stop(source, base_folder, **_):
        KnowledgeBase.create(base_folder, encoder=None, width=16)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(named, "import_collection", stop)
        with pytest.raises(KeyboardInterrupt):
            retriever_of(model_and_tokenizer, passages_path=str(folder))
    assert len(retriever_of(model_and_tokenizer, passages_path=str(folder)).index) == 40


def test_two_processes_at_once_import_once(tmp_path, cache):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    code = (
        "import sys; from ragstone.knowledge.exchange import named_base\n"
        "print(len(named_base('custom', passages_path=sys.argv[1])))"
    )
    each = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in each]
    assert [out for out, _ in said] == ["40\n", "40\n"]
    assert sum("Importing" in err for _, err in said) == 1


def test_a_checkpoint_of_transformers_with_its_index(model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    saved = tmp_path / "checkpoint"
    dataset = dataset_of(IDS, TITLES, TEXTS, VECTORS)
    dataset.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    config = theirs.RagConfig.from_dict(model.config.to_dict())
    config.index_name = "custom"
    config.index_path = config.passages_path = None
    index = theirs.CustomHFIndex(16, dataset)
    written = theirs.RagRetriever(config, tokenizer.question_encoder, tokenizer.generator, index)
    written.save_pretrained(str(saved))
    model.save_pretrained(tmp_path / "weights")
    same(RagRetriever.from_pretrained(saved), index, dict(enumerate(IDS)))
    saved.rename(tmp_path / "moved")  # the paths inside lead nowhere now
    same(RagRetriever.from_pretrained(tmp_path / "moved"), index, dict(enumerate(IDS)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_name": "legacy"}, r"needs index_path, .*pass index=KnowledgeBase.open"),
        ({"index_name": "custom"}, r"needs passages_path, .*pass index=KnowledgeBase.open"),
        ({"index_name": "exact"}, r"can no longer be downloaded .* set dataset to a folder .*pass index=KnowledgeBase"),
        ({"index_name": "legacy", "index_path": "nowhere"}, "config.index_path is 'nowhere', where there is nothing"),
        ({"index_name": "custom", "passages_path": "nowhere"}, "config.passages_path is 'nowhere'"),
        ({"index_name": "exact", "passages_path": "nowhere"}, "config.passages_path is 'nowhere'"),
        ({"index_name": "custom", "passages_path": ".", "index_path": "nowhere"}, "config.index_path is 'nowhere'"),
        ({"index_name": "custom", "passages_path": "."}, "holds nothing of a format that is known here"),
    ],
)
def test_paths_that_lead_nowhere_say_so(model_and_tokenizer, tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        retriever_of(model_and_tokenizer, **fields)


def test_passages_without_vectors_are_left_to_the_user(model_and_tokenizer, tmp_path):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    from datasets import load_from_disk

    load_from_disk(str(folder)).remove_columns("embeddings").save_to_disk(tmp_path / "bare")
    with pytest.raises(
        InputError, match="has no vectors, in a column embeddings or in a faiss file; make a knowledge base"
    ):
        retriever_of(model_and_tokenizer, passages_path=str(tmp_path / "bare"))


def test_questions_of_another_width_are_refused(model_and_tokenizer, tmp_path):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, ToyEncoder(8).encode_questions(TEXTS))
    with pytest.raises(InputError, match=r"width 8"):
        ours(retriever_of(model_and_tokenizer, passages_path=str(folder)))
