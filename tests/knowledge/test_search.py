import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import brute_force, filled, found, low_dimensional

from ragstone.errors import InputError
from ragstone.knowledge import KnowledgeBase, Passage, search, storage
from ragstone.knowledge.ranking import Ranking, exact_candidates, fuse
from ragstone.testing import ToyEncoder


@pytest.fixture
def quantised(monkeypatch):
    monkeypatch.setattr(search, "EXACT_BELOW", 0)


def vectors_held(hits, ids, vectors):
    """Whether each hit carries the vector of its passage."""
    return all(np.array_equal(hit.vector, vectors[ids.index(hit.passage.id)]) for hit in hits)


# Exact search


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exact_candidates_hold_the_best_and_all_that_tie(data):
    count, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    k, block = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 40))
    # Few distinct numbers make many ties; 0.1 and 0.3 make products that round.
    numbers = st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.3, 1e6])
    rows = data.draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=count, max_size=count))
    vectors = np.array(rows, np.float32)
    question = np.array([data.draw(st.lists(numbers, min_size=width, max_size=width))], np.float32)
    row_ids = np.arange(count, dtype=np.uint64)
    blocks = ((row_ids[i : i + block], vectors[i : i + block]) for i in range(0, count, block))
    (candidates,) = exact_candidates(blocks, question, k)
    scores = (vectors.astype(np.float64) @ question[0].astype(np.float64)).astype(np.float32)
    kth_best = np.sort(scores)[::-1][:k][-1]
    assert set(np.flatnonzero(scores >= kth_best).tolist()) <= set(candidates.tolist())


@pytest.mark.parametrize("k", [1, 7, 300, 1000])
def test_search_by_vector_equals_brute_force(tmp_path, k):
    vectors = low_dimensional(300, 20, seed=0)
    vectors[50:80] = vectors[50]  # ties across the end of the list
    vectors[80:90] = 0
    kb, ids = filled(tmp_path / "kb", vectors)
    questions = np.concatenate([low_dimensional(4, 20, seed=1), np.zeros((1, 20), np.float32)])
    expected = [brute_force(ids, vectors, question, k) for question in questions]
    for method in ("dense", "exact"):
        assert [found(hits) for hits in kb.search(vectors=questions, k=k, search=method)] == expected
    assert found(kb.search(vectors=questions[0], k=k)) == expected[0]
    assert len(expected[0]) == min(k, 300)


