import datetime
import json

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import dataset_of, rows, save_custom

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase
from ragstone.knowledge.exchange import import_collection, open_source

IDS, TITLES, TEXTS, VECTORS = rows()


def table(vectors=None, **columns):
    values = {"title": TITLES, "text": TEXTS, **columns}
    return pa.table(
        {**values, "embeddings": pa.array(VECTORS.tolist(), pa.list_(pa.float32())) if vectors is None else vectors}
    )


def read(path, rows=1000, **options):
    chunks = list(open_source(path, **options).chunks(rows))
    vectors = None if chunks[0].vectors is None else np.concatenate([chunk.vectors for chunk in chunks])
    return [p for chunk in chunks for p in chunk.passages], vectors


@pytest.mark.parametrize("rows", [7, 40, 1000])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_saved_dataset(tmp_path, with_ids, rows):
    folder, index = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS, with_ids=with_ids)
    for more in ({}, {"index": index}):
        passages, vectors = read(folder, rows, **more)
        ids = IDS if with_ids else [str(n) for n in range(40)]
        assert [(p.id, p.title, p.text, p.metadata) for p in passages] == [
            (*each, {}) for each in zip(ids, TITLES, TEXTS, strict=True)
        ]
        np.testing.assert_array_equal(vectors, VECTORS)


def test_the_order_of_a_dataset_is_the_order_of_its_state(tmp_path):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    from datasets import load_from_disk

    expected = load_from_disk(str(folder))["id"]
    assert [p.id for p in read(folder)[0]] == list(expected) != IDS


def test_the_cache_files_of_datasets(tmp_path):
    folder, _ = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    (folder / "state.json").unlink()
    (folder / "cache-1234.arrow").write_bytes(b"a mapping of these")
    assert [p.id for p in read(folder)[0]] == IDS
    one = sorted(folder.glob("data*"))[1]
    assert [p.id for p in read(one)[0]] == IDS[14:27]


def test_a_dict_of_datasets_asks_for_one(tmp_path):
    from datasets import DatasetDict

    dataset = dataset_of(IDS, TITLES, TEXTS, VECTORS)
    DatasetDict({"train": dataset, "dev": dataset}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="several Datasets; name the folder of one of them: dev, train"):
        open_source(tmp_path / "both")
    assert len(read(tmp_path / "both" / "train")[0]) == 40


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 16),
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float16(), 16),
        pa.list_(pa.int8()),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_every_kind_of_list_and_float(tmp_path, kind, form):
    given = VECTORS.astype(kind.value_type.to_pandas_dtype())
    vectors = pa.array([list(row) for row in given], kind)
    whole = pa.table({"title": TITLES, "text": pa.array(TEXTS, pa.large_string()), "embeddings": vectors})
    file = tmp_path / f"passages.{form}"
    if form == "parquet":
        pq.write_table(whole, file, row_group_size=11)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=9)
    passages, found = read(file, 13)
    np.testing.assert_array_equal(found, given.astype(np.float32))
    assert [p.text for p in passages] == TEXTS


def test_a_folder_of_parquet_is_one_collection_in_the_order_of_names(tmp_path):
    (tmp_path / "train").mkdir()
    for n, start in enumerate((0, 25)):
        pq.write_table(table(id=IDS).slice(start, 25), tmp_path / "train" / f"part-{n}.parquet")
    passages, vectors = read(tmp_path, 10)
    assert [p.id for p in passages] == IDS
    np.testing.assert_array_equal(vectors, VECTORS)


@pytest.mark.parametrize("row_group_size", [1000, 20_000])
def test_a_large_file_is_never_held_as_a_whole(tmp_path, row_group_size):
    count, width = 20_000, 256
    text = [f"passage {place}" for place in range(count)]
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.random.default_rng(0).random(count * width, np.float32)), width
    )
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"title": text, "text": text, "embeddings": vectors}), path, row_group_size=row_group_size)
    del vectors
    held, most = pa.total_allocated_bytes(), 0
    for _ in open_source(path).chunks(1000):
        most = max(most, pa.total_allocated_bytes() - held)
    assert most < path.stat().st_size / 2


def test_other_columns_are_kept(tmp_path):
    day = datetime.date(2020, 5, 22)
    more = {
        "_id": [*range(40)],
        "source": ["a.txt"] * 40,
        "page": [3] * 40,
        "document_id": ["d"] * 40,
        "day": [day] * 40,
    }
    pq.write_table(table(**more, metadata=['{"year": 1999}'] * 40, noise=[[0.5]] * 40), tmp_path / "p.parquet")
    passage = read(tmp_path / "p.parquet")[0][7]
    assert (passage.id, passage.source, passage.page, passage.document_id) == ("7", "a.txt", 3, "d")
    assert passage.metadata == {"day": "2020-05-22", "year": 1999}
    pq.write_table(table(page=["iv"] * 40, source=[7] * 40), tmp_path / "q.parquet")
    assert read(tmp_path / "q.parquet")[0][0].metadata == {"page": "iv", "source": 7}


