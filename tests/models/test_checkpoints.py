"""Putting models together, saving, loading, moving them."""

import json
import pickle
import shutil
import threading

import pytest
import torch
import transformers

from ragstone import RagConfig, RagModel, RagSequenceForGeneration, RagTokenForGeneration
from ragstone.errors import InputError, ModelError
from ragstone.testing import GENERATORS, ToyRetriever, tiny_generator, tiny_question_encoder, tiny_rag

CLASSES = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
QUESTIONS = ["who wrote Hamlet?", "what is the capital of France?"]
build = RagTokenForGeneration.from_pretrained_question_encoder_generator


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def parts(tmp_path):
    """Folders of a question encoder and of generators."""
    tiny_question_encoder().save_pretrained(tmp_path / "encoder")
    tiny_question_encoder("dpr").save_pretrained(tmp_path / "dpr")
    for kind in ("bart", "llama"):
        tiny_generator(kind).save_pretrained(tmp_path / kind)
    return tmp_path


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("method", CLASSES)
def test_a_saved_and_moved_model_is_the_same(method, kind, tmp_path):
    model, tokenizer = tiny_rag(
        method, kind, n_docs=3, score_scale=2.0, prompt_system="Be brief.", question_prompt="q: "
    )
    model.save_pretrained(tmp_path / "here")
    tokenizer.save_pretrained(tmp_path / "here")
    assert {f.suffix for f in (tmp_path / "here").iterdir() if f.is_file()} == {".json", ".safetensors"}
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded = CLASSES[method].from_pretrained(tmp_path / "there")
    assert same_weights(model, loaded)
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert {k: v for k, v in after.items() if k != "_name_or_path"} == {
        k: v for k, v in before.items() if k != "_name_or_path"
    }
    again = type(tokenizer).from_pretrained(tmp_path / "there")
    assert again.question_prompt == "q: "
    outputs = []
    for m, t in ((model, tokenizer), (loaded, again)):
        m.set_retriever(ToyRetriever(m.config, t))
        options = {"questions": QUESTIONS, "max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True}
        outputs.append(m.generate(**options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].log_probs, outputs[1].log_probs)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("method", CLASSES)
def test_a_pickled_model_answers_the_same(method, kind, tmp_path):
    model, tokenizer = tiny_rag(method, kind)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    options = {"questions": QUESTIONS, "max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True}
    expected = model.generate(**options)
    torch.save(model, tmp_path / "model.pt")
    for other in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)):
        found = other.generate(**options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("by_part", [False, True], ids=["model", "generator"])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_vocabulary_that_was_resized_is_saved_and_loaded(kind, by_part, tmp_path):
    model, _ = tiny_rag("token", kind)
    before = model.get_input_embeddings().weight.shape[0]
    assert (model.generator if by_part else model).resize_token_embeddings(before + 3).num_embeddings == before + 3
    model.generator.config.pad_token_id = 7
    model.question_encoder.resize_token_embeddings(99)
    contexts = {"context_input_ids": torch.tensor([[5, before + 2], [6, 7]]), "doc_scores": torch.zeros(1, 2)}
    inputs = {**contexts, "context_attention_mask": torch.ones(2, 2), "labels": torch.tensor([[5, before + 1]])}
    expected = model(**inputs).nll
    model.save_pretrained(tmp_path)
    loaded = RagTokenForGeneration.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    torch.testing.assert_close(loaded(**inputs).nll, expected)
    assert loaded.generator.config.pad_token_id == 7
    sizes = [(m.config.question_encoder.vocab_size, m.config.generator.vocab_size) for m in (model, loaded)]
    assert sizes == [(99, before + 3)] * 2


def test_new_input_embeddings_are_the_generators():
    model, _ = tiny_rag("token", "gpt2")
    model.set_input_embeddings(embeddings := torch.nn.Embedding(50, 16))
    assert model.generator.get_input_embeddings() is embeddings


def test_nothing_of_this_machine_is_written(parts, tmp_path):
    model = build(parts / "encoder", parts / "bart")
    model.save_pretrained(tmp_path / "rag")
    for file in (tmp_path / "rag").glob("*.json"):
        assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize("method", CLASSES)
def test_either_class_loads_either_checkpoint_and_so_does_the_body(method, tmp_path):
    model, _ = tiny_rag(method)
    model.save_pretrained(tmp_path)
    for kind in CLASSES.values():
        assert same_weights(kind.from_pretrained(tmp_path), model)
    body = RagModel.from_pretrained(tmp_path)
    assert same_weights(body, model.rag)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [CLASSES[method].__name__]


def test_weights_have_the_names_that_checkpoints_have():
    names = tiny_rag("token", "bart", question_encoder="dpr")[0].state_dict()
    assert {name.split(".")[0] for name in names} == {"rag"}
    assert {name.split(".")[1] for name in names} == {"question_encoder", "generator"}


@pytest.mark.parametrize("kind", ["t5", "t5 encoder", "dpr context encoder", "distilbert", "bert without pooler"])
def test_any_encoder_can_ask(kind, tmp_path):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = {
        "t5": lambda: transformers.T5Model(transformers.T5Config(**small)),
        "t5 encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**small)),
        "dpr context encoder": lambda: transformers.DPRContextEncoder(transformers.DPRConfig(**bert, vocab_size=300)),
        "bert without pooler": lambda: transformers.BertModel(
            transformers.BertConfig(**bert, vocab_size=300), add_pooling_layer=False
        ),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=300)
        ),
    }[kind]()
    encoder.save_pretrained(tmp_path / "encoder")
    tiny_generator().save_pretrained(tmp_path / "generator")
    model = build(tmp_path / "encoder", tmp_path / "generator")
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = (ids != 0).long()
    vectors = model.rag.encode_questions(ids, mask)
    assert vectors.shape == (2, 16)
    torch.testing.assert_close(vectors[:1], model.rag.encode_questions(ids[:1, :3], mask[:1, :3]), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "rag")
    loaded = RagTokenForGeneration.from_pretrained(tmp_path / "rag")
    assert same_weights(model, loaded)
    torch.testing.assert_close(loaded.rag.encode_questions(ids, mask), vectors)