def test_the_oracle_streams_what_is_too_large_to_hold(tmp_path, quantised, monkeypatch):
    monkeypatch.setattr(storage, "_SCAN_ROWS", 64)
    vectors = low_dimensional(300, 20, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    question = low_dimensional(1, 20, seed=1)[0]
    assert found(kb.search(vectors=question, k=9, search="exact")) == brute_force(ids, vectors, question, 9)
    even = [place for place in range(300) if place % 10 < 5]
    expected = brute_force([ids[place] for place in even], vectors[even], question, 9)
    assert found(kb.search(vectors=question, k=9, search="exact", where="page < 5")) == expected


def test_a_hit_carries_the_vector_its_score_comes_from(tmp_path):
    vectors = low_dimensional(50, 20, seed=0)
    kb, ids = filled(tmp_path / "kb", vectors)
    question = low_dimensional(1, 20, seed=1)[0]
    hits = kb.search(vectors=question, k=5)
    assert vectors_held(hits, ids, vectors)
    for hit in hits:
        assert hit.score == pytest.approx(float(hit.vector @ question), rel=1e-5)
    assert "vector" not in repr(hit)


# Keyword and hybrid search

TEXTS = {
    "hamlet": ("Hamlet", "A tragedy by Shakespeare about a prince of Denmark."),
    "macbeth": ("Macbeth", "A tragedy by Shakespeare about a Scottish general."),
    "village": ("", "Hamlet is a word for a small village."),
    "cat": ("Cats", "Cats sleep for most of the day."),
}


@pytest.fixture
def plays(tmp_path):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    kb.add([Passage(id_, title, text) for id_, (title, text) in TEXTS.items()])
    return kb


def test_keyword_search_looks_at_title_and_text(plays):
    assert {hit.passage.id for hit in plays.search("Hamlet", search="keyword")} == {"hamlet", "village"}
    assert [hit.passage.id for hit in plays.search("tragedy of Macbeth", search="keyword")] == ["macbeth", "hamlet"]
    assert plays.search("cat", search="keyword")[0].passage.id == "cat"  # by its stem
    assert plays.search("zebra", search="keyword") == []
    assert [hit.passage.id for hit in plays.search("tragedy", k=1, search="keyword")] == ["hamlet"]  # a tie, by id


def test_keyword_search_sees_every_write(plays):
    plays.upsert([Passage("cat", text="The cat plays Hamlet.")])
    plays.add([Passage("dog", text="The dog ignores Hamlet.")])
    plays.delete("village")
    assert {hit.passage.id for hit in plays.search("hamlet", search="keyword")} == {"hamlet", "cat", "dog"}
    assert plays.search("sleep", search="keyword") == []


def test_keyword_scores_do_not_depend_on_the_state_of_the_index(plays):
    before = [(hit.passage.id, hit.score) for hit in plays.search("tragedy prince general", search="keyword")]
    plays._store.index_words(all_rows=True)
    version = plays.version
    after = [(hit.passage.id, hit.score) for hit in plays.search("tragedy prince general", search="keyword")]
    assert before == [(id_, pytest.approx(score)) for id_, score in after]
    plays._store.index_words(all_rows=True)
    assert plays.version == version  # nothing to do


def test_the_keyword_index_follows_many_writes(plays, monkeypatch):
    monkeypatch.setattr(storage, "_UNINDEXED_ROWS", 10)
    for i in range(30):
        plays.add([Passage(f"n{i}", text=f"number{i}")])
    assert min(i.num_rows_indexed for i in plays._store._dataset.describe_indices()) >= 20
    assert [hit.passage.id for hit in plays.search("number29", search="keyword")] == ["n29"]


@pytest.mark.parametrize(
    "question",
    ["?!", '"hamlet', "O'Hara", "😀", "AND OR NOT", "hamlet~2 +prince -denmark", "title:hamlet", "ham*", "the", "("],
)
@pytest.mark.parametrize("method", ["keyword", "hybrid", "dense"])
def test_no_question_is_a_query_language(plays, question, method):
    hits = plays.search(question, search=method)
    assert len(hits) <= 4
    if "hamlet" in question and method == "keyword":
        assert {hit.passage.id for hit in hits} >= {"hamlet", "village"}


def test_words_of_other_scripts_are_found(plays):
    plays.add(
        [
            Passage("jp", text="東京は日本の首都です"),
            Passage("ru", text="Москва — столица"),
            Passage("fr", text="Le café de l'avenue"),
        ]
    )
    for question, id_ in [("首都", "jp"), ("МОСКВА", "ru"), ("cafe", "fr"), ("avenue", "fr")]:
        assert [hit.passage.id for hit in plays.search(question, search="keyword")] == [id_]


def test_fusion_by_hand():
    dense = Ranking(np.array([10, 20, 30], np.uint64), ["a", "b", "c"], np.array([3.0, 2.0, 1.0]))
    words = Ranking(np.array([30, 10, 40], np.uint64), ["c", "a", "d"], np.array([9.0, 8.0, 7.0]))
    fused = fuse([dense, words], 3)
    assert fused.passage_ids == ["a", "c", "b"]
    assert fused.row_ids.tolist() == [10, 30, 20]
    assert fused.scores.tolist() == [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62]


def test_hits_carry_their_score_by_words(plays):
    question = "a tragedy by Shakespeare"
    words = {hit.passage.id: hit.score for hit in plays.search(question, k=100, search="keyword")}
    assert len(words) >= 2
    assert [hit.keyword_score for hit in plays.search(question, k=100, search="keyword")] == [*words.values()]
    fused = plays.search(question, k=100, search="hybrid")
    assert {hit.passage.id for hit in fused} > set(words)  # search by vector finds every passage
    assert [hit.keyword_score for hit in fused] == [words.get(hit.passage.id, 0.0) for hit in fused]
    assert {hit.keyword_score for hit in plays.search(question, k=100)} == {0.0}


def test_hits_carry_their_vector_however_they_were_found(tmp_path):
    encoder = ToyEncoder(32)
    vectors, ids = low_dimensional(300, 32, seed=0), [f"p{place}" for place in range(300)]
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=encoder)
    kb.add([Passage(id_, text="word " * (1 + place % 7)) for place, id_ in enumerate(ids)], vectors=vectors)
    near = {hit.passage.id for hit in kb.search("word", k=50)}  # as many as hybrid search looks up by vector
    fused, words = (kb.search(["word", "words"], k=10, search=method) for method in ("hybrid", "keyword"))
    assert not {hit.passage.id for hit in fused[0]} <= near
    assert [len(hits) for hits in fused] == [10, 10]
    assert all(vectors_held(hits, ids, vectors) for hits in [*fused, *words])


