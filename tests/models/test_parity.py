"""transformers' own RAG classes as the second oracle: same weights, same checkpoints, same losses, same answers.

Where that implementation is wrong it is kept out of the way: its losses take ``decoder_input_ids`` with the start token in
front and targets of two tokens or more, and its search gets contexts without padding and answers of two tokens or more.
"""

import json

import pytest
import torch
import transformers

from ragstone import RagConfig, RagSequenceForGeneration, RagTokenForGeneration
from ragstone.testing import tiny_generator, tiny_question_encoder

OURS = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
THEIRS = {"token": transformers.RagTokenForGeneration, "sequence": transformers.RagSequenceForGeneration}
VOCABULARY, PASSAGES, CASES = 40, 3, 36
WEIGHTS = range(4)


def reference(method, kind, seed=0, **generator):
    """transformers' model of random weights."""
    question_encoder = tiny_question_encoder("dpr", seed=seed)
    generator = tiny_generator(kind, seed=seed, vocab_size=VOCABULARY, **generator)
    config = transformers.RagConfig.from_question_encoder_generator_configs(
        question_encoder.config,
        generator.config,
        n_docs=PASSAGES,
        decoder_start_token_id=generator.config.decoder_start_token_id,
    )
    return THEIRS[method](config=config, question_encoder=question_encoder, generator=generator).eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(theirs, ours) for a method and kind, ours loaded from the checkpoint that theirs wrote; one pair for each seed."""
    made = {}

    def get(method, kind):
        if (method, kind) not in made:
            made[method, kind] = []
            for seed in WEIGHTS:
                # Tied embeddings make BART repeat itself.
                theirs = reference(method, kind, seed, **({"tie_word_embeddings": False} if kind == "bart" else {}))
                folder = tmp_path_factory.mktemp("theirs")
                theirs.save_pretrained(folder)
                theirs.config.bos_token_id = VOCABULARY  # no token: its loss fails on T5, which has none
                made[method, kind].append((theirs, OURS[method].from_pretrained(folder)))
        return made[method, kind]

    return get


def contexts(case, batch, padded):
    """Random contexts (B·K, S) and scores (B, K)."""
    make = torch.Generator().manual_seed(case)
    ids = torch.randint(3, VOCABULARY, (batch * PASSAGES, 9), generator=make)
    lengths = torch.randint(3, 10, (batch * PASSAGES, 1), generator=make) if padded else 9
    return {
        "context_input_ids": ids,
        "context_attention_mask": (torch.arange(9).expand_as(ids) < lengths).long(),
        "doc_scores": torch.randn(batch, PASSAGES, generator=make) * 2,
    }


def labels(case, batch, pad):
    """Random targets (B, T) of two tokens or more, padded with the padding token."""
    make = torch.Generator().manual_seed(1000 + case)
    tokens = torch.randint(3, VOCABULARY, (batch, 7), generator=make)
    lengths = torch.randint(2, 8, (batch, 1), generator=make)
    return tokens.masked_fill(torch.arange(7) >= lengths, pad)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("method", OURS)
@torch.no_grad()
def test_losses_agree(pairs, method, kind):
    compared = 0
    for case in range(CASES):
        theirs, ours = pairs(method, kind)[case % len(WEIGHTS)]
        inputs, targets = contexts(case, 2, padded=True), labels(case, 2, theirs.config.generator.pad_token_id)
        start = torch.full((2, 1), theirs.config.generator.decoder_start_token_id)
        shifted = torch.cat([start, targets], dim=1)
        expected = theirs(**inputs, decoder_input_ids=shifted, labels=shifted).loss
        torch.testing.assert_close(ours(**inputs, labels=targets).nll, expected, rtol=1e-5, atol=1e-4)
        compared += len(expected)
    assert compared == 2 * CASES, f"{compared} losses compared"


@pytest.mark.parametrize("kind", ["bart", "t5"])
@torch.no_grad()
def test_smoothed_losses_of_rag_token_agree(pairs, kind):
    """RAG-Sequence's smoothing counts the prior once for each token of the vocabulary there, and is not compared."""
    for case, (theirs, ours) in enumerate(pairs("token", kind)):
        inputs, targets = contexts(case, 2, padded=True), labels(case, 2, theirs.config.generator.pad_token_id)
        shifted = torch.cat([torch.full((2, 1), theirs.config.generator.decoder_start_token_id), targets], dim=1)
        theirs.config.label_smoothing = ours.config.label_smoothing = 0.1
        try:
            expected = theirs(**inputs, decoder_input_ids=shifted, labels=shifted, reduce_loss=True).loss
            found = ours(**inputs, labels=targets, reduce_loss=True).loss
        finally:
            theirs.config.label_smoothing = ours.config.label_smoothing = 0.0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_rag_token_writes_the_same_sequences(pairs, kind, beams):
    written, compared = set(), 0
    for case in range(CASES):
        theirs, ours = pairs("token", kind)[case % len(WEIGHTS)]
        inputs = contexts(case, 2, padded=True)
        options = {"num_beams": beams, "num_return_sequences": beams, "max_length": 9}
        expected = theirs.generate(**inputs, n_docs=PASSAGES, **options)
        found = ours.generate(**inputs, **options)
        assert torch.equal(found, expected), f"case {case}: {found.tolist()} and {expected.tolist()}"
        written |= {tuple(row) for row in expected.tolist()}
        compared += len(expected)
    assert compared == 2 * beams * CASES, f"{compared} sequences compared"
    assert len(written) > compared / 4, f"only {len(written)} of {compared} sequences differ: nothing much was tested"


