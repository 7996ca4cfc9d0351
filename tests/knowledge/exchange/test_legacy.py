import pickle
import shutil

import faiss
import numpy as np
import pytest
from made import PREFIX, rows, save_legacy, with_extra_dimension

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase
from ragstone.knowledge.exchange import import_collection, open_source
from ragstone.knowledge.exchange.legacy import without_extra_dimension


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("kind", ["hnsw", "hnsw8", "flat", "idmap"])
def test_vectors_and_passages_come_in_as_they_were(tmp_path, kind, numbers):
    ids, titles, texts, vectors = rows()
    folder = save_legacy(tmp_path / "dpr", ids, titles, texts, vectors, kind=kind, numbers=numbers)
    report = import_collection(folder, tmp_path / "kb")
    assert (report.format, report.passages, report.encoded, report.skipped) == ("legacy", 40, False, ())
    base = KnowledgeBase.open(tmp_path / "kb")
    assert (base.width, base.has_encoder) == (16, False)
    assert [(p.id, p.title, p.text) for p in base.get(ids)] == list(zip(ids, titles, texts, strict=True))
    np.testing.assert_allclose(base.vectors(ids), vectors, atol=0.05 if kind == "hnsw8" else 0)


def test_the_extra_dimension_is_dropped_and_only_it():
    vectors = rows(100)[3]
    np.testing.assert_array_equal(without_extra_dimension(with_extra_dimension(vectors), "f"), vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_array_equal(without_extra_dimension(with_extra_dimension(unit), "f"), unit)
    for others in (vectors, unit):
        with pytest.raises(InputError, match="lack DPR's extra dimension"):
            without_extra_dimension(others, "f")


def test_the_file_may_be_named_and_the_passages_be_a_table(tmp_path):
    ids, titles, texts, vectors = rows()
    folder = save_legacy(tmp_path, ids, titles, texts, vectors)
    (folder / "psgs_w100.tsv.pkl").unlink()
    lines = [f'{i}\t"{x}"\t{t}' for i, t, x in zip(ids, [t.replace('"', "") for t in titles], texts, strict=True)]
    (folder / "psgs_w100.tsv").write_text("id\ttext\ttitle\n" + "\n".join(lines))
    import_collection(folder / f"{PREFIX}.index.dpr", tmp_path / "kb")
    assert [p.text for p in KnowledgeBase.open(tmp_path / "kb").get(ids)] == texts


def break_it(folder, how, ids):
    index, meta, passages = (folder / f"{PREFIX}{suffix}" for suffix in (".index.dpr", ".index_meta.dpr", ".x"))
    passages = folder / "psgs_w100.tsv.pkl"
    held = pickle.loads(passages.read_bytes())
    if how == "no meta":
        meta.unlink()
    elif how == "no passages":
        passages.unlink()
    elif how == "two indexes":
        shutil.copy(index, folder / "other.index.dpr")
    elif how == "fewer ids":
        meta.write_bytes(pickle.dumps(ids[:-1]))
    elif how == "an id twice":
        meta.write_bytes(pickle.dumps([ids[1], *ids[1:]]))
    elif how == "ids are a dict":
        meta.write_bytes(pickle.dumps(held))
    elif how == "fewer passages":
        passages.write_bytes(pickle.dumps({i: held[i] for i in ids[:-1]}))
    elif how == "an unknown passage":
        passages.write_bytes(pickle.dumps({("x" if i == ids[7] else i): held[i] for i in ids}))
    elif how == "passages are a list":
        passages.write_bytes(pickle.dumps(ids))
    elif how == "a passage is a number":
        passages.write_bytes(pickle.dumps({**held, ids[3]: 5}))
    elif how == "evil passages":
        passages.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    elif how == "cut off":
        index.write_bytes(index.read_bytes()[:3000])
    elif how == "empty":
        index.write_bytes(b"")
    elif how == "no faiss file":
        index.write_bytes(b"these are not the vectors that you are looking for")
    elif how == "compressed":
        quantised = faiss.index_factory(16, "PQ4x4", faiss.METRIC_INNER_PRODUCT)
        quantised.train(rows()[3])
        quantised.add(rows()[3])
        faiss.write_index(quantised, str(index))
    elif how == "compressed with ids":  # asked for its vectors, faiss would end the process
        vague = faiss.IndexIDMap(faiss.index_factory(16, "IVF2,PQ4x4", faiss.METRIC_INNER_PRODUCT))
        vague.train(rows()[3])
        vague.add_with_ids(rows()[3], np.arange(40))
        faiss.write_index(vague, str(index))
    elif how == "distances":
        flat = faiss.IndexFlatL2(16)
        flat.add(rows()[3])
        faiss.write_index(flat, str(index))
    elif how == "a graph of its own":
        graph = faiss.IndexHNSWFlat(16, 8)
        graph.add(rows()[3])
        faiss.write_index(graph, str(index))
    elif how == "NaN":
        flat = faiss.IndexFlatIP(16)
        vectors = rows()[3]
        vectors[5, 2] = np.nan
        flat.add(vectors)
        faiss.write_index(flat, str(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no meta", "index_meta.dpr beside it"),
        ("no passages", r"one file \*\.pkl, but holds none; put psgs_w100"),
        ("two indexes", "one file .*index.dpr, but holds hf_bert.*other"),
        ("fewer ids", "lists 39 ids, but .* holds 40 vectors"),
        ("an id twice", "lists the id '2' twice"),
        ("ids are a dict", "holds dict, not a list of ids"),
        ("fewer passages", "holds 40 vectors, but its passages are 39"),
        ("an unknown passage", "a vector of the passage '8', which is not among"),
        ("passages are a list", "holds list, not a dict of passages"),
        ("a passage is a number", r"the passage '4' of .* is '5', not \(text, title\)"),
        ("evil passages", r"psgs_w100.tsv.pkl is refused: it names os\.system"),
        ("cut off", "is damaged, cut off or no faiss index"),
        ("empty", "is damaged, cut off or no faiss index"),
        ("no faiss file", "no faiss index .*not recognized"),
        ("compressed", "IndexPQ, which does not keep whole vectors"),
        ("compressed with ids", "IndexIDMap, which does not keep whole vectors"),
        ("distances", "compares by Euclidean distance"),
        ("a graph of its own", "lack DPR's extra dimension"),
        ("NaN", "vector 5 is NaN"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, how, message):
    ids, *columns = rows()
    folder = save_legacy(tmp_path / "dpr", ids, *columns)
    break_it(folder, how, ids)
    with pytest.raises(InputError, match=message):
        import_collection(folder, tmp_path / "kb")


def test_passages_without_a_word_are_left_out_and_named(tmp_path):
    ids, titles, texts, vectors = rows()
    titles[3] = texts[3] = ""
    folder = save_legacy(tmp_path / "dpr", ids, titles, texts, vectors)
    report = import_collection(folder, tmp_path / "kb")
    assert report.passages == 39
    (skipped,) = report.skipped
    assert skipped.line == 3
    assert "row 3: the text is empty" in skipped.reason
    base = KnowledgeBase.open(tmp_path / "kb")
    np.testing.assert_array_equal(base.vectors(ids[4:]), vectors[4:])


def test_blocks_are_streamed(tmp_path):
    ids, titles, texts, vectors = rows(100)
    source = open_source(save_legacy(tmp_path, ids, titles, texts, vectors))
    chunks = list(source.chunks(30))
    assert [len(chunk.passages) for chunk in chunks] == [30, 30, 30, 10]
    np.testing.assert_array_equal(np.concatenate([chunk.vectors for chunk in chunks]), vectors)