def test_a_search_leaves_the_garbage_collector_as_it_was(plays):
    for state, switch in ((False, gc.disable), (True, gc.enable)):
        switch()
        plays.search("a prince", k=2)
        assert gc.isenabled() is state


def test_a_passage_below_all_that_were_looked_up_has_at_most_the_last_score():
    words = Ranking(np.array([4, 2, 9], np.uint64), ["d", "b", "i"], np.array([5.0, 3.0, 2.0]))
    fused = Ranking(np.array([2, 7, 4], np.uint64), ["b", "g", "d"], np.array([0.3, 0.2, 0.1]))
    assert fused.with_words(words, depth=3).keyword_scores.tolist() == [3.0, 2.0, 5.0]
    assert fused.with_words(words, depth=50).keyword_scores.tolist() == [3.0, 0.0, 5.0]
    none = Ranking(np.empty(0, np.uint64), [], np.empty(0))
    assert fused.with_words(none, depth=50).at([2, 0]).keyword_scores.tolist() == [0.0, 0.0]


def test_hybrid_search_fuses_dense_and_keyword(plays):
    question = "tragedy about a prince"
    dense, words = (plays.search(question, k=50, search=method) for method in ("dense", "keyword"))
    expected: dict[str, float] = {}
    for hits in (dense, words):
        for place, hit in enumerate(hits, 1):
            expected[hit.passage.id] = expected.get(hit.passage.id, 0) + 1 / (60 + place)
    hits = plays.search(question, k=50, search="hybrid")
    assert found(hits) == sorted(expected.items(), key=lambda pair: (-pair[1], pair[0]))


# Least scores, and passages of many documents


@pytest.fixture(params=["exact", "quantised"])
def papers(tmp_path, request, monkeypatch):
    """400 passages of 20 documents, the passages of a document alike, and 10 of none; ids and their documents."""
    monkeypatch.setattr(search, "EXACT_BELOW", 10_000 if request.param == "exact" else 0)
    monkeypatch.setattr(search, "_FEW_ALLOWED", 30)
    centres = low_dimensional(20, 64, seed=0)
    vectors = np.concatenate([np.repeat(centres, 20, axis=0), low_dimensional(10, 64, seed=1)])
    vectors += 0.1 * np.random.default_rng(2).standard_normal(vectors.shape).astype(np.float32)
    documents = [f"d{i // 20}" if i < 400 else None for i in range(410)]
    ids = [f"p{i}" for i in range(410)]
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=64)
    passages = [Passage(ids[i], text="same words", document_id=documents[i], page=i % 10) for i in range(410)]
    kb.add(passages, vectors=vectors)
    return kb, ids, vectors, dict(zip(ids, documents, strict=True))


def diverse(ranked, documents, count):
    """The definition: go down the ranking and pass over what there are ``count`` of already."""
    taken: dict[str, int] = {}
    for id_, score in ranked:
        document = documents[id_] or id_
        taken[document] = taken.get(document, 0) + 1
        if taken[document] <= count:
            yield id_, score


@pytest.mark.parametrize("k", [3, 10, 40, 500])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_at_most_so_many_passages_of_a_document(papers, k, count):
    kb, ids, vectors, documents = papers
    questions = low_dimensional(5, 64, seed=3)
    for question, hits in zip(questions, kb.search(vectors=questions, k=k, per_document=count), strict=True):
        ranked = brute_force(ids, vectors, question, 410)
        assert found(hits) == [*diverse(ranked, documents, count)][:k]


