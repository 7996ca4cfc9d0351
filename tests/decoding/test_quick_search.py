"""What is left out for speed changes nothing: our loop against transformers', bounds against scoring everything."""

import pytest
import torch

OPTIONS = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    {"num_beams": 2, "min_new_tokens": 3, "no_repeat_ngram_size": 2},
    {"forced_eos_token_id": 2, "num_beams": 2},
    {"prefix_allowed_tokens_fn": lambda b, tokens: range(3 + 9 * b, 15 + 9 * b)},
    {"prefix_allowed_tokens_fn": lambda b, tokens: [2, *range(3 + 9 * b, 15 + 9 * b)], "num_beams": 3},
]


def run(one, **options):
    return one.model.generate(**one.inputs, return_dict_in_generate=True, max_new_tokens=6, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_our_loop_finds_what_the_loop_of_transformers_finds(case, method, kind, options, seed):
    one = case(method, kind, batch=3, seed=seed)
    ours = run(one, **options)
    one.model.rag.fast = False
    theirs = run(one, **options)
    copies = len(ours.sequences) // 3
    for row in range(len(ours.sequences)):
        mine, other = (one.labels(out.sequences[row].tolist()) for out in (ours, theirs))
        if [t for t in mine if t != one.pad] != [t for t in other if t != one.pad]:
            # Different strings only where they are as good as each other.
            b = row // copies
            assert one.log_prob(b, mine) == pytest.approx(one.log_prob(b, other), abs=1e-3)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sharpness", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_pruning_and_stopping_early_never_change_the_winner(case, kind, sharpness, seed):
    one = case("sequence", kind, passages=6, seed=seed)
    one.inputs["doc_scores"] *= sharpness
    everything = run(one, num_beams=2, prune=False, early_stop=False)
    for options in ({}, {"prune": False}, {"early_stop": False}):
        out = run(one, num_beams=2, **options)
        torch.testing.assert_close(out.log_probs, everything.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.posteriors, everything.posteriors, rtol=1e-4, atol=1e-4)


def test_a_certain_prior_reads_one_passage(case, monkeypatch):
    one = case("sequence", "bart", batch=1, passages=6, empty=False)
    one.inputs["doc_scores"] = torch.tensor([[0.0, 0.0, 200.0, 0.0, 0.0, 0.0]])
    # A generator that is certain: its output layer is so sharp that one token has all the probability.
    one.model.generator.get_output_embeddings().weight.data *= 1000
    one.model.generate(**one.inputs, max_new_tokens=4)  # what is found out of a model at its first use
    read, encoder = [], one.model.generator.get_encoder()
    encoder.register_forward_pre_hook(lambda m, a, kw: read.append(len(kw["input_ids"])), with_kwargs=True)
    stopped = one.model.generate(**one.inputs, max_new_tokens=4)
    assert sum(read) == 1
    complete = one.model.generate(**one.inputs, max_new_tokens=4, early_stop=False)
    assert torch.equal(stopped, complete)


def test_bounds_hold_the_exact_value(case, kind):
    one = case("sequence", kind, passages=6)
    one.inputs["doc_scores"] *= 5
    loose, exact = run(one, complete=False), run(one)
    assert (loose.log_prob_bounds[:, 0] <= exact.log_probs + 1e-4).all()
    assert (loose.log_prob_bounds[:, 1] >= exact.log_probs - 1e-4).all()
    torch.testing.assert_close(exact.log_prob_bounds[:, 0], exact.log_probs, rtol=1e-4, atol=1e-4)


OPTIONS_OF_RANKING = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 3},
    {"decode": "fast", "num_beams": 2},
]


@pytest.mark.parametrize("options", OPTIONS_OF_RANKING, ids=str)
def test_the_bounds_of_a_complete_answer_are_its_log_prob(case, kind, options):
    for seed in range(3):
        out = run(case("sequence", kind, passages=5, seed=seed), **options)
        assert out.log_prob_bounds.tolist() == [[value, value] for value in out.log_probs.tolist()]


@pytest.mark.parametrize("options", OPTIONS_OF_RANKING, ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 5.0])
def test_the_bounds_of_an_incomplete_answer_begin_with_its_log_prob(case, kind, options, sharpness):
    one = case("sequence", kind, passages=9)
    one.inputs["doc_scores"] *= sharpness
    out = run(one, complete=False, **options)
    low, high = out.log_prob_bounds.T
    assert low.tolist() == out.log_probs.tolist()
    assert (low <= high).all()
    copies = len(low) // 2
    for row, sequence in enumerate(out.sequences.tolist()):
        exact = one.log_prob(row // copies, one.labels(sequence))
        assert low[row] - 1e-4 <= exact <= high[row] + 1e-4
    if "decode" in options:  # else everything may have been scored all the same
        assert (low < high).any()
