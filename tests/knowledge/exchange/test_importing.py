import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import AnyEncoder, rows, save_beir, save_custom

from ragstone.encoders import load_encoder
from ragstone.errors import EncoderMismatchError, InputError, KnowledgeBaseError
from ragstone.knowledge import KnowledgeBase, Passage
from ragstone.knowledge.exchange import importing, open_source
from ragstone.knowledge.exchange.importing import import_collection
from ragstone.testing import ToyEncoder, question_tokenizer, tiny_question_encoder

IDS, TITLES, TEXTS, VECTORS = rows()


@pytest.fixture
def parquet(tmp_path):
    def write(name="p.parquet", **columns):
        values = {"id": IDS, "title": TITLES, "text": TEXTS, "embeddings": list(VECTORS), **columns}
        pq.write_table(pa.table(values), tmp_path / name)
        return tmp_path / name

    return write


# Formats that have to be encoded


def test_a_beir_folder(tmp_path):
    lines = save_beir(tmp_path / "nq")
    encoder = ToyEncoder()
    report = import_collection(tmp_path / "nq", tmp_path / "kb", encoder=encoder)
    assert (report.format, report.passages, report.encoded) == ("beir", 20, True)
    assert "queries.jsonl and qrels" in report.notes[0]
    base = KnowledgeBase.open(tmp_path / "kb", encoder=encoder)
    passages = base.get([line["_id"] for line in lines])
    assert [(p.title, p.text) for p in passages] == [(line["title"], line["text"]) for line in lines]
    expected = encoder.encode_passages([(p.title, p.text) for p in passages])
    np.testing.assert_array_equal(base.vectors([p.id for p in passages]), expected)
    again = import_collection(tmp_path / "nq" / "corpus.jsonl", tmp_path / "kb", encoder=encoder)
    assert (again.passages, again.unchanged, encoder.encoded, again.notes) == (0, 20, 40, ())


def test_a_dpr_table_with_its_quotes(tmp_path):
    lines = ["id\ttext\ttitle", '1\t"He said ""no"" to\tit"\t"A, B"', "2\tplain\tTitle", '3\t"two\nlines"\t']
    (tmp_path / "psgs_w100.tsv").write_text("\n".join(lines))
    report = import_collection(tmp_path / "psgs_w100.tsv", tmp_path / "kb", encoder=ToyEncoder())
    assert report.format == "dpr"
    base = KnowledgeBase.open(tmp_path / "kb", encoder=ToyEncoder())
    assert [(p.title, p.text) for p in base.get(["1", "2", "3"])] == [
        ("A, B", 'He said "no" to\tit'),
        ("Title", "plain"),
        ("", "two\nlines"),
    ]


def test_pyserini_has_the_title_on_the_first_line(tmp_path):
    records = [
        {"id": "0", "contents": '"Aaron"\nAaron is a prophet.\nThe end.'},
        {"id": "1", "contents": "no title here", "lang": "en"},
        {"id": "2", "contents": "a\nb", "title": "given"},
    ]
    folder = tmp_path / "wiki"
    folder.mkdir()
    for n, record in enumerate(records):
        (folder / f"{n}.jsonl").write_text(json.dumps(record) + "\n")
    assert open_source(folder).kind == open_source(folder / "0.jsonl").kind == "pyserini"
    import_collection(folder, tmp_path / "kb", encoder=ToyEncoder())
    found = KnowledgeBase.open(tmp_path / "kb").get(["0", "1", "2"])
    assert [(p.title, p.text) for p in found] == [
        ('"Aaron"', "Aaron is a prophet.\nThe end."),
        ("", "no title here"),
        ("given", "a\nb"),
    ]
    assert found[1].metadata == {"lang": "en"}


def test_long_records_stay_one_passage(tmp_path):
    text = "word " * 1000
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "a", "title": "", "text": text}))
    import_collection(tmp_path / "corpus.jsonl", tmp_path / "kb", encoder=ToyEncoder())
    assert KnowledgeBase.open(tmp_path / "kb").get("a")[0].text == text


def test_bad_lines_are_left_out_and_named(tmp_path):
    good = {"_id": "a", "title": "", "text": "good"}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({"_id": "b", "title": "", "text": " "}),
        json.dumps({**good, "_id": "c"}),
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    report = import_collection(tmp_path / "corpus.jsonl", tmp_path / "kb", encoder=ToyEncoder())
    assert report.passages == 2
    assert [skipped.line for skipped in report.skipped] == [2, 3]