def test_the_least_score_and_all_options_together(papers):
    kb, ids, vectors, documents = papers
    question = low_dimensional(1, 64, seed=3)[0]
    ranked = brute_force(ids, vectors, question, 410)
    least = ranked[7][1]
    assert found(kb.search(vectors=question, k=50, min_score=least)) == ranked[:8]
    assert kb.search(vectors=question, min_score=ranked[0][1] + 1) == []
    allowed = [(id_, score) for id_, score in ranked if int(id_[1:]) % 10 < 4]
    hits = kb.search(vectors=question, k=9, where="page < 4", per_document=2, min_score=0)
    assert found(hits) == [pair for pair in diverse(allowed, documents, 2) if pair[1] >= 0][:9]
    few = [(id_, score) for id_, score in ranked if int(id_[1:]) % 10 == 3 and id_ < "p2"]
    assert found(kb.search(vectors=question, k=100, where="page = 3 AND id < 'p2'")) == few


def test_other_ways_of_searching_spread_over_documents_too(plays):
    plays.add([Passage(f"h{i}", text=f"Hamlet, act {i}", document_id="play") for i in range(5)])
    for method in ("keyword", "hybrid", "exact"):
        hits = plays.search("hamlet act", k=4, search=method, per_document=1)
        assert len([hit for hit in hits if hit.passage.document_id == "play"]) == 1
        least = hits[1].score
        assert [hit.score >= least for hit in plays.search("hamlet act", k=4, search=method, min_score=least)].count(
            False
        ) == 0


def test_a_batch_gives_what_its_questions_give(papers, monkeypatch):
    kb = papers[0]
    questions = low_dimensional(20, 64, seed=3)
    whole = kb.search(vectors=questions, k=12)
    assert whole == [kb.search(vectors=question, k=12) for question in questions]
    monkeypatch.setattr(search, "_SLICE_BYTES", 1)
    assert kb.search(vectors=questions, k=12) == whole


@pytest.mark.parametrize("options", [{"min_score": "5"}, {"min_score": float("nan")}, {"per_document": 0}])
def test_options_that_are_none_are_named(plays, options):
    with pytest.raises(InputError, match=f"{min(options)}="):
        plays.search("hamlet", **options)


# What callers give


def test_predicates_hold_for_every_way_of_searching(plays):
    plays.add([Passage("x", text="Hamlet on page 3", page=3, source="o'hara.pdf", metadata={"year": 2001})])
    for where in (
        "page = 3",
        "source = 'o''hara.pdf'",
        "json_get_int(metadata, 'year') > 2000",
        "title = '' AND page > 0",
    ):
        for method in ("dense", "exact", "keyword", "hybrid"):
            assert [hit.passage.id for hit in plays.search("hamlet", search=method, where=where)] == ["x"]
    assert plays.search(["hamlet", "cat"], where="page = 99", search="hybrid") == [[], []]


@pytest.mark.parametrize("where", ["page <", "nowhere = 1", "page", "", 5, "id = 'O'Hara'", "metadata > 5"])
@pytest.mark.parametrize("method", ["dense", "keyword"])
def test_a_predicate_that_is_none_is_named(plays, where, method):
    plays.add([Passage("x", text="hamlet", metadata={"year": 2001})])
    with pytest.raises(InputError, match="where="):
        plays.search("hamlet", where=where, search=method)


@pytest.mark.parametrize(
    "where",
    [
        "page<5 page>2",
        "page<5, page>2",
        "page<5; page>2",
        "page<5)",
        "page<5) OR (page>7",
        "page<5 foo",
        "page<5 AS x",
        "(page<5) a AND (page>2)",
        "page<5 LIMIT 1",
        "page<5 ORDER BY page",
        "title='Normans'; DROP TABLE x",
        "page<5 ; -- comment",
    ],
)
def test_nothing_behind_a_predicate_is_dropped(plays, where):
    with pytest.raises(InputError, match="goes on after the end of its predicate; join conditions with AND or OR"):
        plays.search("hamlet", where=where, search="keyword")


