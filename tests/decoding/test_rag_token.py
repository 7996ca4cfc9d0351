"""RAG-Token: ordinary search over the marginal, against recomputing every step and against all strings."""

import logging

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ragstone.decoding import marginal_search
from ragstone.errors import InputError


def run(case, **options):
    return case.model.generate(**case.inputs, return_dict_in_generate=True, **options)


def greedy_by_hand(case, b, length):
    tokens = []
    while len(tokens) < length and case.eos not in tokens:
        tokens.append(int(case.next_token(b, tokens).argmax()))
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_the_best_marginal_token_of_every_step(case, kind, seed):
    one = case("token", kind, seed=seed)
    out = run(one, max_new_tokens=8)
    for b in range(2):
        assert one.labels(out.sequences[b].tolist()) == greedy_by_hand(one, b, 8)


@pytest.mark.parametrize("seed", range(2))
def test_wide_beams_find_the_best_strings_of_all(case, kind, seed):
    one = case("token", kind, seed=seed, vocabulary=5)
    out = run(one, max_new_tokens=3, num_beams=25, num_return_sequences=6, length_penalty=0.0, output_scores=True)
    for b in range(2):
        best = sorted((one.log_prob(b, string) for string in one.strings(5, 3)), reverse=True)[:6]
        found = out.log_probs[6 * b : 6 * b + 6].double()
        torch.testing.assert_close(found, torch.tensor(best).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.sequences_scores[6 * b : 6 * b + 6].double(), found, rtol=1e-5, atol=1e-5)
        strings = {tuple(one.labels(row)) for row in out.sequences[6 * b : 6 * b + 6].tolist()}
        assert len(strings) == 6


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3},
        {"num_beams": 1, "num_return_sequences": 4},
        {"num_beams": 2, "num_return_sequences": 5, "length_penalty": 2.0},
    ],
    ids=str,
)
def test_there_are_as_many_beams_as_sequences_at_least(case, kind, fast, options):
    one = case("token", kind)
    one.model.rag.fast = fast
    count = options["num_return_sequences"]
    out, asked = run(one, max_new_tokens=5, **options), run(one, max_new_tokens=5, **{**options, "num_beams": count})
    assert out.sequences.tolist() == asked.sequences.tolist()
    assert out.log_probs.tolist() == asked.log_probs.tolist()
    for b in range(2):
        found = [tuple(one.labels(row)) for row in out.sequences[count * b : count * (b + 1)].tolist()]
        assert len(set(found)) == len(found) == count
        exact = torch.tensor([one.log_prob(b, tokens) for tokens in found]).double()
        torch.testing.assert_close(out.log_probs[count * b : count * (b + 1)].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_many_sequences_are_the_best_of_all_strings(case, kind, fast):
    one = case("token", kind, vocabulary=5)
    one.model.rag.fast = fast
    out = run(one, max_new_tokens=2, num_return_sequences=12, length_penalty=0.0)
    for b in range(2):
        best = sorted((one.log_prob(b, string) for string in one.strings(5, 2)), reverse=True)[:12]
        found = out.log_probs[12 * b : 12 * b + 12].double()
        torch.testing.assert_close(found, torch.tensor(best).double(), rtol=1e-5, atol=1e-5)


def test_a_generation_config_may_ask_for_several_sequences(case):
    one = case("token")
    expected = run(one, max_new_tokens=4, num_return_sequences=3).sequences
    config = GenerationConfig(max_new_tokens=4)
    config.num_return_sequences = 3
    assert torch.equal(run(one, generation_config=config).sequences, expected)
    one.model.generator.generation_config.num_return_sequences = 3
    assert torch.equal(run(one, max_new_tokens=4).sequences, expected)


def test_samples_are_drawn_with_the_beams_that_were_asked_for(case, monkeypatch):
    seen = []
    search = marginal_search._transformers_search
    monkeypatch.setattr(
        marginal_search, "_transformers_search", lambda *a: (seen.append(a[-1].get("num_beams")), search(*a))[1]
    )
    assert len(run(case("token"), max_new_tokens=2, do_sample=True, num_return_sequences=3).sequences) == 6
    assert seen == [None]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 7}], ids=str)
