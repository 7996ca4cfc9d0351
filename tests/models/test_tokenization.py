"""Two vocabularies behind one tokenizer: questions in the question encoder's, targets in the generator's."""

import pytest
import torch
import transformers
from tokenizers import processors

from ragstone import RagConfig, RagTokenizer
from ragstone.errors import InputError, ModelError
from ragstone.testing import causal_tokenizer, question_tokenizer, seq2seq_tokenizer, tiny_rag

QUESTIONS = ["who wrote Hamlet?", "how high is Mount Everest in metres?"]
ANSWERS = ["William Shakespeare", "8,849 metres"]
GENERATORS = {"bart": seq2seq_tokenizer, "t5": lambda: seq2seq_tokenizer("t5"), "causal": causal_tokenizer}


@pytest.fixture(params=GENERATORS)
def tokenizer(request):
    return RagTokenizer(question_tokenizer(), GENERATORS[request.param]())


def closed(tokenizer, text):
    """A target as the generator's tokenizer writes it, closed by EOS."""
    ids = tokenizer.generator(text)["input_ids"]
    return ids if ids[-1] == tokenizer.generator.eos_token_id else [*ids, tokenizer.generator.eos_token_id]


def test_questions_are_in_the_question_encoders_vocabulary(tokenizer):
    assert tokenizer(QUESTIONS)["input_ids"] == tokenizer.question_encoder(QUESTIONS)["input_ids"]
    assert tokenizer(QUESTIONS[0])["input_ids"] == tokenizer.question_encoder(QUESTIONS[0])["input_ids"]
    batch = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert "labels" not in batch


def test_targets_are_in_the_generators_vocabulary(tokenizer):
    expected = [closed(tokenizer, answer) for answer in ANSWERS]
    assert tokenizer(text_target=ANSWERS)["labels"] == expected
    assert tokenizer(text_target=ANSWERS[0])["labels"] == expected[0]
    both = tokenizer(QUESTIONS, text_target=ANSWERS)
    assert both["labels"] == expected
    assert both["input_ids"] == tokenizer.question_encoder(QUESTIONS)["input_ids"]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected] == ANSWERS


def test_targets_alone_come_as_inputs_too(tokenizer):
    """transformers' tokenizers call them input_ids; those are padded with padding, labels with −100."""
    out = tokenizer(text_target=ANSWERS, padding=True, return_tensors="pt")
    lengths = [len(closed(tokenizer, answer)) for answer in ANSWERS]
    assert out["attention_mask"].sum(dim=1).tolist() == lengths
    real = out["attention_mask"].bool()
    assert (out["labels"][~real] == -100).all()
    assert (out["input_ids"][~real] == tokenizer.generator.pad_token_id).all()
    assert torch.equal(out["labels"][real], out["input_ids"][real])


def test_eos_is_appended_only_where_the_tokenizer_does_not():
    for make in GENERATORS.values():
        generator = make()
        ids = RagTokenizer(question_tokenizer(), generator).target_ids(["a b", ""])
        assert all(row[-1] == generator.eos_token_id for row in ids)
        assert all(row.count(generator.eos_token_id) == 1 for row in ids)


def test_a_causal_target_has_no_bos():
    generator = causal_tokenizer()
    generator.add_special_tokens({"bos_token": "<|im_start|>"})
    generator.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert generator("a")["input_ids"][0] == 1
    assert RagTokenizer(question_tokenizer(), generator).target_ids(["a"])[0][0] != 1


@pytest.mark.parametrize("limit", [2, 4])
def test_a_cut_target_still_ends_with_eos(tokenizer, limit):
    out = tokenizer(text_target=ANSWERS, truncation=True, max_length=limit)["labels"]
    assert [len(row) for row in out] == [limit] * 2
    assert all(row[-1] == tokenizer.generator.eos_token_id for row in out)