def test_an_encoded_import_that_stops_goes_on_where_it_was(tmp_path, monkeypatch):
    save_beir(tmp_path / "nq", 60)
    monkeypatch.setattr(importing, "_ENCODED_ROWS", 10)

    class Failing(ToyEncoder):
        def encode_passages(self, pairs, *, progress=None):
            if self.encoded >= 30:
                raise KeyboardInterrupt
            return super().encode_passages(pairs, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        import_collection(tmp_path / "nq", tmp_path / "kb", encoder=Failing())
    assert len(KnowledgeBase.open(tmp_path / "kb")) == 30
    encoder = ToyEncoder()
    report = import_collection(tmp_path / "nq", tmp_path / "kb", encoder=encoder)
    assert (report.passages, report.unchanged, encoder.encoded) == (30, 30, 30)
    assert len(KnowledgeBase.open(tmp_path / "kb")) == 60


# Which encoder


def test_the_encoder_that_made_the_vectors_is_named_and_checked(tmp_path, parquet):
    encoder = ToyEncoder(16)
    vectors = encoder.encode_passages(list(zip(TITLES, TEXTS, strict=True)))
    file = parquet(embeddings=list(vectors))
    import_collection(file, tmp_path / "kb", encoder=encoder)
    base = KnowledgeBase.open(tmp_path / "kb", encoder=encoder)
    assert base.info().encoder == encoder.spec.to_dict()
    best = max(range(40), key=lambda n: vectors[n] @ encoder.encode_questions(["who wrote hamlet?"])[0])
    assert base.search("who wrote hamlet?", k=1)[0].passage.id == IDS[best]
    with pytest.raises(EncoderMismatchError, match=r"did not make the vectors .*cosine"):
        import_collection(parquet("q.parquet"), tmp_path / "kb2", encoder=encoder)
    with pytest.raises(EncoderMismatchError, match="width 16, those of the encoder 'toy' have 32"):
        import_collection(file, tmp_path / "kb2", encoder=ToyEncoder(32))
    assert not (tmp_path / "kb2").exists()


def test_a_base_does_not_take_vectors_of_another(tmp_path, parquet):
    file, encoder = parquet(), AnyEncoder(TEXTS, VECTORS)
    KnowledgeBase.create(tmp_path / "named", encoder=encoder)
    with pytest.raises(InputError, match=r"holds vectors of an encoder, .* brings others; name the encoder"):
        import_collection(file, tmp_path / "named")
    assert import_collection(file, tmp_path / "named", encoder=encoder).passages == 40
    import_collection(file, tmp_path / "nobody's")
    with pytest.raises(InputError, match="of which nobody said what made them"):
        import_collection(file, tmp_path / "nobody's", encoder=encoder)
    KnowledgeBase.create(tmp_path / "narrow", encoder=None, width=8)
    with pytest.raises(InputError, match="width 16, the base's have 8; import into a new base"):
        import_collection(file, tmp_path / "narrow")


def test_without_an_encoder_questions_bring_their_vectors(tmp_path, parquet):
    import_collection(parquet(), tmp_path / "kb")
    base = KnowledgeBase.open(tmp_path / "kb")
    with pytest.raises(KnowledgeBaseError, match="encoder=None"):
        base.search("who?")
    best = base.search(vectors=VECTORS[5], k=40)
    assert [h.passage.id for h in best] == [IDS[n] for n in np.argsort(-(VECTORS @ VECTORS[5]))]


@pytest.fixture
def dpr(tmp_path):
    """DPR's two encoders in two folders that are named as on the hub."""
    import transformers

    for kind, model in (("ctx", "DPRContextEncoder"), ("question", "DPRQuestionEncoder")):
        config = tiny_question_encoder("dpr").config
        getattr(transformers, model)(config).eval().save_pretrained(tmp_path / f"dpr-{kind}_encoder")
        question_tokenizer().save_pretrained(tmp_path / f"dpr-{kind}_encoder")
    return tmp_path / "dpr-ctx_encoder", tmp_path / "dpr-question_encoder"


def test_questions_to_dpr_s_passages_are_encoded_by_its_other_model(tmp_path, parquet, dpr):
    passages, questions = (load_encoder(folder, dtype="float32") for folder in dpr)
    vectors = passages.encode_passages(list(zip(TITLES, TEXTS, strict=True)))
    file = parquet(embeddings=list(vectors))
    import_collection(file, tmp_path / "kb", encoder=str(dpr[0]))
    expected = questions.encode_questions(["who wrote hamlet?"])[0] @ vectors.T
    wrong = passages.encode_questions(["who wrote hamlet?"])[0] @ vectors.T

    def found(base):
        return {hit.passage.id: hit.score for hit in base.search("who wrote hamlet?", k=40)}

    base = KnowledgeBase.open(tmp_path / "kb", dtype="float32")
    np.testing.assert_allclose([found(base)[i] for i in IDS], expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, wrong, atol=1e-2)

    dpr[0].rename(tmp_path / "passages")  # now the one does not lead to the other
    dpr[1].rename(tmp_path / "questions")
    unnamed = KnowledgeBase.open(tmp_path / "kb", encoder=str(tmp_path / "passages"))
    with pytest.raises(KnowledgeBaseError, match="is not the one for questions; make the base with question_encoder="):
        unnamed.search("who?")
    for name, encoder in (("both", tmp_path / "passages"), ("questions alone", None)):
        for _ in range(2):  # the same again changes nothing
            import_collection(file, tmp_path / name, encoder=encoder, question_encoder=tmp_path / "questions")
        named = KnowledgeBase.open(tmp_path / name, dtype="float32")
        np.testing.assert_allclose([found(named)[i] for i in IDS], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(EncoderMismatchError, match="another encoder for questions"):
        import_collection(
            file, tmp_path / "both", encoder=tmp_path / "passages", question_encoder=tmp_path / "passages"
        )
    named = KnowledgeBase.open(tmp_path / "both", dtype="float32")
    named.reencode(ToyEncoder(16))
    assert {h.passage.id for h in named.search("who wrote hamlet?", k=40)} == set(IDS)  # by the new encoder
    assert found(named) != pytest.approx(dict(zip(IDS, expected.tolist(), strict=True)))


# Again, and wrong


def test_the_same_again_changes_nothing_and_others_with_its_ids_are_refused(tmp_path, parquet):
    file = parquet()
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    assert base.import_from(file).passages == 40
    version = base.version
    again = base.import_from(file)
    assert (again.passages, again.unchanged, base.version) == (0, 40, version)
    for name, columns in (("text", {"text": [*TEXTS[:9], "x", *TEXTS[10:]]}), ("v", {"embeddings": list(VECTORS + 1)})):
        with pytest.raises(InputError, match="holds another passage with the id"):
            base.import_from(parquet(f"{name}.parquet", **columns))
    assert base.version == version
    more = {"id": [*IDS[:20], *(f"n{i}" for i in range(20))], "title": TITLES, "text": TEXTS}
    mixed = base.import_from(parquet("more.parquet", **more))
    assert (mixed.passages, mixed.unchanged, len(base)) == (20, 20, 60)
    np.testing.assert_array_equal(base.vectors([f"n{i}" for i in range(20)]), VECTORS[20:])


@pytest.mark.parametrize("rows", [7, 1000])
def test_an_id_that_is_given_twice_is_named(tmp_path, parquet, monkeypatch, rows):
    monkeypatch.setattr(importing, "_VECTOR_ROWS", rows)
    with pytest.raises(InputError, match=r"gives the id '3' twice; give each passage its own"):
        import_collection(parquet(id=[*IDS[:30], "3", *IDS[31:]]), tmp_path / "kb")


def test_nothing_to_import_is_an_error(tmp_path, parquet):
    with pytest.raises(InputError, match=r"holds no passage that can be imported: .* row 0: the text is empty"):
        import_collection(parquet(text=[""] * 40, title=[""] * 40), tmp_path / "kb")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: None, "does not exist"),
        (lambda place: place.mkdir(), "holds nothing of a format that is known here"),
        (lambda place: KnowledgeBase.create(place, encoder=None, width=2), "is a knowledge base of Ragstone already"),
        (lambda place: place.write_text("x"), "is of no format that is known here"),
    ],
)
def test_what_is_no_collection_says_so(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "it")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}', "neither BEIR's _id nor Pyserini's contents"),
        ("a.jsonl", "[1, 2", "does not begin with a JSON object"),
        ("a.tsv", "question\tanswer\n", "does not begin with the line id, text, title"),
        ("a.faiss", "x", "holds vectors without passages"),
    ],
)
def test_files_of_other_kinds_say_so(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / name)