@pytest.mark.parametrize("beams", [3, 5])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_rag_sequence_chooses_the_same_winner(pairs, kind, beams):
    """Wherever the two best hypotheses differ by more than 1e-3."""
    winners, close = set(), 0
    for case in range(CASES):
        theirs, ours = pairs("sequence", kind)[case % len(WEIGHTS)]
        inputs = contexts(case, 1, padded=False)
        pad = theirs.config.generator.pad_token_id
        options = {"num_beams": beams, "max_length": 8, "min_new_tokens": 2, "suppress_tokens": [pad]}
        best = ours.generate(**inputs, num_return_sequences=2, return_dict_in_generate=True, **options)
        if best.log_probs[0] - best.log_probs[1] <= 1e-3:
            close += 1
            continue
        expected = theirs.generate(**inputs, n_docs=PASSAGES, **options)
        found = ours.generate(**inputs, **options)
        assert without_padding(found, pad) == without_padding(expected, pad), f"case {case}"
        winners.add(tuple(without_padding(found, pad)))
    compared = CASES - close
    assert compared >= 30, f"only {compared} winners compared"
    assert len(winners) > compared / 4, f"only {len(winners)} of {compared} winners differ: nothing much was tested"


def without_padding(sequences, pad):
    tokens = sequences[0].tolist()
    while tokens[-1] == pad:
        tokens.pop()
    return tokens


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("method", OURS)
def test_checkpoints_of_theirs_load_here_and_ours_load_there(pairs, method, kind, tmp_path):
    theirs, ours = pairs(method, kind)[0]
    assert_same_weights(theirs, ours)
    for name in ("n_docs", "title_sep", "doc_sep", "max_combined_length", "index_name", "retrieval_vector_size"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    ours.save_pretrained(tmp_path)
    back = THEIRS[method].from_pretrained(tmp_path)
    assert_same_weights(ours, back)
    assert back.config.n_docs == PASSAGES
    assert back.config.generator.to_dict() == {**theirs.config.generator.to_dict(), "dtype": "float32"}
    other = OURS["sequence" if method == "token" else "token"].from_pretrained(tmp_path)
    assert_same_weights(ours, other)


def assert_same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_tied_weights_stay_tied_both_ways(kind, tmp_path):
    theirs = reference("token", kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RagTokenForGeneration.from_pretrained(tmp_path / "theirs")
    assert ours.generator.lm_head.weight is ours.generator.get_input_embeddings().weight
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.RagTokenForGeneration.from_pretrained(tmp_path / "ours")
    assert_same_weights(theirs, back)
    assert_same_weights(theirs, RagTokenForGeneration.from_pretrained(tmp_path / "ours"))


@torch.no_grad()
def test_question_vectors_agree(pairs):
    theirs, ours = pairs("token", "bart")[0]
    ids = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 10, 11, 3]])
    expected = theirs.question_encoder(ids, attention_mask=(ids != 0).long())[0]
    torch.testing.assert_close(ours.rag.encode_questions(ids), expected)


def test_a_checkpoint_of_theirs_is_uncased_and_stays_so(tmp_path):
    reference("token", "bart").save_pretrained(tmp_path / "theirs")
    ours = RagTokenForGeneration.from_pretrained(tmp_path / "theirs")
    assert ours.config.prompt_format().lowercase_questions
    ours.save_pretrained(tmp_path / "ours")
    assert ours.config.prompt_format().lowercase_questions
    assert RagConfig.from_pretrained(tmp_path / "ours").prompt_format().lowercase_questions


@pytest.mark.parametrize("method", OURS)
def test_generation_settings_in_a_config_of_older_versions_are_honoured(method, tmp_path):
    """They stood in config.json then, inside the generator's; so did the prefix of its contexts."""
    reference(method, "bart").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["generator"] |= {"num_beams": 4, "forced_bos_token_id": 7, "max_length": 6, "prefix": "> "}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = OURS[method].from_pretrained(tmp_path)
    inputs = contexts(0, 2, padded=True)
    found = ours.generate(**inputs, return_dict_in_generate=True)
    expected = ours.generate(**inputs, num_beams=4, forced_bos_token_id=7, max_length=6, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.sequences[:, 1] == 7).all()
    assert found.sequences.shape[1] <= 6
    assert ours.generation_config.num_beams == 4
    assert ours.config.prompt_format().prefix == "> "