@pytest.mark.parametrize(
    "where",
    [
        "page = 3",
        "(page < 5) AND (page > 2)",
        "(page < 5 OR page > 9) AND NOT page = 4",
        "page IN (1, 2, 3)",
        "page BETWEEN 1 AND 3",
        "source LIKE '%.pdf' -- only these",
        "source LIKE 'o\\.%' ESCAPE '\\' OR page = 3",
        "document_id IS NULL",
        "title IS NOT NULL\n  AND page < 5 /* of ten */",
        "title = 'a;b) -- \"O''Hara\" AND'",
        "title != 'x; DROP TABLE y'",
        "json_get_int(metadata,'year') > 3",
        "json_get_string(metadata, 'language') = 'en'",
        "lower(text) LIKE '%hamlet%' OR false",
    ],
)
def test_all_kinds_of_predicates_are_taken(plays, where):
    title = 'a;b) -- "O\'Hara" AND'
    plays.add([Passage("x", title, "hamlet", page=3, source="o.pdf", metadata={"year": 2001, "language": "en"})])
    assert "x" in {hit.passage.id for hit in plays.search("hamlet", k=9, where=where, search="keyword")}


@pytest.mark.parametrize("where", ["metadata.year > 3", "metadata['year'] > 3", "year > 3", "metadata->'year' > 3"])
def test_a_predicate_on_metadata_learns_how_it_is_written(plays, where):
    with pytest.raises(
        InputError, match=r"metadata is looked into with json_get_int\(metadata, 'year'\) > 1990"
    ) as caught:
        plays.search("hamlet", where=where)
    assert "LargeBinary" not in str(caught.value)


@pytest.mark.parametrize("k", [0, -1, 1.5, "5", True, None])
def test_k_is_a_whole_number_of_at_least_1(plays, k):
    with pytest.raises(InputError, match="k="):
        plays.search("hamlet", k=k)


def test_questions_that_cannot_be_asked(plays):
    for questions in ("", "  \n", ["fine", ""]):
        with pytest.raises(InputError, match=r"question \d is empty"):
            plays.search(questions)
    with pytest.raises(InputError, match="must be a string"):
        plays.search([3])
    with pytest.raises(InputError, match="question 1 is not valid Unicode at character 3"):
        plays.search(["fine", "caf\udce9"])
    with pytest.raises(InputError, match="questions are missing"):
        plays.search()
    for method in ("keyword", "hybrid"):
        with pytest.raises(InputError, match=f"search='{method}' needs questions"):
            plays.search(vectors=np.ones(32), search=method)
    with pytest.raises(InputError, match="search='fuzzy' is none of dense, exact, keyword, hybrid"):
        plays.search("hamlet", search="fuzzy")
    for vectors in (np.ones(31), np.full(32, np.nan), np.full(32, np.inf), [], "hamlet"):
        with pytest.raises(InputError, match="vectors"):
            plays.search(vectors=vectors)
    with pytest.raises(InputError, match=r"vectors \(1\) and of texts \(2\) differ"):
        plays.search(["a", "b"], vectors=np.ones((1, 32)))


def test_one_question_gives_a_list_and_a_list_gives_lists(plays):
    for method in ("dense", "exact", "keyword", "hybrid"):
        one = plays.search("hamlet", k=2, search=method)
        assert plays.search(["hamlet"], k=2, search=method) == [one]
        assert plays.search(["hamlet", "hamlet"], k=2, search=method) == [one, one]
        assert plays.search([], search=method) == []
    assert plays.search(vectors=np.ones((0, 32))) == []
    vector = ToyEncoder().encode_questions(["hamlet"])
    assert plays.search(vectors=vector) == [plays.search("hamlet")]
    assert plays.search("nothing alike", vectors=vector[0]) == plays.search("hamlet")


def test_an_empty_base_finds_nothing(tmp_path, quantised):
    kb = KnowledgeBase.create(tmp_path / "kb", encoder=ToyEncoder())
    for method in ("dense", "exact", "keyword", "hybrid"):
        assert kb.search("hamlet", search=method) == []
        assert kb.search(["hamlet", "cat"], search=method) == [[], []]
    assert kb
    with pytest.raises(InputError, match="where="):
        kb.search("hamlet", where="page <")