def test_wrong_options_say_so(tmp_path, parquet):
    with pytest.raises(InputError, match="format='csv' is none of auto, legacy"):
        open_source(parquet(), "csv")
    save_beir(tmp_path / "nq")
    with pytest.raises(InputError, match="has no index beside it"):
        open_source(tmp_path / "nq", index=parquet())
    with pytest.raises(InputError, match=r"has no corpus.jsonl"):
        open_source(tmp_path, "beir")


KILLED = """
import sys, time
from ragstone.knowledge.exchange import importing
importing._VECTOR_ROWS = 50
whole = importing.passage_table
importing.passage_table = lambda *a: (time.sleep(0.02), whole(*a))[1]
print("started", flush=True)
importing.import_collection(sys.argv[1], sys.argv[2])
"""


def test_kill_9_in_between_loses_nothing_and_the_next_run_completes(tmp_path):
    ids, titles, texts, vectors = rows(2000)
    folder, _ = save_custom(tmp_path, ids, titles, texts, vectors)
    partial = 0
    for wait in (0.3, 0.6, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "kb")], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if KnowledgeBase.exists(tmp_path / "kb"):
            held = KnowledgeBase.open(tmp_path / "kb")
            assert len(held) % 50 == 0
            np.testing.assert_array_equal(held.vectors(ids[: len(held)]), vectors[: len(held)])
            partial += 0 < len(held) < 2000
    report = import_collection(folder, tmp_path / "kb")
    assert report.passages + report.unchanged == 2000
    base = KnowledgeBase.open(tmp_path / "kb")
    assert base.get(ids) == [Passage(i, t, x) for i, t, x in zip(ids, titles, texts, strict=True)]
    np.testing.assert_array_equal(base.vectors(ids), vectors)
    assert len(base) == 2000
