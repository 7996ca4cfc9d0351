"""RAG-Sequence: thorough, fast and ancestral decoding, each against its definition."""

import logging

import pytest
import torch

from ragstone.errors import InputError


def run(case, **options):
    return case.model.generate(**case.inputs, return_dict_in_generate=True, **options)


def hypotheses_by_hand(case, b, beams, length):
    """What the raw generator's own search finds under each real passage: {k: list of answers, best first}."""
    passages = case.inputs["doc_scores"].shape[1]
    found = {}
    for k in range(passages):
        if case.prior[b, k] == -torch.inf:
            continue
        row = b * passages + k
        context = case.inputs["context_input_ids"][row][case.inputs["context_attention_mask"][row].bool()][None]
        out = case.model.generator.generate(
            context,
            attention_mask=torch.ones_like(context),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=length,
            do_sample=False,
        )
        prompt = 0 if case.model.config.is_encoder_decoder else context.shape[1]
        found[k] = [tuple(case.labels(sequence[prompt:])) for sequence in out.tolist()]
    return found


def fast_score(case, b, tokens, passages):
    """log Σ p(z_k|x) p(y|x,z_k) over ``passages`` alone."""
    joint = case.prior[b] + case.label_log_probs(b, list(tokens)).sum(dim=1)
    return float(joint[sorted(passages)].logsumexp(dim=0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_thorough_ranks_every_hypothesis_by_the_full_marginal(case, kind, seed, beams):
    one = case("sequence", kind, seed=seed)
    out = run(one, num_beams=beams, num_return_sequences=2, max_new_tokens=5)
    for b in range(2):
        found = hypotheses_by_hand(one, b, beams, 5)
        distinct = {y for answers in found.values() for y in answers}
        if len(distinct) < 2:
            continue  # the search is widened; tested below
        best = sorted((one.log_prob(b, list(y)) for y in distinct), reverse=True)[:2]
        ours = out.log_probs[2 * b : 2 * b + 2].double()
        torch.testing.assert_close(ours, torch.tensor(best).double(), rtol=1e-5, atol=1e-4)
        assert {tuple(one.labels(row)) for row in out.sequences[2 * b : 2 * b + 2].tolist()} <= distinct


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_fast_counts_only_the_passages_that_produced_a_hypothesis(case, kind, seed, beams):
    one = case("sequence", kind, seed=seed)
    out = run(one, num_beams=beams, max_new_tokens=5, decode="fast")
    for b in range(2):
        producers = {}
        for k, answers in hypotheses_by_hand(one, b, beams, 5).items():
            for y in answers:
                producers.setdefault(y, set()).add(k)
        ranked = {y: fast_score(one, b, y, passages) for y, passages in producers.items()}
        chosen = tuple(one.labels(out.sequences[b].tolist()))
        assert ranked[chosen] == pytest.approx(max(ranked.values()), abs=1e-4)
        assert float(out.sequences_scores[b]) == pytest.approx(ranked[chosen], abs=1e-4)
        # What is reported of it is the full marginal all the same.
        assert float(out.log_probs[b]) == pytest.approx(one.log_prob(b, list(chosen)), abs=1e-4)


@pytest.mark.parametrize("decode", ["thorough", "fast"])
def test_wide_beams_find_the_best_string_of_all(case, kind, decode):
    """With every string a hypothesis of every passage, thorough and fast are the same exhaustive search."""
    one = case("sequence", kind, vocabulary=5, empty=False)
    out = run(one, num_beams=25, num_return_sequences=4, max_new_tokens=2, length_penalty=0.0, decode=decode)
    for b in range(2):
        best = sorted((one.log_prob(b, list(y)) for y in one.strings(5, 2)), reverse=True)[:4]
        ours = out.log_probs[4 * b : 4 * b + 4].double()
        torch.testing.assert_close(ours, torch.tensor(best).double(), rtol=1e-5, atol=1e-4)


def test_ancestral_sampling_draws_a_passage_and_then_an_answer(case, kind):
    """4,000 single tokens are distributed as Σ_k p(z_k|x) p(y|x,z_k): no frequency is off by five standard errors."""
    one = case("sequence", kind, vocabulary=6)
    torch.manual_seed(0)
    count = 4000
    out = run(one, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=count)
    for b in range(2):
        exact = (one.prior[b][:, None] + one.table(b, [])[:, 0]).logsumexp(dim=0).exp()
        seen = torch.bincount(out.sequences[b * count : (b + 1) * count, -1], minlength=6).double() / count
        assert ((seen - exact).abs() <= 5 * (exact * (1 - exact) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("mixes", [False, True])
def test_sampling_keeps_one_passage_for_the_whole_answer(case, mixes, monkeypatch):
    """Two passages, one saying only 7, one only 8: RAG-Sequence never mixes them in an answer, RAG-Token does."""
    one = case("token" if mixes else "sequence", "t5", batch=1, passages=2, empty=False)
    one.inputs["doc_scores"] = torch.zeros(1, 2)
    adapter, generator = one.model.rag.adapter(), one.model.generator
    first = adapter.encode(one.inputs["context_input_ids"], one.inputs["context_attention_mask"]).hidden[0, 0, 0]
    forward = generator.forward

    def obsessed(*args, **kwargs):
        out = forward(*args, **kwargs)
        says = torch.where(kwargs["encoder_outputs"].last_hidden_state[:, 0, 0] == first, 7, 8)
        out.logits = torch.full_like(out.logits, -50.0)
        out.logits[range(len(says)), :, says] = 0.0
        return out

    monkeypatch.setattr(generator, "forward", obsessed)
    torch.manual_seed(0)
    out = run(one, do_sample=True, max_new_tokens=6, num_return_sequences=40)
    said = {tuple(sorted(set(row[1:]))) for row in out.sequences.tolist()}
    assert said <= {(7,), (8,), (7, 8)}
    assert ((7, 8) in said) == mixes


def test_sampling_under_a_certain_prior_uses_that_passage_alone(case, kind):
    one = case("sequence", kind, batch=1, passages=3, empty=False)
    one.inputs["doc_scores"] = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    torch.manual_seed(0)
    out = run(one, do_sample=True, top_k=1, max_new_tokens=4, num_return_sequences=5)
    alone = hypotheses_by_hand(one, 0, 1, 4)[1][0]
    assert {tuple(one.labels(row)) for row in out.sequences.tolist()} == {alone}
    assert out.sequences.shape[0] == 5  # nothing is deduplicated
    torch.testing.assert_close(out.posteriors, torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3))


def test_ancestral_sampling_draws_from_all_tokens_unless_told_otherwise(case):
    one = case("sequence", "gpt2", vocabulary=200, batch=1, passages=1)
    drawn = run(one, do_sample=True, max_new_tokens=1, num_return_sequences=2000).sequences
    assert len(drawn.unique()) > 100  # transformers' own default are the 50 likeliest
    assert len(run(one, do_sample=True, top_k=7, max_new_tokens=1, num_return_sequences=2000).sequences.unique()) <= 7


@pytest.mark.parametrize("decode", ["thorough", "fast"])
def test_answers_come_best_first(case, kind, decode):
    one = case("sequence", kind)
    out = run(one, num_beams=3, num_return_sequences=4, max_new_tokens=4, decode=decode)
    scores = out.sequences_scores.view(2, 4)
    assert (scores.diff(dim=1) <= 0).all()
    if decode == "thorough":
        torch.testing.assert_close(scores.flatten(), out.log_probs)


@pytest.mark.parametrize("decode", ["thorough", "fast"])
def test_too_few_hypotheses_widen_the_search(case, kind, decode):
    """One passage, greedy: one hypothesis; three answers are asked for."""
    one = case("sequence", kind, passages=1)
    out = run(one, num_return_sequences=3, max_new_tokens=4, decode=decode)
    for b in range(2):
        assert len({tuple(one.labels(row)) for row in out.sequences[3 * b : 3 * b + 3].tolist()}) == 3


def test_a_wider_search_keeps_what_the_narrow_one_found(case, kind):
    one = case("sequence", kind, passages=1)
    narrow = run(one, max_new_tokens=6)
    wide = run(one, num_return_sequences=2, max_new_tokens=6)
    assert (wide.log_probs.view(2, 2)[:, 0] >= narrow.log_probs - 1e-5).all()


def test_the_last_hypothesis_is_repeated_with_a_warning_where_there_are_no_more(case, kind, caplog):
    one = case("sequence", kind, passages=2, empty=False)
    with caplog.at_level(logging.WARNING, "ragstone"):
        out = run(one, num_return_sequences=4, max_new_tokens=1, prefix_allowed_tokens_fn=lambda b, tokens: [5, 6])
    assert "2 distinct hypotheses" in caplog.text
    for b in range(2):
        last = [row[-1] for row in out.sequences[4 * b : 4 * b + 4].tolist()]
        assert set(last[:2]) == {5, 6}
        assert last[1:] == [last[1]] * 3


def test_without_deduplication_equal_hypotheses_are_all_returned(case, kind):
    one = case("sequence", kind, passages=3, empty=False)
    for decode in ("thorough", "fast"):
        out = run(
            one,
            num_return_sequences=3,
            max_new_tokens=1,
            decode=decode,
            do_deduplication=False,
            prefix_allowed_tokens_fn=lambda b, tokens: [5],
        )
        assert out.sequences[:, -1].tolist() == [5] * 6
        assert out.sequences_scores.isfinite().all()
        torch.testing.assert_close(out.sequences_scores, out.log_probs)


@pytest.mark.parametrize("decode", ["thorough", "fast"])
def test_an_empty_slot_contributes_nothing(case, kind, decode):
    """Whatever its context says, the result is that of the other passages alone."""
    one = case("sequence", kind, batch=1, passages=3, empty=False)
    one.inputs["doc_scores"][0, 1] = -torch.inf
    out = run(one, num_beams=2, num_return_sequences=3, max_new_tokens=5, decode=decode)
    rows = torch.tensor([0, 2])
    two = {name: one.inputs[name][rows] for name in ("context_input_ids", "context_attention_mask")}
    without = one.model.generate(
        **two,
        doc_scores=one.inputs["doc_scores"][:, rows],
        num_beams=2,
        num_return_sequences=3,
        max_new_tokens=5,
        decode=decode,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, without.sequences)
    torch.testing.assert_close(out.log_probs, without.log_probs)
    assert (out.posteriors[:, 1] == 0).all()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}])
def test_constraints_are_asked_with_the_number_of_the_question(case, kind, options):
    one = case("sequence", kind, batch=3)
    out = run(
        one,
        max_new_tokens=3,
        num_return_sequences=2,
        prefix_allowed_tokens_fn=lambda b, tokens: list(range(5 + 5 * b, 10 + 5 * b)),
        **options,
    )
    for row, sequence in enumerate(out.sequences.tolist()):
        b = row // 2
        assert set(one.labels(sequence)) <= set(range(5 + 5 * b, 10 + 5 * b))


def test_new_tokens_are_counted(case, kind):
    one = case("sequence", kind)
    start = int(one.model.config.is_encoder_decoder)
    assert run(one, max_new_tokens=5, min_new_tokens=5).sequences.shape[1] == start + 5


def test_options_that_cannot_be_met_are_refused(case):
    one = case("sequence")
    with pytest.raises(InputError, match="quick"):
        run(one, decode="quick")
    with pytest.raises(InputError, match="num_return_sequences is 0"):
        run(one, num_return_sequences=0)
    with pytest.raises(InputError, match="RAG-Token"):
        run(one, streamer=object())
