"""What every result promises: exact probabilities, posteriors that sum to 1, no trace of the batch it came in."""

import logging
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria

from ragstone import RagPipeline
from ragstone.decoding import scoring
from ragstone.errors import InputError, ModelError
from ragstone.marginal import IGNORED
from ragstone.testing import TOY_PASSAGES, tiny_rag

pytestmark = pytest.mark.filterwarnings("ignore:Passing `.*` with `inputs_embeds`")  # penalties without a prompt

SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "penalised": {"num_beams": 2, "length_penalty": 3.0, "repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
}
FAST = {"fast": {"num_beams": 2, "num_return_sequences": 2, "decode": "fast"}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def run(case, **options):
    torch.manual_seed(0)
    return case.model.generate(**case.inputs, return_dict_in_generate=True, max_new_tokens=5, **options)


def counted(one, sequence):
    """The labels that count: generated padding does not, nor is it told from what fills a batch."""
    return [token for token in one.labels(sequence) if token == one.eos or token != one.pad]


def searches(method):
    return SEARCHES | (FAST if method == "sequence" else {})


def test_probabilities_and_posteriors_are_those_of_the_definition(case, method, kind):
    one = case(method, kind)
    for name, options in searches(method).items():
        out = run(one, **options)
        copies = len(out.sequences) // 2
        for row, sequence in enumerate(out.sequences.tolist()):
            b, tokens = row // copies, one.labels(sequence)
            assert float(out.log_probs[row]) == pytest.approx(one.log_prob(b, tokens), abs=1e-4), name
            torch.testing.assert_close(out.posteriors[row].double(), one.posterior(b, tokens), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.posteriors.sum(dim=1), torch.ones(len(out.sequences)))


def test_answers_end_with_the_tokens_that_the_call_names(case, method, kind):
    one = case(method, kind)
    ends = {"eos_token_id": one.labels(run(one).sequences[0].tolist())[1], "pad_token_id": 39}
    asked = replace(one, eos=ends["eos_token_id"], pad=39)
    for named in ({"eos_token_id": asked.eos}, ends, {"generation_config": GenerationConfig(**ends)}):
        now = replace(asked, pad=named.get("pad_token_id", 39 if "generation_config" in named else one.pad))
        for options in searches(method).values():
            out = run(one, **named, **options)
            copies = len(out.sequences) // 2
            for row, sequence in enumerate(out.sequences.tolist()):
                b, tokens = row // copies, now.labels(sequence)
                assert float(out.log_probs[row]) == pytest.approx(now.log_prob(b, tokens), abs=1e-4), (named, options)
                assert int(out.scored[row].sum()) == sum(t == now.eos or t != now.pad for t in tokens)


class EndsWith(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **options):
        return input_ids[:, -1] == self.token


def test_what_a_criterion_of_the_caller_ends_has_no_padding_in_it(case, method):
    one = case(method, "gpt2", vocabulary=8)  # where padding is EOS, which counts
    (first, *_), *_ = run(one).sequences.tolist()
    stops = {"stopping_criteria": [EndsWith(first)]}
    both, alone = run(one, **stops), run(one.of(0), **stops)
    assert float(both.log_probs[0]) == pytest.approx(float(alone.log_probs[0]), abs=1e-5)
    assert both.scored[0].sum() == alone.scored[0].sum()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_a_generator_of_nan_is_said_to_be_one(case, method, kind, options):
    one = case(method, kind)
    one.model.generator.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="logits hold NaN"):
        run(one, **options)