def test_nothing_said_is_left_out_and_named(tmp_path):
    texts, titles = list(TEXTS), list(TITLES)
    texts[1] = texts[2] = texts[3] = None
    titles[1], titles[2], titles[3] = "a title alone", None, "  "
    pq.write_table(table(title=titles, text=texts), tmp_path / "p.parquet")
    (chunk,) = open_source(tmp_path / "p.parquet").chunks(1000)
    assert [p.id for p in chunk.passages] == [str(n) for n in range(40) if n not in (2, 3)]
    np.testing.assert_array_equal(chunk.vectors, np.delete(VECTORS, [2, 3], axis=0))
    assert [skipped.line for skipped in chunk.skipped] == [2, 3]
    assert "row 2: the text is empty" in chunk.skipped[0].reason


def broken(place, value):
    vectors = VECTORS.tolist()
    vectors[place] = value
    return pa.array(vectors, pa.list_(pa.float32()))


@pytest.mark.parametrize("rows", [10, 1000])
@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (broken(23, None), "row 23 has no vector in 'embeddings'"),
        (broken(0, None), "row 0 has no vector"),
        (broken(23, [1.0] * 15), "row 23 has a vector of width 15, the first row's has 16"),
        (broken(23, []), "row 23 has a vector of width 0"),
        (broken(23, [float("nan")] * 16), "row 23 has a vector that is NaN"),
        (broken(23, [*[1.0] * 15, float("inf")]), "row 23 has a vector that is NaN, infinite"),
        (broken(23, [*[1.0] * 15, None]), "row 23 has a vector that is NaN"),
        (broken(23, [*[1.0] * 15, 1e20]), "row 23 has a vector that is NaN, infinite or too large"),
        (pa.array([["a"] * 16] * 40), "holds list<.*string>, not lists of numbers"),
        (pa.array([1.0] * 40), "holds double, not lists of numbers"),
    ],
)
def test_a_wrong_vector_is_named_by_its_row(tmp_path, vectors, message, rows):
    pq.write_table(table(vectors), tmp_path / "p.parquet", row_group_size=9)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "p.parquet", rows)


def test_a_width_that_changes_between_fixed_lists(tmp_path):
    for n, width in enumerate((16, 8)):
        vectors = pa.array(VECTORS[:, :width].tolist(), pa.list_(pa.float32(), width))
        pq.write_table(table(vectors), tmp_path / f"{n}.parquet")
    with pytest.raises(InputError, match="changes its columns from one file to the next"):
        read(tmp_path)


def test_wrong_files_get_one_sentence(tmp_path):
    folder, index = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if "00001" in file.name else content)
    with pytest.raises(InputError, match=r"data-00001-of-00003.arrow is damaged, cut off or no Arrow file"):
        read(cut)
    (cut / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"lacks .*data-00001-of-00003.arrow, which its state.json names"):
        read(cut)
    (cut / "state.json").write_text('{"_data_files": [{"filename": "../../elsewhere.arrow"}]}')
    with pytest.raises(InputError, match=r"lacks .*cut/elsewhere.arrow"):
        read(cut)
    (cut / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        read(cut)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(InputError, match=r"x.parquet is damaged, cut off or no Parquet file"):
        read(tmp_path / "x.parquet")
    pq.write_table(table().rename_columns(["title", "body", "embeddings"]), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="no column 'text', only title, body, embeddings"):
        read(tmp_path / "y.parquet")
    pq.write_table(table().rename_columns(["title", "text", "dense"]), tmp_path / "z.parquet")
    with pytest.raises(InputError, match="no column 'embeddings', but 'dense'"):
        read(tmp_path / "z.parquet")
    pq.write_table(table().slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        read(tmp_path / "empty.parquet")
    pq.write_table(table().slice(0, 39), tmp_path / "fewer.parquet")
    with pytest.raises(InputError, match=r"index.faiss holds 40 vectors, but .*fewer.parquet has 39 rows"):
        open_source(tmp_path / "fewer.parquet", index=index)
    with pytest.raises(InputError, match="give the file that faiss"):
        open_source(folder, index=tmp_path / "nowhere.faiss")


def test_vectors_that_are_in_the_faiss_file_alone(tmp_path):
    _, index = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS)
    pq.write_table(table().drop_columns(["embeddings"]), tmp_path / "p.parquet", row_group_size=7)
    passages, vectors = read(tmp_path / "p.parquet", 12, index=index)
    np.testing.assert_array_equal(vectors, VECTORS)
    assert len(passages) == 40
    numbered = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    numbered.add_with_ids(VECTORS, np.arange(40)[::-1].copy())
    faiss.write_index(numbered, str(index))
    with pytest.raises(InputError, match="numbers its vectors otherwise than the rows"):
        open_source(tmp_path / "p.parquet", index=index)


def test_an_index_by_distance_is_noted(tmp_path):
    folder, index = save_custom(tmp_path, IDS, TITLES, TEXTS, VECTORS, metric=faiss.METRIC_L2)
    (note,) = import_collection(folder, tmp_path / "kb", index=index).notes
    assert "ranks by Euclidean distance; Ragstone ranks by inner product" in note
    assert len(KnowledgeBase.open(tmp_path / "kb")) == 40
