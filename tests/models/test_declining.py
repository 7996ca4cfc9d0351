"""Answers of a generator that may write nothing: p(y|x,y≠∅), by definition from what the forward pass says."""

import pytest
import torch

from ragstone.models import RagSequenceForGeneration, RagTokenForGeneration
from ragstone.testing import tiny_rag


def loose(kind, method="token"):
    """A model, and two questions with three passages, that ends answers with either of two tokens."""
    model, _ = tiny_rag(method, kind, min_answer_tokens=1)
    model.rag.generator.generation_config.eos_token_id = [3, 2]
    model.rag.generator.generation_config.forced_bos_token_id = None
    model.rag.generator.generation_config.forced_eos_token_id = None
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 30, (6, 9), generator=draw)
    scores = torch.tensor([[0.5, 0.0, -0.4], [1.0, -torch.inf, 0.2]])
    return model.eval(), {
        "context_input_ids": ids,
        "context_attention_mask": torch.ones_like(ids),
        "doc_scores": scores,
    }


@pytest.mark.parametrize("method", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
def test_an_answer_is_scored_as_one_that_is_not_empty(kind, method, beams, fast):
    model, given = loose(kind, method)
    model.rag.fast = fast
    options = {"max_new_tokens": 4, "num_beams": beams, "return_dict_in_generate": True}
    out = model.generate(**given, **options)
    labels = out.sequences[:, 1:] if model.rag.adapter().start_token_id is not None else out.sequences
    assert not set(labels[:, 0].tolist()) & {2, 3}
    counted = out.token_log_probs.abs().sum(dim=1) > 0
    labels = labels.masked_fill(~counted, -100)

    prior = given["doc_scores"].softmax(dim=1)
    nothing = torch.stack(
        [
            model(**given, labels=torch.full((2, 1), end)).token_log_probs[..., 0].exp().masked_fill(prior == 0, 0)
            for end in (2, 3)
        ]
    ).sum(dim=0)
    answered = prior * (1 - nothing)
    answered = answered / answered.sum(dim=1, keepdim=True)
    tokens = model(**given, labels=labels).token_log_probs.exp()
    tokens[..., 0] /= 1 - nothing
    tokens = tokens.masked_fill(~counted.unsqueeze(1), 1.0)
    joint = answered.unsqueeze(2) * tokens
    expected = joint.sum(dim=1).log().sum(dim=1) if method == "token" else tokens.prod(dim=2).mul(answered).sum(1).log()
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-4, atol=1e-4)
    if method == "token":
        by_token = joint / joint.sum(dim=1, keepdim=True)
        torch.testing.assert_close(
            out.token_posteriors, by_token.masked_fill(~counted.unsqueeze(1), 0.0), rtol=1e-4, atol=1e-4
        )


def test_a_passage_that_declines_has_nothing_to_say_at_any_token():
    """One that would certainly write nothing leaves the answer to the other, token by token."""
    model, given = loose("llama")
    ids, mask, scores = (value[:3] if value.dim() == 2 else value for value in given.values())
    scores = torch.tensor([[0.0, 0.0, -torch.inf]])
    head = model.rag.generator.get_output_embeddings()

    def decline(module, inputs, logits):  # the second context's first token is an end
        if logits.shape[1] == 1 and not decline.seen:
            logits[1, -1] = torch.where(torch.arange(logits.shape[2]) == 2, 50.0, -50.0)
            decline.seen = True
        return logits

    decline.seen = False
    hook = head.register_forward_hook(decline)
    out = model.generate(
        context_input_ids=ids,
        context_attention_mask=mask,
        doc_scores=scores,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    hook.remove()
    assert decline.seen
    torch.testing.assert_close(out.posteriors, torch.tensor([[1.0, 0.0, 0.0]]))
    alone = model.generate(
        context_input_ids=ids[:1],
        context_attention_mask=mask[:1],
        doc_scores=torch.zeros(1, 1),
        max_new_tokens=4,
    )
    assert out.sequences.tolist() == alone.tolist()


@pytest.mark.parametrize("model_class", [RagTokenForGeneration, RagSequenceForGeneration])
def test_who_allows_an_empty_answer_gets_the_plain_distribution(model_class):
    method = "token" if model_class is RagTokenForGeneration else "sequence"
    model, given = loose("llama", method)
    free = model.generate(**given, max_new_tokens=4, min_new_tokens=0, return_dict_in_generate=True)
    model.config.min_answer_tokens = 0
    plain = model.generate(**given, max_new_tokens=4, return_dict_in_generate=True)
    assert free.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(free.log_probs, plain.log_probs)