@pytest.mark.parametrize("fast", [True, False])
def test_what_only_fills_up_beams_is_no_answer(case, method, fast):
    one = case(method, "bart")
    one.model.rag.fast = fast
    for forced in ({"forced_bos_token_id": 3}, {"forced_eos_token_id": one.eos}):
        torch.manual_seed(0)
        out = one.model.generate(
            **one.inputs, max_new_tokens=1, num_beams=4, num_return_sequences=2, return_dict_in_generate=True, **forced
        )
        assert out.scored.any(dim=1).all()
        for row, sequence in enumerate(out.sequences.tolist()):
            assert float(out.log_probs[row]) == pytest.approx(one.log_prob(row // 2, one.labels(sequence)), abs=1e-4)


@pytest.mark.parametrize("wrong", [{"num_beam": 1}, {"do_smaple": False}, {"min_new_token": 0}], ids=str)
def test_misspelt_options_are_errors_whatever_their_value(case, method, wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        run(case(method), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_beams": 0},
        {"num_beams": 2.0},
        {"num_return_sequences": 0},
        {"early_stopping": "soon"},
        {"generation_config": {"num_beams": 2}},
        {"encoder_no_repeat_ngram_size": 1},
        {"prompt_lookup_num_tokens": 1},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(case, method, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        run(case(method), **wrong)


def test_options_that_change_nothing_may_be_given(case, method):
    one = case(method)
    neutral = {"encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "guidance_scale": 1, "num_beam_groups": 1}
    assert torch.equal(run(one, **neutral).sequences, run(one).sequences)
    with pytest.raises(ValueError, match="strictly positive"):
        run(one, repetition_penalty=0.0)


def test_an_answer_may_end_with_a_string(method):
    model, tokenizer = tiny_rag(method, "gpt2")
    case = {
        "context_input_ids": torch.arange(5, 11).view(1, 6),
        "context_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "doc_scores": torch.zeros(1, 1),
    }
    whole = model.generate(**case, max_new_tokens=6)[0].tolist()
    string = tokenizer.generator.decode([whole[1]])
    ended = model.generate(**case, max_new_tokens=6, stop_strings=[string], tokenizer=tokenizer.generator)[0].tolist()
    assert ended == whole[: len(ended)]
    assert len(ended) <= 2


def test_probabilities_and_posteriors_are_those_of_forward(case, method, kind):
    """Every sequence, given back as labels, gets the NLL and the posteriors that generating it reported."""
    # T5's logits of order 1, so that 1e-5 is above the noise of float32.
    one = case(method, kind, **({"initializer_factor": 0.5} if kind == "t5" else {}))
    for options in searches(method).values():
        out = run(one, **options)
        copies = len(out.sequences) // 2
        for row, sequence in enumerate(out.sequences.tolist()):
            labels = torch.tensor([one.labels(sequence)])
            alone = one.of(row // copies)
            with torch.no_grad():
                scored = one.model(**alone.inputs, labels=labels)
            torch.testing.assert_close(scored.nll, -out.log_probs[row : row + 1], **CLOSE)
            posteriors, by_token = one.model.posteriors(scored)
            torch.testing.assert_close(posteriors[0], out.posteriors[row], **CLOSE)
            if method == "token":
                length = labels.shape[1]
                torch.testing.assert_close(by_token[0], out.token_posteriors[row, :, :length], **CLOSE)
                assert out.token_posteriors[row, :, length:].abs().sum() == 0
            real = ~torch.isneginf(alone.inputs["doc_scores"][0])  # an empty slot is not read
            torch.testing.assert_close(
                scored.token_log_probs[0, real], out.token_log_probs[row, real, : labels.shape[1]], **CLOSE
            )


@pytest.mark.parametrize(
    ("method", "search"),
    [(m, s) for m in ("token", "sequence") for s in ("greedy", "beams", "penalised")] + [("sequence", "fast")],
)
def test_a_question_gets_the_same_answer_in_any_batch(case, method, kind, search):
    one = case(method, kind, batch=4)
    options = searches(method)[search]
    out = run(one, **options)
    copies = len(out.sequences) // 4
    for b in range(4):
        alone = run(one.of(b), **options)
        rows = slice(b * copies, (b + 1) * copies)
        assert [counted(one, s) for s in out.sequences[rows].tolist()] == [
            counted(one, s) for s in alone.sequences.tolist()
        ]
        torch.testing.assert_close(out.log_probs[rows], alone.log_probs, **CLOSE)
        torch.testing.assert_close(out.posteriors[rows], alone.posteriors, **CLOSE)


def test_an_answer_lies_within_its_own_bounds(method):
    """The bounds of a pipeline's answers, to the last bit."""
    texts = [text for _, text in TOY_PASSAGES[:5]]
    rag = RagPipeline(*tiny_rag(method, "llama"))
    answer = rag("who wrote hamlet?", passages=texts, num_beams=3, num_return_sequences=3, max_new_tokens=8)
    assert len(answer.alternatives) == 2
    for one in (answer, *answer.alternatives):
        assert one.log_prob_bounds == (one.log_prob, one.log_prob)


def test_a_neighbour_that_needs_a_wider_search_changes_nothing(case):
    """Three passages often find two hypotheses, one passage never does: its search is widened, its neighbours' is not."""
    one = case("sequence", "gpt2", batch=6, seed=1)
    one.inputs["doc_scores"][5, 1:] = -torch.inf
    out = run(one, num_return_sequences=2)
    for b in range(6):
        alone = run(one.of(b), num_return_sequences=2)
        assert [one.labels(s) for s in out.sequences[2 * b : 2 * b + 2].tolist()] == [
            one.labels(s) for s in alone.sequences.tolist()
        ]


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_of_contexts_changes_nothing(case, method, kind, padding):
    one = case(method, kind)
    wide = {**one.inputs}
    for name in ("context_input_ids", "context_attention_mask"):
        left = torch.nn.functional.pad(one.inputs[name], (padding, 0))
        wide[name] = torch.nn.functional.pad(left, (0, 4))
    expected, ours = (
        one.model.generate(**inputs, max_new_tokens=4, num_beams=2, return_dict_in_generate=True)
        for inputs in (one.inputs, wide)
    )
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.log_probs, expected.log_probs, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_every_context_is_encoded_once(case, method, kind, options):
    one = case(method, kind)
    generator = one.model.generator
    reader = generator.get_encoder() if generator.config.is_encoder_decoder else generator
    run(one, **options)  # what is found out of a model at its first use
    mask, read = one.inputs["context_attention_mask"], []
    texts = [tuple(ids[m.bool()].tolist()) for ids, m in zip(one.inputs["context_input_ids"], mask, strict=True)]
    if method == "sequence" and "do_sample" not in options:
        texts.pop()  # an empty slot is never read

    def hook(module, args, kwargs):
        if kwargs["input_ids"].shape == kwargs["attention_mask"].shape:  # else these are new tokens
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            read.extend(tuple(ids[m.bool()].tolist()) for ids, m in rows)

    handle = reader.register_forward_pre_hook(hook, with_kwargs=True)
    run(one, **options)
    handle.remove()
    assert sorted(read) == sorted(texts)


def test_always_as_many_rows_as_asked_for(case, method, kind):
    one = case(method, kind)
    for options in ({"num_beams": 4, "num_return_sequences": 4}, {"do_sample": True, "num_return_sequences": 5}):
        out = run(one, **options)
        rows = 2 * options["num_return_sequences"]
        assert {len(value) for value in (out.sequences, out.log_probs, out.posteriors)} == {rows}


def test_only_the_sequences_are_returned_unless_more_is_asked_for(case, method):
    one = case(method)
    plain = one.model.generate(**one.inputs, max_new_tokens=5)
    assert torch.equal(plain, run(one).sequences)
    config = GenerationConfig(return_dict_in_generate=True, max_new_tokens=5)
    assert torch.equal(one.model.generate(**one.inputs, generation_config=config).sequences, plain)


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_the_generators_generation_config_is_taken_over(case, method, kind):
    one = case(method, kind)
    by_hand = run(one, num_beams=3, num_return_sequences=2, min_new_tokens=4, forced_eos_token_id=one.eos)
    own = one.model.generator.generation_config
    own.num_beams, own.num_return_sequences, own.min_new_tokens = 3, 2, 4
    own.forced_eos_token_id = one.eos
    assert one.model.generation_config is own
    taken = run(one)
    assert torch.equal(taken.sequences, by_hand.sequences)
    torch.testing.assert_close(taken.log_probs, by_hand.log_probs)
    # An option beats a config that is passed, and that one beats the generator's own where it says anything.
    config = GenerationConfig(num_beams=4, num_return_sequences=4)
    assert len(run(one, generation_config=config).sequences) == 8
    assert len(run(one, generation_config=config, num_return_sequences=1).sequences) == 2
    passed = run(one, generation_config=GenerationConfig(num_beams=3))
    torch.testing.assert_close(passed.log_probs, by_hand.log_probs)


def test_forced_tokens_are_written(case, method):
    one = case(method, "bart")
    out = run(one, forced_bos_token_id=7, forced_eos_token_id=2)
    assert (out.sequences[:, 1] == 7).all()
    for sequence in out.sequences.tolist():
        assert one.labels(sequence)[-1] == 2


def test_forced_tokens_are_beyond_a_constraint(case, method):
    one = case(method, "bart")
    options = {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "num_beams": 3, "num_return_sequences": 3}
    out = run(one, prefix_allowed_tokens_fn=lambda b, tokens: [9, 10, 11], **options)
    for b in range(2):
        sequences = {tuple(row) for row in out.sequences[3 * b : 3 * b + 3].tolist()}
        assert len(sequences) == 3
        for sequence in sequences:
            assert sequence[:2] == (2, 7)
            assert sequence[-1] == 2
            assert set(sequence[2:-1]) <= {9, 10, 11}


def test_the_generation_config_is_saved_and_loaded(case, method, tmp_path):
    one = case(method, "bart")
    one.model.generation_config.update(num_beams=3, forced_bos_token_id=7, max_new_tokens=4)
    one.model.save_pretrained(tmp_path)
    loaded = type(one.model).from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == one.model.generation_config.to_dict()
    assert torch.equal(loaded.generate(**one.inputs), one.model.generate(**one.inputs))
    assert loaded.generator.generation_config.forced_bos_token_id == 7


def test_generated_padding_is_scored_like_padding_in_labels(case, method):
    """A model may write its padding token; forward never scores it, so neither do results."""
    one = case(method, "bart")
    out = run(one, prefix_allowed_tokens_fn=lambda b, tokens: [7] if len(tokens) % 2 else [1])
    assert out.sequences[0].tolist() == [2, 7, 1, 7, 1, 7]
    labels = out.sequences[:, 1:]
    with torch.no_grad():
        expected = one.model(**one.inputs, labels=labels)
    assert expected.scored.tolist() == [[True, False, True, False, True]] * 2
    torch.testing.assert_close(out.log_probs, -expected.nll, **CLOSE)


def test_behind_the_end_nothing_is_scored_where_padding_is_eos(case, method):
    one = case(method, "llama")
    out = run(one, prefix_allowed_tokens_fn=lambda b, tokens: [0] if len(tokens) > 1 + b else [7])
    assert out.sequences.tolist() == [[7, 7, 0, 0], [7, 7, 7, 0]]
    labels = out.sequences.clone()
    labels[0, 3] = IGNORED
    with torch.no_grad():
        expected = one.model(**one.inputs, labels=labels)
    torch.testing.assert_close(out.log_probs, -expected.nll, **CLOSE)


def test_a_generator_may_have_several_ends(case, method, kind):
    """The first of them closes the answer and is scored; what fills the row behind it is not."""
    one = case(method, kind)
    one.model.generation_config.eos_token_id = [one.eos, 8]
    out = run(one, prefix_allowed_tokens_fn=lambda b, tokens: [8] if len(tokens) > 2 + b else [7])
    start = int(one.model.config.is_encoder_decoder)
    for b in range(2):
        tokens = [7] * (3 + b - start) + [8]
        assert out.sequences[b, start : start + len(tokens)].tolist() == tokens
        assert out.log_probs[b].item() == pytest.approx(one.log_prob(b, tokens), abs=1e-4)


def test_ordinary_decoding_logs_nothing(case, method, kind, caplog):
    with caplog.at_level(logging.INFO):
        run(case(method, kind), num_beams=2)
    assert caplog.text == ""


def test_scores_do_not_depend_on_how_they_are_batched(case, method, kind, monkeypatch):
    """One pair of a sequence and a passage a call, or as many as fit."""
    one = case(method, kind, batch=3)
    one.model.rag.fast = False  # else RAG-Token has nothing to score
    options = {"num_beams": 3, "num_return_sequences": 3}
    together = run(one, **options)
    calls = record_scoring(one, monkeypatch)
    monkeypatch.setattr(scoring, "TOKENS_PER_CALL", 1)
    apart = run(one, **options)
    assert {rows for rows, _ in calls} == {1}
    assert apart.sequences.tolist() == together.sequences.tolist()
    torch.testing.assert_close(apart.log_probs, together.log_probs, **CLOSE)
    torch.testing.assert_close(apart.token_log_probs, together.token_log_probs, **CLOSE)


def test_a_short_sequence_is_not_padded_to_a_long_one_of_another_call(case, kind, monkeypatch):
    one = case("sequence", kind)
    generator = one.model.rag.adapter()
    contexts = one.model.rag.contexts(one.model.rag.prepare(**one.inputs))
    start = [] if generator.start_token_id is None else [generator.start_token_id]
    fill, eos = generator.fill_token_id, next(iter(generator.eos_token_ids))
    word = next(t for t in range(3, 20) if t not in (fill, eos))
    short, long = [*start, eos, fill, fill, fill], [*start, word, word, word, eos]
    calls = record_scoring(one, monkeypatch)
    scoring.score_pairs(contexts, torch.tensor([0, 0]), torch.tensor([short, long]))
    assert calls == [(1, 4), (1, 1)]


def record_scoring(one, monkeypatch):
    """(rows, labels) of every call that scores sequences from now on."""
    calls, adapter = [], type(one.model.rag.adapter())
    score = adapter.target_log_probs

    def recorded(self, contexts, rows, sequences, counts):
        calls.append(tuple(counts.shape))
        return score(self, contexts, rows, sequences, counts)

    monkeypatch.setattr(adapter, "target_log_probs", recorded)
    return calls
