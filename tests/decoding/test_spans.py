"""Extractive answers: what may be written is every span of the passages and nothing else."""

import json
import logging
from itertools import pairwise

import pytest
import torch

from ragstone import KnowledgeBase, RagPipeline, RagTokenizer
from ragstone.decoding import Spans
from ragstone.errors import InputError
from ragstone.testing import (
    TOY_PASSAGES,
    causal_tokenizer,
    question_tokenizer,
    seq2seq_tokenizer,
    tiny_rag,
    toy_passages,
)

TEXTS = {
    "plain": "Paris is the capital of France.",
    "punctuation": 'In 1995 (the "Well-Known" year), $5.3 million; it\'s 62-acre',
    "spaces": "  two\n\n  lines\tand   gaps ",
    "unicode": "Ærøskøbing – naïve 😀 Čapek’s",
    "wide": "東京 is 日本の首都",
    "marks": "हिन्दी and cafe\u0301s",
    "repeated": "a b a b a c",
}
TOKENIZERS = {
    "bart": lambda: seq2seq_tokenizer("bart"),
    "t5": lambda: seq2seq_tokenizer("t5"),
    "causal": causal_tokenizer,
    "bert": question_tokenizer,
}


def spans_of(text):
    """By definition: from an edge to an edge, where an edge is anywhere but inside a word, white space squeezed."""
    text = " ".join(text.split())
    edges = [n for n in range(len(text) + 1) if n in (0, len(text)) or not inside(text[n - 1], text[n])]
    return {text[i:j] for i in edges for j in edges if i < j and text[i] != " " and text[j - 1] != " "}


def inside(before, after):
    wide = "東京日本の首都"
    if after in "\u0301\u094d\u0940\u093f":  # a mark belongs to the letter before it
        return True
    return all((c.isalnum() or c in "\u0301\u094d\u0940\u093f") and c not in wide for c in (before, after))


def accepts(spans, tokens):
    return all(token in spans.next_tokens(tokens[:n]) for n, token in enumerate(tokens))


def written(spans, budget):
    """All that can be written with so many tokens between opening and end."""
    going, done = [list(spans.opening)], []
    for _ in range(budget + 1):
        going = [[*tokens, token] for tokens in going for token in spans.next_tokens(tokens)]
        done += [tokens[len(spans.opening) : -1] for tokens in going if tokens[-1] == spans.end]
        going = [tokens for tokens in going if tokens[-1] != spans.end]
    return done


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_span_can_be_written_as_the_target_it_is_trained_as(name, text):
    """All but those that end within punctuation, which a tokenizer may join to what follows."""
    tokenizer = TOKENIZERS[name]()
    rag = RagTokenizer(question_tokenizer(), tokenizer)
    spans = Spans(tokenizer, ["Something else.", text], *rag.target_frame())
    whole = " ".join(text.split())
    for span in spans_of(text):
        target = rag.target_ids([span])[0]
        behind = {whole[n + len(span) :][:1] for n in range(len(whole)) if whole.startswith(span, n)}
        if tokenizer.unk_token_id not in target and (span[-1].isalnum() or behind <= {" ", ""}):
            assert accepts(spans, target), span


@pytest.mark.parametrize("name", ["bart", "t5", "causal"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_but_spans_can_be_written(name, text):
    tokenizer = TOKENIZERS[name]()
    spans = Spans(tokenizer, [text, "Something else."], *RagTokenizer(question_tokenizer(), tokenizer).target_frame())
    every = spans_of(text) | spans_of("Something else.")
    found = [tokenizer.decode(tokens) for tokens in written(spans, 12)]
    assert found
    assert set(found) <= every


def test_no_span_goes_on_in_the_next_text():
    tokenizer = causal_tokenizer()
    spans = Spans(tokenizer, ["one two", "three"], [], 0)
    assert accepts(spans, [*tokenizer.encode("one two"), 0])
    assert not accepts(spans, [*tokenizer.encode("two three"), 0])
    assert spans.next_tokens(tokenizer.encode("two")) == [0]


def test_where_there_is_nothing_to_quote_an_answer_is_empty():
    spans = Spans(causal_tokenizer(), ["", " \n"], [], 0)
    assert spans.next_tokens([]) == [0]
    assert spans.next_tokens([5, 6]) == [0]


def test_of_a_long_text_only_so_many_words_count():
    tokenizer = causal_tokenizer()
    spans = Spans(tokenizer, ["word " * 1_000_000 + "end"], [], 0, limit=5)
    assert sum(token == -1 for token in spans._tokens) == 1
    assert len(spans._tokens) < 30


def test_a_tokenizer_without_offsets_is_named():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="fast tokenizer, and Slow is none; set extractive=False"):
        Spans(Slow(), ["text"], [], 0)


@pytest.fixture
def rag(method, kind, tmp_path):
    model, tokenizer = tiny_rag(method, kind, seed=3, n_docs=3)
    base = KnowledgeBase.create(tmp_path / "kb", encoder=None, width=16)
    pipeline = RagPipeline(model, tokenizer, base)
    base.add(toy_passages(), vectors=pipeline.retriever.encode_passages(toy_passages()))
    return pipeline


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 3}, {"num_return_sequences": 3}, {"do_sample": True}]
)
def test_an_extractive_answer_stands_in_a_passage(rag, options):
    questions = ["who wrote hamlet?", "how high is everest?"]
    free = rag(questions, max_new_tokens=20, extractive=False, **options)
    for answer in rag(questions, max_new_tokens=20, extractive=True, **options):
        texts = [t for e in answer.passages for t in (e.passage.title, e.passage.text)]
        for each in (answer, *answer.alternatives):
            assert each.text
            assert any(each.text in text for text in texts)
    assert not all(any(a.text in e.passage.text for e in a.passages) for a in free)  # else nothing was tested


