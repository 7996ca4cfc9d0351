"""Pooling against its definition, checkpoints of every kind, batching, and what happens to damaged ones."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    DPRReader,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ragstone import RagPipeline, local
from ragstone.encoders import (
    POOLINGS,
    Encoder,
    EncoderSpec,
    embed,
    fingerprint,
    load_backbone,
    load_encoder,
    pool,
    precision,
    read_encoder_settings,
)
from ragstone.errors import InputError, MissingExtraError, ModelError

SENTENCE = "a city river bridge was built in by the old king hamlet wrote who queen tower of glass salt wool"
WORDS = SENTENCE.split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BERT = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "initializer_range": 0.5, **SHAPE}
SETTINGS_OF_SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "sentence_bert_config.json": {"max_seq_length": 9},
    "config_sentence_transformers.json": {"prompts": {"query": "who ", "document": "the "}},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAGSTONE_CACHE", str(folder))
    return folder


def save(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
        BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def write(folder: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(BertModel(BertConfig(**BERT)), tmp_path / "bert")


def some_texts(n: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=int(generator.integers(1, 30)))) for _ in range(n)]


# --- pooling ---


def test_pooling_by_hand() -> None:
    states = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])  # padded on the right, and on the left
    pooler = torch.full((2, 3), 7.0)
    assert pool(states, mask, "cls").tolist() == [[0, 1, 2], [18, 19, 20]]
    assert pool(states, mask, "last_token").tolist() == [[6, 7, 8], [21, 22, 23]]
    assert pool(states, mask, "mean").tolist() == [[3, 4, 5], [19.5, 20.5, 21.5]]
    assert pool(None, mask, "pooler", pooler).tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_leaves_padding_out_whatever_it_holds(pooling: str) -> None:
    states = torch.randn(3, 5, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    filled = states.masked_fill(~mask.bool().unsqueeze(-1), float("nan"))
    vectors = pool(filled, mask, pooling, states[:, 0])
    assert vectors[2].tolist() == [0, 0, 0, 0]  # no token at all
    vectors.sum().backward()
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


def test_pooling_averages_half_precision_in_float32() -> None:
    states = torch.full((1, 3000, 1), 1.001, dtype=torch.bfloat16)
    vectors = pool(states, torch.ones(1, 3000), "mean")
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, states[:, 0].float())
    assert pool(states.double(), torch.ones(1, 3000), "mean").dtype == torch.float64


def test_pooling_that_is_unknown_or_has_no_output() -> None:
    with pytest.raises(InputError, match="'max' is unknown"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "max")
    with pytest.raises(ModelError, match="choose 'mean'"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "pooler")
    with pytest.raises(ModelError, match="choose 'pooler'"):
        pool(None, torch.ones(1, 1), "mean")


def test_embed_passes_gradient_and_normalizes() -> None:
    model = BertModel(BertConfig(**BERT))
    ids, mask = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    vectors = embed(model, ids, mask, pooling="mean", normalize=True)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    vectors[:, 0].sum().backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


# --- checkpoints ---


@pytest.mark.parametrize("encoder_class", [DPRContextEncoder, DPRQuestionEncoder])
@pytest.mark.parametrize("projection", [0, 6])
def test_dpr_loads_as_what_it_was_saved_as(tmp_path: Path, encoder_class: type, projection: int) -> None:
    model = encoder_class(DPRConfig(**BERT, projection_dim=projection)).eval()
    encoder = load_encoder(save(model, tmp_path / "dpr"), dtype="float32")
    assert type(encoder.model) is encoder_class
    assert encoder.width == projection or SHAPE["hidden_size"]
    assert (encoder.spec.pooling, encoder.spec.normalize, encoder.spec.template) == ("pooler", False, "pair")
    inputs = encoder.tokenizer(["hamlet"], ["who wrote the old king"], return_tensors="pt")
    assert inputs["token_type_ids"].sum() > 0
    expected = model(**inputs).pooler_output.detach().numpy()
    np.testing.assert_allclose(encoder.encode_passages([("hamlet", "who wrote the old king")]), expected, atol=1e-6)


def test_dpr_reader_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks .* weights"):
        load_encoder(save(DPRReader(DPRConfig(**BERT)), tmp_path / "reader"))


def test_t5_uses_its_encoder_only(tmp_path: Path) -> None:
    config = T5Config(vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    encoder = load_encoder(save(model, tmp_path / "t5"), dtype="float32")
    assert type(encoder.model).__name__ == "T5EncoderModel"
    ids = torch.tensor([encoder.tokenizer("who wrote hamlet")["input_ids"]])
    expected = model.get_encoder()(input_ids=ids).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(encoder.encode_questions(["who wrote hamlet"]), expected.detach().numpy(), atol=1e-6)
    whole = embed(model, ids, pooling="mean", normalize=False)  # the whole model in memory gives the same
    torch.testing.assert_close(whole, expected)


def test_causal_model_with_last_token(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=64, num_key_value_heads=1, **SHAPE)
    model = LlamaModel(config).eval()
    encoder = load_encoder(save(model, tmp_path / "llama"), dtype="float32", pooling="last_token", normalize=True)
    texts = some_texts(5)
    expected = [model(torch.tensor([encoder.tokenizer(text)["input_ids"]])).last_hidden_state[0, -1] for text in texts]
    vectors = torch.nn.functional.normalize(torch.stack(expected), dim=-1).detach().numpy()
    np.testing.assert_allclose(encoder.encode_questions(texts), vectors, atol=1e-5)


def test_roberta_positions_start_after_the_padding_index(tmp_path: Path) -> None:
    model = RobertaModel(RobertaConfig(**{**BERT, "pad_token_id": 1, "max_position_embeddings": 20}))
    encoder = load_encoder(save(model, tmp_path / "roberta"), dtype="float32")
    assert encoder.spec.max_length == 18
    assert np.isfinite(encoder.encode_questions(["city " * 50])).all()


def test_pooler_without_weights_is_dropped_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "mlm")
    assert load_encoder(folder).spec.fingerprint == load_encoder(folder).spec.fingerprint
    with pytest.raises(ModelError, match="no output for pooling 'pooler'"):
        load_encoder(folder, pooling="pooler")


def test_settings_of_sentence_transformers(bert: Path) -> None:
    write(bert, SETTINGS_OF_SENTENCE_TRANSFORMERS)
    encoder = load_encoder(bert, dtype="float32")
    spec = encoder.spec
    assert (spec.pooling, spec.normalize, spec.max_length) == ("cls", True, 9)
    assert (spec.question_prompt, spec.passage_prompt) == ("who ", "the ")
    plain = load_encoder(bert, dtype="float32", question_prompt="", passage_prompt="")
    np.testing.assert_array_equal(
        encoder.encode_questions(["wrote hamlet"]), plain.encode_questions(["who wrote hamlet"])
    )
    np.testing.assert_array_equal(
        encoder.encode_passages([("king", "a b")]), plain.encode_passages([("the king", "a b")])
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"word_embedding_dimension": 16}, "mean"),
    ],
)
def test_pooling_in_the_old_and_new_form(bert: Path, config: dict[str, object], expected: str) -> None:
    write(bert, SETTINGS_OF_SENTENCE_TRANSFORMERS | {"1_Pooling/config.json": config})
    assert read_encoder_settings(bert).pooling == expected


def test_steps_that_are_not_done_here(bert: Path) -> None:
    write(bert, SETTINGS_OF_SENTENCE_TRANSFORMERS | {"1_Pooling/config.json": {"pooling_mode": "max"}})
    with pytest.raises(ModelError, match="pools by max"):
        read_encoder_settings(bert)
    assert read_encoder_settings(bert, pooling="mean").pooling == "mean"
    write(bert, {"modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]})
    with pytest.raises(ModelError, match="module Dense"):
        read_encoder_settings(bert)


def test_transformer_in_a_subfolder_and_lower_case(bert: Path) -> None:
    old = bert.parent / "old"
    shutil.copytree(bert, old / "0_Transformer")
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    write(old, {"modules.json": modules, "0_Transformer/sentence_bert_config.json": {"do_lower_case": True}})
    encoder = load_encoder(old, dtype="float32")
    assert encoder.tokenizer.backend_tokenizer.normalizer.normalize_str("ÀB") == "ab"
    np.testing.assert_allclose(
        encoder.encode_questions(["who"]), load_encoder(bert, dtype="float32").encode_questions(["who"]), atol=1e-6
    )


def test_fingerprint_follows_the_weights_only(bert: Path) -> None:
    moved = bert.parent / "moved"
    model = load_backbone(bert)
    model.save_pretrained(moved)
    assert fingerprint(load_backbone(moved, dtype=torch.bfloat16)) == fingerprint(model) == fingerprint(model)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 3] += 0.1
    assert fingerprint(load_backbone(moved)) != fingerprint(model)


def test_spec_survives_json(bert: Path) -> None:
    spec = load_encoder(bert).spec
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict())) | {"later": 1}) == spec
    with pytest.raises(InputError, match="fingerprint"):
        EncoderSpec.from_dict({"name": "x"})


# --- encoding ---


def test_order_is_restored_and_batches_do_not_matter(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(bert, dtype="float32")
    texts = some_texts(60)
    alone = np.concatenate([encoder.encode_questions([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode_questions(texts), alone, atol=1e-5)
    monkeypatch.setattr("ragstone.encoders.encoder._CHUNK", 7)
    monkeypatch.setattr("ragstone.encoders.encoder._CPU_BATCH_TOKENS", 100)
    done: list[int] = []
    pairs = [("", text) for text in texts]
    vectors = encoder.encode_passages(pairs, progress=done.append)
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert vectors.dtype == np.float32
    assert sum(done) == 60
    np.testing.assert_array_equal(encoder.encode_passages(pairs), vectors)  # the same every time


def test_empty_things(bert: Path) -> None:
    encoder = load_encoder(bert, dtype="float32")
    assert encoder.encode_passages([]).shape == (0, 16)
    assert encoder.encode_questions([]).shape == (0, 16)
    title, text, both = encoder.encode_passages([("king", ""), ("", "king"), ("", "")])
    np.testing.assert_array_equal(title, text)
    assert np.isfinite(both).all()


def test_text_without_any_token_gives_zeros(bert: Path) -> None:
    encoder = load_encoder(bert, dtype="float32", normalize=True)
    encoder.tokenizer.backend_tokenizer.post_processor = None  # adds no [CLS], as many causal models' tokenizers
    vectors = encoder.encode_questions(["", "king"])
    assert vectors[0].tolist() == [0.0] * 16
    assert encoder.encode_questions([""]).tolist() == [[0.0] * 16]


def test_only_the_beginning_of_a_huge_text_is_tokenized(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(bert, dtype="float32", max_length=8)
    seen: list[int] = []
    tokenizer = encoder.tokenizer

    def spy(texts: list[str], *args: object, **kwargs: object) -> object:
        seen.extend(len(text) for text in texts)
        return tokenizer(texts, *args, **kwargs)

    monkeypatch.setattr(encoder, "tokenizer", spy)
    spy.pad_token_id = 0  # type: ignore[attr-defined]
    huge = "city river " * 1_000_000
    np.testing.assert_allclose(encoder.encode_questions([huge]), encoder.encode_questions([huge[:500]]), atol=1e-6)
    assert max(seen) <= 8 * 20


def test_encoding_leaves_training_mode_alone(bert: Path) -> None:
    encoder = load_encoder(bert, dtype="float32")
    expected = encoder.encode_questions(["king"])
    encoder.model.train()
    np.testing.assert_array_equal(encoder.encode_questions(["king"]), expected)  # without dropout
    assert encoder.model.training


def test_in_memory_model_gives_the_same_as_its_folder(bert: Path) -> None:
    loaded = load_encoder(bert, dtype="float32")
    built = Encoder.from_parts(
        load_backbone(bert).train(), loaded.tokenizer, read_encoder_settings(bert), name=loaded.spec.name
    )
    assert built.spec == loaded.spec
    np.testing.assert_array_equal(built.encode_questions(["king"]), loaded.encode_questions(["king"]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_a_saved_encoder_is_the_same_here_and_in_sentence_transformers(
    bert: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    library = pytest.importorskip("sentence_transformers")
    settings = {"pooling": pooling, "normalize": normalize, "question_prompt": "who ", "passage_prompt": "the "}
    encoder = load_encoder(bert, dtype="float32", **settings)
    encoder.save(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved", dtype="float32")
    assert asdict(again.spec) == {**asdict(encoder.spec), "name": again.spec.name}
    expected = encoder.encode_passages([("a", "b c"), ("", "d")])
    np.testing.assert_allclose(again.encode_passages([("a", "b c"), ("", "d")]), expected, atol=1e-6)
    there = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(there.encode(["a\nb c", "d"], prompt_name="document"), expected, atol=1e-5)


def test_parity_with_sentence_transformers_on_the_local_model() -> None:
    library = pytest.importorskip("sentence_transformers")
    try:
        folder = local.encoder_folder()
    except MissingExtraError:
        pytest.skip("the local encoder is not installed")
    pairs = [("Hamlet", "A tragedy by Shakespeare."), ("", "Trade in wool made the city rich. " * 60), ("Salt", "")]
    texts = ["Hamlet\nA tragedy by Shakespeare.", "Trade in wool made the city rich. " * 60, "Salt"]
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(texts)
    encoder = load_encoder("local", dtype="float32", device="cpu")
    assert encoder.spec.name == "local"
    np.testing.assert_allclose(encoder.encode_passages(pairs), expected, atol=1e-5)
    copied = load_encoder(folder, dtype="float32", device="cpu")
    assert copied.spec.fingerprint == encoder.spec.fingerprint


# --- precision ---


@pytest.mark.parametrize(
    ("speedup", "cosine", "expected"),
    [(2.0, 0.9999, torch.bfloat16), (1.2, 0.9999, torch.float32), (2.0, 0.99, torch.float32)],
)
def test_default_dtype_is_what_the_probe_found(
    bert: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, cosine: float, expected: torch.dtype
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(precision, "probe", lambda *args: (calls.append(1), (speedup, cosine))[1])
    busy = itertools.count(step=1000)
    with monkeypatch.context() as disturbed:
        disturbed.setattr(precision, "_work_of_others", lambda: next(busy))
        assert load_encoder(bert, device="cpu").dtype == expected
    monkeypatch.setattr(precision, "_work_of_others", lambda: 0.0)
    assert load_encoder(bert, device="cpu").dtype == expected  # measured again, since other work disturbed the first
    assert load_encoder(bert, device="cpu", dtype="auto").dtype == expected  # from the cache
    assert len(calls) == 2
    shutil.rmtree(cache)
    cache.write_text("")  # a cache folder that cannot be written stops nothing
    assert load_encoder(bert, device="cpu").dtype == expected


def test_work_of_others_leaves_out_this_process_and_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  600 100 200 9000 500 40 60 0 0 0\ncpu0 1 2 3 4 5 6 7 0 0 0\n")
    monkeypatch.setattr(precision, "_STAT", stat)
    monkeypatch.setattr(precision.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(precision.os, "times", lambda: os.times_result((2.5, 0.5, 7.0, 7.0, 99.0)))
    assert precision._work_of_others() == pytest.approx(10.0 - 3.0)
    stat.write_text("nothing\n")
    assert precision._work_of_others() == 0.0
    stat.unlink()
    assert precision._work_of_others() == 0.0


def test_probe_measures(bert: Path) -> None:
    model = load_backbone(bert)
    ids = torch.randint(5, len(VOCABULARY), (4, 16))
    speedup, cosine = precision.probe(model, lambda model: embed(model, ids, pooling="mean", normalize=False))
    assert speedup > 0
    assert 0.9 < cosine <= 1.0001
    assert model.dtype == torch.float32


def test_dtype_asked_for(bert: Path) -> None:
    assert load_encoder(bert, dtype="bfloat16").encode_questions(["king"]).dtype == np.float32
    assert load_encoder(bert, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="'int8' is unknown"):
        load_encoder(bert, dtype="int8")


# --- faults ---


def test_missing_and_damaged_checkpoints_are_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "hub_is_reachable", lambda: False)
    with pytest.raises(ModelError, match="'no/such-model' is neither a folder"):
        load_encoder("no/such-model")
    empty = bert.parent / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_encoder(empty)
    weights = bert / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"weights of the encoder .* cannot be read"):
        load_encoder(bert)
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights of the encoder .* cannot be read"):
        load_encoder(bert)
    (bert / "modules.json").write_text("[")
    with pytest.raises(ModelError, match=r"modules\.json cannot be read as JSON"):
        load_encoder(bert)


def test_weights_of_another_model_are_refused(bert: Path, tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    shutil.copy(tmp_path / "t5" / "model.safetensors", bert / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks .* weights of a BertModel"):
        load_encoder(bert)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_encoder(save(BertModel(BertConfig(**BERT)), tmp_path / "bare", tokenizer=False))


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    small = save(BertModel(BertConfig(**{**BERT, "vocab_size": 8})), tmp_path / "small")
    with pytest.raises(ModelError, match=r"gives token .* knows only 8"):
        load_encoder(small, dtype="float32").encode_questions(["wool"])


def test_values_that_are_not_finite_are_reported(bert: Path) -> None:
    encoder = load_encoder(bert, dtype="float32")
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[VOCABULARY.index("king")] = float("nan")
    with pytest.raises(ModelError, match=r"not finite for 'old king' in torch\.float32"):
        encoder.encode_questions(["city", "old king"])


def test_wrong_arguments(bert: Path) -> None:
    encoder = load_encoder(bert, dtype="float32")
    with pytest.raises(InputError, match="Passage 1 is"):
        encoder.encode_passages([("a", "b"), ("a", None)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="list of questions"):
        encoder.encode_questions("who")
    with pytest.raises(InputError, match="A question is None"):
        encoder.encode_questions([None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="max_length is 0"):
        load_encoder(bert, max_length=0)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(InputError, match=f"The device '{device}' cannot be used here .*'cpu' always can"):
        load_encoder("local", device=device)
    with pytest.raises(InputError, match=f"The device '{device}' cannot be used here"):
        RagPipeline.from_pretrained("local", device=device)