def test_parts_from_folders_know_how_they_are_pooled(parts):
    assert build(parts / "encoder", parts / "bart").config.pooling == "mean"
    assert build(parts / "dpr", parts / "llama").config.pooling == "pooler"
    model = build(parts / "encoder", parts / "bart", n_docs=7, question_encoder_pooling="cls")
    assert (model.config.n_docs, model.config.pooling) == (7, "cls")
    assert not model.training


def test_a_whole_config_can_be_given(parts):
    config = build(parts / "encoder", parts / "bart", n_docs=2).config
    assert build(parts / "encoder", parts / "bart", config=config).config is config
    with pytest.raises(TypeError, match="n_docs"):
        build(parts / "encoder", parts / "bart", config=config, n_docs=3)


def test_options_of_a_part_reach_it(parts):
    assert build(parts / "encoder", parts / "bart", generator_dropout=0.3).generator.config.dropout == 0.3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_dosc": 3}, TypeError, "n_dosc"),
        ({"generator_droput": 0.1}, TypeError, "droput"),
        ({"generator": "nowhere"}, ModelError, "nowhere"),
        ({"encoder": "nowhere"}, ModelError, "nowhere"),
        ({"generator": "encoder"}, ModelError, "lacks 6 weights of a BertLMHeadModel"),
        ({"generator": None}, InputError, "generator"),
        ({"encoder": None}, InputError, "question encoder"),
        ({"n_docs": 0}, InputError, "n_docs is 0"),
        ({"score_scale": -1.0}, InputError, r"score_scale is -1\.0"),
        ({"keyword_scale": float("nan")}, InputError, r"keyword_scale is nan"),
        ({"dtype": "float33"}, InputError, "float33"),
    ],
)
def test_what_does_not_fit_is_named(parts, options, error, message):
    names = [options.pop("encoder", "encoder"), options.pop("generator", "bart")]
    with pytest.raises(error, match=message):
        build(*(None if name is None else parts / name for name in names), **options)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model, _ = tiny_rag()
    weights = {name: value for name, value in model.state_dict().items() if "encoder.layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match=r"lacks \d+ weights, such as .*layers\.1"):
        RagTokenForGeneration.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="nowhere"):
        RagTokenForGeneration.from_pretrained(tmp_path / "nowhere")


def test_options_beside_a_built_part_are_refused(parts):
    with pytest.raises(TypeError, match="generator_dropout"):
        build(parts / "encoder", generator_model=tiny_generator(), generator_dropout=0.1)


def test_a_model_needs_a_config_or_both_parts():
    with pytest.raises(InputError, match="RagConfig"):
        RagTokenForGeneration(generator=tiny_generator())
    model = RagTokenForGeneration(question_encoder=tiny_question_encoder("dpr"), generator=tiny_generator())
    assert model.config.pooling == "pooler"