@pytest.mark.parametrize("fast", [True, False])
def test_a_passage_with_fewer_spans_than_answers_repeats_the_last(rag, fast, caplog):
    rag.model.rag.fast = fast
    with caplog.at_level(logging.WARNING, "ragstone"):
        first, second = rag(
            ["who?", "what?"], passages=[["pi"], ["pi is"]], extractive=True, num_return_sequences=4, max_new_tokens=12
        )
    for answer, spans in ((first, {"pi"}), (second, {"pi", "is", "pi is"})):
        texts = [answer.text, *(other.text for other in answer.alternatives)]
        assert len(texts) == 4
        assert set(texts) == spans
        assert len(set(texts[: len(spans)])) == len(spans)
    assert "repeat" in caplog.text


def test_the_greedy_answer_by_definition(kind, tmp_path):
    """Token by token the most probable that begins a span, of all spans written out."""
    model, tokenizer = tiny_rag("token", kind, seed=5)
    pipeline = RagPipeline(model, tokenizer)
    passages = [text for _, text in TOY_PASSAGES[:3]]
    answer = pipeline("what is it?", passages=passages, extractive=True, max_new_tokens=8)
    spans = sorted(set().union(*map(spans_of, passages)))
    targets = [tuple(target) for target in tokenizer.target_ids(spans)]
    prepared = pipeline._prepare(
        pipeline.retriever, ["what is it?"], 3, "dense", None, "dense", [[*answer_hits(answer)]]
    )
    said = ()
    while len(said) < 8 and (not said or said[-1] != pipeline.tokenizer.generator.eos_token_id):
        allowed = sorted({t[len(said)] for t in targets if t[: len(said)] == said and len(t) > len(said)})
        rows = torch.tensor([[*said, token] for token in allowed])
        scores = []
        for row in rows:
            with torch.no_grad():
                out = model(**prepared.inputs, labels=row[None], output_logits=True)
            scores.append(float(out.logits[0, -1, row[-1]]))
        said = (*said, allowed[scores.index(max(scores))])
    assert tokenizer.generator.decode(said, skip_special_tokens=True).strip() == answer.text


def answer_hits(answer):
    from ragstone.pipeline import _as_hits

    return _as_hits([e.passage for e in answer.passages])


def test_probabilities_are_the_model_s_own(rag):
    answer = rag("who wrote hamlet?", max_new_tokens=20, extractive=True)
    if answer.tokens[-1] == rag.tokenizer.generator.eos_token:
        assert answer.log_prob == pytest.approx(answer.score_of(answer.text).log_prob, abs=1e-4)
    assert sum(e.posterior for e in answer.passages) == pytest.approx(1, abs=1e-5)


def test_the_config_decides_unless_the_caller_does(tmp_path):
    model, tokenizer = tiny_rag("token", "llama", seed=3, extractive=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["extractive"] is True
    rag = RagPipeline.from_pretrained(tmp_path)
    texts = [text for _, text in TOY_PASSAGES[:3]]
    ask = {"passages": texts, "max_new_tokens": 6}
    assert rag("who?", **ask).text == rag("who?", extractive=True, **ask).text
    assert rag("who?", **ask).text != rag("who?", extractive=False, **ask).text
    only = rag("who?", prefix_allowed_tokens_fn=lambda b, tokens: [7], **ask)
    assert set(only.tokens) == {tokenizer.generator.decode([7])}
    with pytest.raises(InputError, match="leave one out"):
        rag("who?", extractive=True, prefix_allowed_tokens_fn=lambda b, tokens: [7], **ask)


def test_streams_are_extractive_too(rag):
    texts = [text for _, text in TOY_PASSAGES[:3]]
    pieces = list(rag.stream("who?", passages=texts, extractive=True, max_new_tokens=8))
    whole = "".join(pieces) if rag.method == "token" else pieces[-1]
    assert any(whole.strip() in text for text in texts)
    if rag.method == "sequence":
        assert all(any(piece in text for text in texts) for _, piece in pairwise(pieces))
