"""Small collections in the formats of other tools, written by these tools or as they write them."""

import json
import pickle

import faiss
import numpy as np
from datasets import Dataset

from ragstone.testing import TOY_PASSAGES, ToyEncoder

PREFIX = "hf_bert_base.hnswSQ8_correct_phi_128.c_index"


def rows(count=40, width=16, seed=0):
    """ids, titles, texts and vectors (count, width) of various lengths."""
    random = np.random.default_rng(seed)
    vectors = (random.standard_normal((count, width)) * random.uniform(0.5, 3, (count, 1))).astype(np.float32)
    titles = [f'"{TOY_PASSAGES[n % 8][0]}"' if n % 3 else "" for n in range(count)]
    return [str(1 + n) for n in range(count)], titles, [f"{TOY_PASSAGES[n % 8][1]} {n}" for n in range(count)], vectors


def dataset_of(ids, titles, texts, vectors, *, with_ids=True):
    columns = {"title": titles, "text": texts, "embeddings": list(vectors)}
    return Dataset.from_dict({"id": ids, **columns} if with_ids else columns)


def save_custom(folder, ids, titles, texts, vectors, *, with_ids=True, metric=faiss.METRIC_INNER_PRODUCT):
    """What transformers' ``index_name="custom"`` reads: a saved Dataset and the faiss file of its index."""
    dataset = dataset_of(ids, titles, texts, vectors, with_ids=with_ids)
    dataset.save_to_disk(folder / "passages", num_shards=3)
    dataset.add_faiss_index("embeddings", metric_type=metric)
    dataset.get_index("embeddings").save(folder / "index.faiss")
    return folder / "passages", folder / "index.faiss"


def with_extra_dimension(vectors):
    """DPR's DenseHNSWFlatIndexer: √(φ − |d|²) as one more number."""
    lengths = (vectors**2).sum(axis=1)
    return np.hstack([vectors, np.sqrt(lengths.max() - lengths)[:, None]]).astype(np.float32)


def save_legacy(folder, ids, titles, texts, vectors, *, kind="hnsw", numbers=False):
    """What DPR writes and transformers' ``index_name="legacy"`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    width = vectors.shape[1]
    if kind == "hnsw":
        index, stored = faiss.IndexHNSWFlat(width + 1, 512), with_extra_dimension(vectors)
    elif kind == "hnsw8":
        index = faiss.IndexHNSWSQ(width + 1, faiss.ScalarQuantizer.QT_8bit, 512)
        stored = with_extra_dimension(vectors)
        index.train(stored)
    else:
        index, stored = faiss.IndexFlatIP(width), vectors
    if kind == "idmap":
        index = faiss.IndexIDMap(index)
        index.add_with_ids(stored[::-1].copy(), np.arange(len(ids))[::-1].copy())
    else:
        index.add(stored)
    faiss.write_index(index, str(folder / f"{PREFIX}.index.dpr"))
    meta = [int(i) for i in ids] if numbers else list(ids)
    (folder / f"{PREFIX}.index_meta.dpr").write_bytes(pickle.dumps(meta))
    passages = {i: (text, title) for i, title, text in zip(ids, titles, texts, strict=True)}
    (folder / "psgs_w100.tsv.pkl").write_bytes(pickle.dumps(passages))
    return folder


def save_beir(folder, count=20):
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": f"d{n}", "title": t, "text": f"{x} {n}"} for n, (t, x) in enumerate((TOY_PASSAGES * 9)[:count])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "who wrote hamlet?"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    return lines


class AnyEncoder(ToyEncoder):
    """One whose vectors are given: those of the passages with these texts."""

    def __init__(self, texts, vectors):
        super().__init__(vectors.shape[1])
        self._known = dict(zip(texts, vectors, strict=True))

    def _vector(self, text):
        return self._known[text.split("\n")[-1]]