def test_the_last_of_too_few_strings_is_repeated_with_a_warning(case, kind, fast, options, caplog):
    """Question 0 has two strings, question 1 three."""
    one = case("token", kind)
    one.model.rag.fast = fast
    allowed = [[5, 6], [5, 6, 7]]
    with caplog.at_level(logging.WARNING, "ragstone"):
        out = run(
            one,
            num_return_sequences=5,
            max_new_tokens=1,
            output_scores=not fast,
            prefix_allowed_tokens_fn=lambda b, tokens: allowed[b],
            **options,
        )
    assert "5 of 10 sequences repeat another" in caplog.text
    for b, tokens in enumerate(allowed):
        best = sorted(tokens, key=lambda token: -one.log_prob(b, [token]))
        best += [best[-1]] * (5 - len(best))
        assert out.sequences[5 * b : 5 * b + 5, -1].tolist() == best
        exact = torch.tensor([one.log_prob(b, [token]) for token in best]).double()
        torch.testing.assert_close(out.log_probs[5 * b : 5 * b + 5].double(), exact, rtol=1e-5, atol=1e-4)
    if not fast:
        torch.testing.assert_close(out.sequences_scores, out.log_probs, rtol=1e-5, atol=1e-4)


def test_beams_score_no_less_than_greedy_does(case, kind):
    one = case("token", kind)
    greedy = run(one, max_new_tokens=6, min_new_tokens=6)
    beams = run(one, max_new_tokens=6, min_new_tokens=6, num_beams=8)
    assert (beams.log_probs >= greedy.log_probs - 1e-5).all()


def test_sampling_draws_from_the_marginal(case, kind):
    """The first token of 4,000 samples, against its exact distribution: no frequency is off by five standard errors."""
    one = case("token", kind, vocabulary=6, batch=2)
    torch.manual_seed(0)
    count = 4000
    out = run(one, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=count)
    for b in range(2):
        exact = one.next_token(b, []).exp()
        first = out.sequences[b * count : (b + 1) * count, -1]
        seen = torch.bincount(first, minlength=6).double() / count
        assert ((seen - exact).abs() <= 5 * (exact * (1 - exact) / count).sqrt() + 1e-9).all()


def test_samples_repeat_with_the_seed_and_differ_without(case):
    one = case("token")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(run(one, max_new_tokens=6, do_sample=True, num_return_sequences=3).sequences)
    assert drawn[0].shape[0] == 6
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_constraints_are_asked_with_the_number_of_the_question(case, kind, options):
    """Question 0 may only write tokens 5 to 9, question 1 only 10 to 14."""
    one = case("token", kind, batch=2)
    out = run(
        one,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=lambda b, tokens: list(range(5 + 5 * b, 10 + 5 * b)),
        **options,
    )
    copies = options.get("num_return_sequences", 1)
    for row, sequence in enumerate(out.sequences.tolist()):
        b = row // copies
        assert set(one.labels(sequence)) <= set(range(5 + 5 * b, 10 + 5 * b))


def test_a_constraint_with_fewer_strings_than_beams_is_kept_all_the_same(case, kind, caplog):
    one = case("token", kind)
    with caplog.at_level(logging.WARNING, "ragstone"):
        out = run(
            one,
            num_beams=12,
            num_return_sequences=12,
            max_new_tokens=1,
            prefix_allowed_tokens_fn=lambda b, tokens: [5, 6],
        )
    assert set(out.sequences[:, -1].tolist()) == {5, 6}
    for b in range(2):
        best = [one.log_prob(b, [token]) for token in (5, 6)]
        assert out.log_probs[12 * b].item() == pytest.approx(max(best), abs=1e-4)


