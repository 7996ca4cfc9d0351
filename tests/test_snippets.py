"""The two snippets of the facebook/rag-sequence-base model card, with local folders in place of hub names."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragstone.testing import question_tokenizer, seq2seq_tokenizer, tiny_generator, tiny_question_encoder

BUILD = """
from transformers import AutoTokenizer
from ragstone import RagRetriever, RagSequenceForGeneration, RagTokenizer

model = RagSequenceForGeneration.from_pretrained_question_encoder_generator("{encoder}", "{generator}")
question_encoder_tokenizer = AutoTokenizer.from_pretrained("{encoder}")
generator_tokenizer = AutoTokenizer.from_pretrained("{generator}")

tokenizer = RagTokenizer(question_encoder_tokenizer, generator_tokenizer)
model.config.use_dummy_dataset = True
model.config.index_name = "exact"
retriever = RagRetriever(model.config, question_encoder_tokenizer, generator_tokenizer)

model.save_pretrained("./")
tokenizer.save_pretrained("./")
retriever.save_pretrained("./")
"""

USE = """
from ragstone import RagRetriever, {kind}, RagTokenizer

tokenizer = RagTokenizer.from_pretrained("{folder}")
retriever = RagRetriever.from_pretrained("{folder}")
model = {kind}.from_pretrained("{folder}", retriever=retriever)

input_dict = tokenizer.prepare_seq2seq_batch("who holds the record in 100m freestyle", "michael phelps", return_tensors="pt")

outputs = model(input_dict["input_ids"], labels=input_dict["labels"])

loss = outputs.loss

# outputs is asked for more here than in the card
print(float(loss), tuple(outputs.doc_scores.shape), len(outputs.nll))
generated = model.generate(input_dict["input_ids"], max_new_tokens=4)
print(tokenizer.batch_decode(generated, skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A DPR question encoder and a BART with their tokenizers, in two folders."""
    root = tmp_path_factory.mktemp("parts")
    encoder = tiny_question_encoder("dpr")
    encoder.save_pretrained(root / "dpr-question_encoder")
    question_tokenizer().save_pretrained(root / "dpr-question_encoder")
    tiny_generator("bart").save_pretrained(root / "bart")
    seq2seq_tokenizer("bart").save_pretrained(root / "bart")
    return {"encoder": root / "dpr-question_encoder", "generator": root / "bart"}


def run(code: str, folder: Path, cache: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cache), "RAGSTONE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["RagTokenForGeneration", "RagSequenceForGeneration"])
def test_both_snippets_run_from_an_empty_directory_and_survive_a_move(parts, tmp_path, kind):
    here, cache = tmp_path / "empty", tmp_path / "cache"
    here.mkdir()
    run(BUILD.format(**parts), here, cache)
    first = run(USE.format(folder="./", kind=kind), here, cache)
    loss, shape = float(first[0].split()[0]), first[0].split("(")[1]
    assert loss > 0
    assert shape.startswith("1, 5)")

    moved = tmp_path / "moved"
    shutil.move(here, moved)
    shutil.move(parts["encoder"], tmp_path / "gone")  # nothing may look back at where the parts lay
    try:
        assert run(USE.format(folder=moved, kind=kind), tmp_path, cache) == first
    finally:
        shutil.move(tmp_path / "gone", parts["encoder"])


def test_saved_folder_holds_relative_paths_only(parts, tmp_path):
    here = tmp_path / "empty"
    here.mkdir()
    run(BUILD.format(**parts), here, tmp_path / "cache")
    for file in here.rglob("*.json"):
        if file.name != "tokenizer.json":  # a vocabulary holds slashes
            assert str(tmp_path) not in file.read_text()
            assert str(parts["encoder"].parent) not in file.read_text()
    assert not list(here.rglob("*.bin"))
    assert list(here.glob("*.safetensors"))