LONG = " ".join("a" for _ in range(600))


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"truncation": True}, 512),
        ({"truncation": "longest_first"}, 512),
        ({"truncation": True, "max_length": 9}, 9),
        ({"truncation": True, "max_target_length": 7}, 7),
        ({"max_length": 9}, 9),
        ({"truncation": "do_not_truncate", "max_length": 9}, None),
        ({"padding": True, "max_length": 9, "verbose": False}, None),
        ({}, None),
    ],
)
def test_targets_are_cut_as_questions_are(tokenizer, options, length):
    whole = len(closed(tokenizer, LONG))
    alone = tokenizer(text_target=[LONG], **options)["labels"][0]
    both = tokenizer(["a"], text_target=[LONG], **options)["labels"][0]
    assert [len(alone), len(both)] == [whole if length is None else length] * 2
    assert alone[-1] == both[-1] == tokenizer.generator.eos_token_id


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"padding": True, "pad_to_multiple_of": 32}, 32),
        ({"padding": "longest", "pad_to_multiple_of": 32}, 32),
        ({"padding": "max_length"}, 512),
        ({"padding": "max_length", "max_length": 40, "pad_to_multiple_of": 32}, 64),
        ({"padding": "do_not_pad", "pad_to_multiple_of": 32}, None),
    ],
)
def test_targets_are_padded_as_questions_are(tokenizer, options, width):
    batch = tokenizer(QUESTIONS, text_target=ANSWERS, **options)
    alone = tokenizer(text_target=ANSWERS, **options)
    lengths = [len(closed(tokenizer, answer)) for answer in ANSWERS] if width is None else [width] * 2
    for rows in (batch["labels"], alone["labels"], alone["input_ids"], alone["attention_mask"]):
        assert [len(row) for row in rows] == lengths


def test_misspelt_options_are_type_errors(tokenizer):
    for texts in ({"text": QUESTIONS}, {"text_target": ANSWERS}, {"text": QUESTIONS, "text_target": ANSWERS}):
        with pytest.raises(TypeError, match="no option trunctaion"):
            tokenizer(**texts, trunctaion=True)
        with pytest.raises(ValueError, match="PaddingStrategy"):
            tokenizer(**texts, padding="longst")
        assert tokenizer(**texts, return_attention_mask=True, verbose=False)
    with pytest.raises(TypeError, match="no option trunctaion"):
        tokenizer.prepare_seq2seq_batch(QUESTIONS, ANSWERS, trunctaion=True)


PIECES = [(piece, -2.0) for piece in "▁abcdefghijklmnopqrstuvwxyz"]
SPECIALS = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]


@pytest.mark.parametrize(("kind", "place"), [("MBartTokenizer", -1), ("MBart50Tokenizer", 0)])
def test_targets_of_mbart_carry_the_target_language(kind, place):
    generator = getattr(transformers, kind)(vocab=SPECIALS + PIECES, src_lang="en_XX", tgt_lang="de_DE")
    tokenizer = RagTokenizer(question_tokenizer(), generator)
    for options in ({}, {"truncation": True, "max_length": 4}):
        (ids,) = tokenizer(text_target=["abc"], **options)["labels"]
        assert ids[place] == generator.convert_tokens_to_ids("de_DE")
        assert ids.count(generator.eos_token_id) == 1


