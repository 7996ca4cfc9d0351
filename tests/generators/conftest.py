"""Every family of generator that Ragstone is tested with, tiny and random."""

import pytest
import torch
import transformers

from ragstone.generators import generator_for
from ragstone.testing import GENERATORS, tiny_generator

VOCABULARY = 60
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BART_SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BART_SIDE.items()}
OTHERS = {
    "mbart": ("MBartForConditionalGeneration", {**BART, "d_model": 16, "init_std": 0.5, "decoder_start_token_id": 2}),
    "pegasus": ("PegasusForConditionalGeneration", {**BART, "d_model": 16, "init_std": 0.5}),
    "mistral": ("MistralForCausalLM", {**BERT, "num_key_value_heads": 1, "sliding_window": 6}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "opt": ("OPTForCausalLM", {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.5, "pad_token_id": 1}),
}
SEQ2SEQ = ("bart", "t5", "mbart", "pegasus", "encoder-decoder")
CAUSAL = ("llama", "gpt2", "mistral", "bloom", "opt")


def build(kind, seed=0):
    """A raw model of that family; Mistral's window is shorter than the contexts here."""
    if kind in GENERATORS:
        # T5's logits of order 1, so that 1e-5 is above the noise of float32.
        mild = {"initializer_factor": 0.5} if kind == "t5" else {}
        return tiny_generator(kind, seed=seed, vocab_size=VOCABULARY, **mild)
    torch.manual_seed(seed)
    if kind == "encoder-decoder":
        side = transformers.BertConfig(**BERT, vocab_size=VOCABULARY, initializer_range=0.5)
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(side, side)
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 0, 4
        return transformers.EncoderDecoderModel(config).eval()
    name, values = OTHERS[kind]
    model = getattr(transformers, name)
    spread = {} if "init_std" in values else {"initializer_range": 0.5}
    return model(model.config_class(**values, **spread, vocab_size=VOCABULARY)).eval()


@pytest.fixture(name="build", scope="package")
def build_fixture():
    """`build`, for tests that want a model of their own."""
    return build


@pytest.fixture(scope="package", params=SEQ2SEQ + CAUSAL)
def generator(request):
    return generator_for(build(request.param))


@pytest.fixture(scope="package", params=SEQ2SEQ)
def seq2seq(request):
    return generator_for(build(request.param))


@pytest.fixture(scope="package", params=CAUSAL)
def causal(request):
    return generator_for(build(request.param))


@pytest.fixture
def contexts():
    """Five contexts (5, 12) of 12, 9, 5, 2 and 7 tokens and their masks, padded as asked."""

    def make(padding="right", lengths=(12, 9, 5, 2, 7), width=12, fill=1):
        ids = torch.full((len(lengths), width), fill)
        mask = torch.zeros_like(ids)
        for n, length in enumerate(lengths):
            tokens = torch.randint(5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(n))
            if padding == "mixed":  # holes anywhere
                places = torch.randperm(width, generator=torch.Generator().manual_seed(n))[:length].sort().values
            else:
                places = torch.arange(length) + (width - length if padding == "left" else 0)
            ids[n, places], mask[n, places] = tokens, 1
        return ids, mask

    return make


@pytest.fixture
def targets():
    """Five targets (5, 6), no special token among them."""
    return torch.randint(5, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(99))