def test_a_model_built_from_its_config_has_fresh_weights_of_the_same_shapes():
    model, _ = tiny_rag("token", "gpt2")
    fresh = RagTokenForGeneration(model.config)
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_and_device_are_those_asked_for(parts, dtype):
    model = build(parts / "encoder", parts / "bart", dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", GENERATORS)
def test_bfloat16_answers_stay_close(kind):
    """Log-probabilities of a fixed target, in float32 and in bfloat16 (8 bits: some 1% of the logits)."""
    model, tokenizer = tiny_rag("sequence", kind)
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    labels = tokenizer(text_target=["Paris", "Pi"], padding=True, return_tensors="pt")["labels"]
    with torch.no_grad():
        found = model(questions=QUESTIONS, n_docs=3, labels=labels, output_retrieved=True)
        contexts = {
            "context_input_ids": found.context_input_ids,
            "context_attention_mask": found.context_attention_mask,
            "doc_scores": found.doc_scores,
        }
        half = model.to(torch.bfloat16)(**contexts, labels=labels)
    assert half.nll.dtype == torch.float32
    torch.testing.assert_close(half.nll, found.nll, rtol=0.15, atol=0.5)


def test_the_retriever_can_be_passed_and_is_no_part_of_the_weights(tmp_path):
    model, tokenizer = tiny_rag()
    model.save_pretrained(tmp_path)
    retriever = ToyRetriever(model.config, tokenizer)
    retriever.held = threading.Lock()  # such things cannot be copied
    loaded = RagTokenForGeneration.from_pretrained(tmp_path, retriever=retriever)
    assert loaded.retriever is retriever
    assert same_weights(loaded, model)
    assert loaded(questions=QUESTIONS, n_docs=2).doc_scores.shape == (2, 2)


def test_configs_of_both_libraries_read_each_other(tmp_path):
    model, _ = tiny_rag("token", "bart", question_encoder="dpr", prompt_system="x")
    model.config.save_pretrained(tmp_path)
    theirs = transformers.RagConfig.from_pretrained(tmp_path)
    assert theirs.generator.d_model == 16
    theirs.save_pretrained(tmp_path / "again")
    ours = RagConfig.from_pretrained(tmp_path / "again")
    assert ours.prompt_system == "x"
    assert ours.generator.to_dict() == model.config.generator.to_dict()


def test_a_config_of_transformers_will_do(tmp_path):
    model, tokenizer = tiny_rag("token", "bart", question_encoder="dpr")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.RagConfig.from_pretrained(tmp_path, n_docs=3)
    loaded = RagTokenForGeneration.from_pretrained(tmp_path, config=theirs)
    assert type(loaded.config) is RagConfig
    assert loaded.config.n_docs == 3
    assert same_weights(loaded, model)
    assert type(RagModel(theirs).config) is RagConfig
    assert type(tokenizer).from_pretrained(tmp_path, config=theirs).decode([5]) == tokenizer.decode([5])
    with pytest.raises(InputError, match="config is a BartConfig"):
        RagModel(theirs.generator)


@pytest.mark.parametrize(
    ("encoder", "generator", "message"),
    [("bert", "gpt2", "question_encoder is a 'bert'.*'dpr'"), ("dpr", "gpt2", "generator is a 'gpt2'.*'bart'")],
)
def test_a_part_of_another_family_than_the_config_says_is_refused(encoder, generator, message):
    config = tiny_rag("token", "bart", question_encoder="dpr")[0].config
    parts = {"question_encoder_model": tiny_question_encoder(encoder), "generator_model": tiny_generator(generator)}
    with pytest.raises(InputError, match=message):
        build(config=config, **parts)


def test_contexts_are_no_longer_than_the_generator_can_read():
    config = tiny_rag("token", "bart", max_combined_length=9999)[0].config
    config.generator.max_position_embeddings = 100
    assert config.prompt_format().max_length == 100
    causal = tiny_rag("token", "llama")[0].config
    assert causal.max_combined_length == 1024
    causal.generator.max_position_embeddings = 512
    assert causal.prompt_format().max_length == 512 - 64  # an answer must have room as well
    assert tiny_rag("token", "t5", max_combined_length=9999)[0].config.prompt_format().max_length == 9999


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"There is no folder './nowhere'; name that of a RAG model"):
        RagConfig.load("./nowhere")
    with pytest.raises(ModelError, match=r"There is no folder '.*absent'"):
        RagTokenForGeneration.from_pretrained(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"holds no config\.json; name the folder of a RAG model"):
        RagConfig.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelError, match=r"its training has not ended: run the same command with --resume"):
        RagTokenForGeneration.from_pretrained(tmp_path)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("kind", CLASSES.values())
def test_a_checkpoint_is_loaded_in_the_dtype_that_is_asked_for_or_it_was_saved_in(kind, saved, tmp_path):
    model, _ = tiny_rag("token", "bart")
    model.to(dtype=saved).save_pretrained(tmp_path)
    assert {p.dtype for p in kind.from_pretrained(tmp_path).parameters()} == {saved}
    for asked in DTYPES:
        loaded = kind.from_pretrained(tmp_path, dtype=str(asked).removeprefix("torch."), device="cpu")
        assert {p.dtype for p in loaded.parameters()} == {asked}
    model.generator.to(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert (loaded.generator.dtype, loaded.question_encoder.dtype) == (torch.float32, saved)


@pytest.mark.parametrize("options", [{"dtype": "int7"}, {"device": "gpu9"}])
def test_a_dtype_or_device_that_is_none_is_named(options, tmp_path):
    tiny_rag("token", "bart")[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"int7|gpu9"):
        RagTokenForGeneration.from_pretrained(tmp_path, **options)