def test_constraints_see_the_tokens_written_so_far(case, kind):
    one = case("token", kind)
    seen = []

    def allowed(b, tokens):
        seen.append(tokens.tolist())
        return [7]

    start = [one.model.generation_config.decoder_start_token_id] if one.model.config.is_encoder_decoder else []
    run(one.of(0), max_new_tokens=3, prefix_allowed_tokens_fn=allowed)
    assert seen == [start, [*start, 7], [*start, 7, 7]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_new_tokens_are_counted_without_start_and_prompt(case, kind, options):
    one = case("token", kind)
    start = int(one.model.config.is_encoder_decoder)
    assert run(one, max_new_tokens=5, min_new_tokens=5, **options).sequences.shape[1] == start + 5
    longer = run(one, max_new_tokens=9, min_new_tokens=7, **options).sequences
    assert start + 7 <= longer.shape[1] <= start + 9


def test_sequences_begin_with_the_start_token_only_where_there_is_a_decoder(case, kind):
    one = case("token", kind)
    sequences = run(one, max_new_tokens=2).sequences
    if one.model.config.is_encoder_decoder:
        assert (sequences[:, 0] == one.model.generation_config.decoder_start_token_id).all()
    else:
        assert sequences.shape[1] <= 2


class Ban(LogitsProcessor):
    """Forbids one token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


def test_logits_processors_shape_the_search_and_not_the_probabilities(case, kind):
    one = case("token", kind)
    best = one.labels(run(one, max_new_tokens=4).sequences[0].tolist())[0]
    out = run(one, max_new_tokens=4, logits_processor=[Ban(best)])
    tokens = one.labels(out.sequences[0].tolist())
    assert best not in tokens
    assert float(out.log_probs[0]) == pytest.approx(one.log_prob(0, tokens), abs=1e-4)


def test_stopping_criteria_stop(case, kind):
    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 2 + start)

    one = case("token", kind)
    start = int(one.model.config.is_encoder_decoder)
    assert run(one, max_new_tokens=9, min_new_tokens=9, stopping_criteria=[AfterTwo()]).sequences.shape[1] == start + 2


def test_a_streamer_gets_every_token(case, kind):
    class Collect(BaseStreamer):
        tokens, ended = (), False

        def put(self, value):
            self.tokens += tuple(value.flatten().tolist())

        def end(self):
            self.ended = True

    one, streamer = case("token", kind).of(0), Collect()
    sequences = one.model.generate(**one.inputs, max_new_tokens=4, streamer=streamer)
    assert streamer.tokens == tuple(sequences[0].tolist())
    assert streamer.ended


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_a_streamer_is_for_one_beam(case, options):
    with pytest.raises(InputError, match=rf"streamer cannot be used with .*{next(iter(options))}=[23]"):
        run(case("token").of(0), streamer=BaseStreamer(), **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_scores_and_logits_of_every_step(case, kind, options):
    one = case("token", kind)
    out = run(one, max_new_tokens=3, min_new_tokens=3, output_scores=True, output_logits=True, **options)
    assert len(out.scores) == len(out.logits) == 3
    beams = options.get("num_beams", 1)
    for step in out.logits:
        assert step.shape == (2 * beams, 40)
        torch.testing.assert_close(step.exp().sum(dim=1), torch.ones(2 * beams))
    for b in range(2):
        torch.testing.assert_close(out.logits[0][b * beams].double(), one.next_token(b, []), rtol=1e-4, atol=1e-4)
    assert (out.beam_indices is not None) == (beams > 1)


def test_a_prefix_can_be_given(case):
    one = case("token")
    prefix = torch.tensor([[2, 7, 8], [2, 9, 10]])
    out = run(one, max_new_tokens=3, decoder_input_ids=prefix)
    assert torch.equal(out.sequences[:, :3], prefix)
    tokens = [7, 8, *greedy_from(one, 0, [7, 8], 3)]
    assert one.labels(out.sequences[0].tolist()) == tokens
    assert float(out.log_probs[0]) == pytest.approx(one.log_prob(0, tokens), abs=1e-4)


def greedy_from(case, b, tokens, length):
    new = []
    while len(new) < length and case.eos not in new:
        new.append(int(case.next_token(b, [*tokens, *new]).argmax()))
    return new


@pytest.mark.parametrize(
    "unsupported",
    [
        {"inputs_embeds": torch.zeros(1, 1, 16)},
        {"encoder_outputs": (torch.zeros(1),)},
        {"output_hidden_states": True},
        {"generation_config": GenerationConfig(output_attentions=True)},
        {"guidance_scale": 2.0},
    ],
)
def test_options_without_a_meaning_are_refused_by_name(case, unsupported):
    name = next(iter(unsupported)).replace("generation_config", "output_attentions")
    with pytest.raises(InputError, match=name):
        run(case("token"), max_new_tokens=2, **unsupported)


def test_neutral_values_of_unsupported_options_pass(case):
    run(case("token"), max_new_tokens=2, guidance_scale=1.0, output_attentions=False, encoder_no_repeat_ngram_size=0)


def test_misspelt_options_are_an_error(case, method):
    with pytest.raises(TypeError, match="max_new_tokns"):
        run(case(method), max_new_tokns=3)


def test_padding_that_is_eos_draws_no_warning(case, caplog):
    logging.Logger.warning_once.cache_clear()  # transformers' own, which would be silent the second time
    transformers.logging.enable_propagation()
    try:
        run(case("token", "llama"), max_new_tokens=2)
    finally:
        transformers.logging.disable_propagation()
    assert caplog.text == ""
