"""The adapters that come with Ragstone: what they are, and what they change."""

import json

import pytest
import torch

from ragstone import RagPipeline, RagSequenceForGeneration, RagTokenizer, local
from ragstone.metrics import contains

PASSAGES = [
    "Hamlet is a tragedy that William Shakespeare wrote between 1599 and 1601. It is set in Denmark.",
    "Mount Everest, on the border of Nepal and China, is 8,849 metres high. It was first climbed in 1953.",
]


def test_the_files_are_small_and_name_no_place_of_the_machine_they_were_made_on():
    folder = local.adapter_folder()
    assert 0 < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 12 * 10**6
    assert json.loads((folder / "config.json").read_text())["base_model"] == local.UNTRAINED
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text())
        assert not settings.get("_name_or_path")
        assert not settings.get("base_model_name_or_path")


@pytest.mark.local
def test_the_local_default_answers_briefly_from_its_passages():
    trained = RagPipeline.from_pretrained("local", dtype="float32")
    untrained = RagPipeline.from_pretrained("local-untrained", dtype="float32")
    for question, wanted in (("Who wrote Hamlet?", "William Shakespeare"), ("When was Everest climbed?", "1953")):
        answer = trained(question, passages=PASSAGES, max_new_tokens=24)
        assert contains(answer.text, wanted)
        assert len(answer.tokens) <= 8
        assert len(answer.tokens) < len(untrained(question, passages=PASSAGES, max_new_tokens=24).tokens)


@pytest.mark.local
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passages_that_the_local_default_has_read_are_not_read_again(dtype):
    rag = RagPipeline.from_pretrained("local", dtype=dtype)
    rag("Who wrote Hamlet?", passages=PASSAGES, max_new_tokens=2)
    rag("Where is Hamlet set?", passages=PASSAGES, max_new_tokens=2)
    assert (rag.model.rag.prompt_store.hits, rag.model.rag.prompt_store.misses) == (2, 2)


@pytest.mark.local
def test_the_model_classes_load_the_local_default_too():
    model = RagSequenceForGeneration.from_pretrained("local")
    weights = dict(model.named_parameters())
    untrained = RagSequenceForGeneration.from_pretrained("local-untrained")
    changed = {name for name, w in untrained.named_parameters() if not torch.equal(w, weights[name])}
    assert changed
    assert all(".layers." in name and name.endswith("_proj.weight") for name in changed)
    assert model.config.n_docs == 5
    assert RagTokenizer.from_pretrained("local").generator.eos_token_id is not None