def test_question_and_target_as_one_batch(tokenizer):
    batch = tokenizer.prepare_seq2seq_batch(QUESTIONS, ANSWERS, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    width = max(len(closed(tokenizer, answer)) for answer in ANSWERS)
    assert batch["labels"].shape == (2, width)
    for row, answer in zip(batch["labels"].tolist(), ANSWERS, strict=True):
        ids = closed(tokenizer, answer)
        assert row == [*ids, *[-100] * (width - len(ids))]
    single = tokenizer.prepare_seq2seq_batch(QUESTIONS[0], ANSWERS[0], return_tensors="pt")
    assert single["labels"].tolist() == [closed(tokenizer, ANSWERS[0])]
    assert single["input_ids"].shape[0] == 1
    named = tokenizer.prepare_seq2seq_batch(src_texts=QUESTIONS, tgt_texts=ANSWERS, return_tensors="pt")
    assert torch.equal(named["labels"], batch["labels"])
    assert "labels" not in tokenizer.prepare_seq2seq_batch(QUESTIONS)
    assert isinstance(tokenizer.prepare_seq2seq_batch(QUESTIONS, ANSWERS)["labels"][0], list)


def test_lengths_can_be_limited_and_fixed(tokenizer):
    cut = tokenizer.prepare_seq2seq_batch(QUESTIONS, ANSWERS, max_length=5, max_target_length=3, return_tensors="pt")
    assert cut["input_ids"].shape == (2, 5)
    assert cut["labels"].shape == (2, 3)
    wide = tokenizer.prepare_seq2seq_batch(QUESTIONS, ANSWERS, max_length=90, padding="max_length", return_tensors="pt")
    assert wide["input_ids"].shape == wide["labels"].shape == (2, 90)


def test_a_prompt_goes_before_every_question_and_no_target():
    tokenizer = RagTokenizer(question_tokenizer(), seq2seq_tokenizer(), question_prompt="query: ")
    expected = tokenizer.question_encoder([f"query: {q}" for q in QUESTIONS])["input_ids"]
    assert tokenizer(QUESTIONS)["input_ids"] == expected
    assert tokenizer(QUESTIONS[0])["input_ids"] == expected[0]
    assert tokenizer.prepare_seq2seq_batch(QUESTIONS, padding=False)["input_ids"] == expected
    assert tokenizer(text_target=ANSWERS)["labels"] == [closed(tokenizer, answer) for answer in ANSWERS]


def test_decoding_is_the_generators(tokenizer):
    ids = tokenizer(text_target=ANSWERS)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ANSWERS
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == ANSWERS[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t(), "text_target"),
        (lambda t: t.prepare_seq2seq_batch(QUESTIONS, ANSWERS[:1]), "2 questions came with 1 targets"),
        (lambda t: t(text_target=["a", "a longer one"], return_tensors="pt"), "padding=True"),
    ],
)
def test_what_does_not_fit_is_named(tokenizer, call, message):
    with pytest.raises(InputError, match=message):
        call(tokenizer)


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_both_tokenizers_are_saved_and_loaded(kind, tmp_path):
    model, tokenizer = tiny_rag("token", kind, question_prompt="q: ")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {"question_encoder_tokenizer", "generator_tokenizer"}
    loaded = RagTokenizer.from_pretrained(tmp_path)
    for one in (loaded, RagTokenizer.from_pretrained(tmp_path, config=RagConfig.from_pretrained(tmp_path))):
        batches = [t.prepare_seq2seq_batch(QUESTIONS, ANSWERS, return_tensors="pt") for t in (tokenizer, one)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_transformers_reads_what_is_saved(tmp_path):
    model, tokenizer = tiny_rag("token", "bart")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.RagTokenizer.from_pretrained(tmp_path)
    assert theirs(QUESTIONS)["input_ids"] == tokenizer(QUESTIONS)["input_ids"]
    assert theirs.generator(ANSWERS)["input_ids"] == tokenizer(text_target=ANSWERS)["labels"]


def test_missing_tokenizers_and_files_in_the_way_are_named(tmp_path):
    model, tokenizer = tiny_rag("token", "bart")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="question_encoder_tokenizer"):
        RagTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config\.json is a file"):
        tokenizer.save_pretrained(tmp_path / "config.json")


def test_the_frame_of_a_target_is_what_the_empty_one_has(monkeypatch):
    labels = {"llama": [[2], [5, 2]], "bart": [[0, 2], [0, 5, 2]], "mbart": [[2, 9], [5, 2, 9]]}  # 9: the language
    tokenizer = RagTokenizer(question_tokenizer(), causal_tokenizer())
    for kind, frame in (("llama", ([], 2)), ("bart", ([0], 2)), ("mbart", ([], 2))):
        monkeypatch.setattr(tokenizer, "target_ids", lambda texts, kind=kind: labels[kind])
        assert tokenizer.target_frame() == frame
    monkeypatch.setattr(tokenizer, "target_ids", lambda texts: [[], [5]])
    with pytest.raises(InputError, match="ends answers with no token of its own"):
        tokenizer.target_frame()
