"""Doubles for tests: toy passages, tiny tokenizers and models, an encoder and a retriever that cost next to nothing.

Everything is made in code, from a seed, without network or files; the same seed gives the same weights. Importing this
module imports neither torch nor transformers.

    model, tokenizer = tiny_rag("sequence", "t5")
    model.set_retriever(ToyRetriever(model.config, tokenizer))
    model.generate(questions=["who wrote hamlet?"], n_docs=2, max_new_tokens=5)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np

from ragstone.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

    from ragstone.knowledge import Passage
    from ragstone.models import RagConfig, RagForGeneration, RagTokenizer

__all__ = [
    "GENERATORS",
    "TOY_PASSAGES",
    "ToyEncoder",
    "ToyEncoderSpec",
    "ToyRetriever",
    "causal_tokenizer",
    "question_tokenizer",
    "seq2seq_tokenizer",
    "tiny_generator",
    "tiny_question_encoder",
    "tiny_rag",
    "toy_passages",
]

TOY_PASSAGES: tuple[tuple[str, str], ...] = (
    ("Hamlet", "Hamlet is a tragedy by William Shakespeare, written around 1600 and set in Denmark."),
    ("Mount Everest", "Mount Everest is the highest mountain on Earth. Its summit lies 8,849 metres above the sea."),
    ("Photosynthesis", "Plants turn light, water and carbon dioxide into sugar and oxygen by photosynthesis."),
    ("Paris", "Paris is the capital of France. The river Seine runs through the city."),
    ("Marie Curie", "Marie Curie discovered polonium and radium, and won two Nobel Prizes."),
    ("Honey bee", "A honey bee tells the others in the hive where flowers are by a waggle dance."),
    ("Pi", "Pi is the ratio of a circle's circumference to its diameter, about 3.14159."),
    ("Apollo 11", "Apollo 11 brought the first people to the Moon in July 1969."),
)
"""Eight (title, text) pairs on subjects that share few words."""

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_passages() -> list[Passage]:
    """`TOY_PASSAGES` as :class:`ragstone.Passage` objects with the ids ``"toy-0"``, ``"toy-1"``, …."""
    from ragstone.knowledge import Passage

    return [Passage(f"toy-{n}", title, text) for n, (title, text) in enumerate(TOY_PASSAGES)]


@dataclass(frozen=True)
class ToyEncoderSpec:
    """What a knowledge base stores about a `ToyEncoder`."""

    width: int
    name: str = "toy"
    fingerprint: str = "toy-1"
    pooling: str = "mean"
    normalize: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


class ToyEncoder:
    """A bag of words: the vector of a text is the sum of its words' random vectors, so common words mean closeness.

    Takes the place of :class:`ragstone.encoders.Encoder`. ``encoded`` counts the passages it has encoded.

    Args:
        width: D.
        delay: seconds spent on each passage, for tests that interrupt.
        spec: fields of `ToyEncoderSpec`.
    """

    def __init__(self, width: int = 32, *, delay: float = 0.0, **spec: Any) -> None:
        self.spec = ToyEncoderSpec(width, **spec)
        self.width = width
        self.delay = delay
        self.encoded = 0

    def encode_passages(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> np.ndarray[Any, Any]:
        """N (title, text) pairs -> (N, D) float32; ``progress`` gets the number of passages just done."""
        vectors = []
        for title, text in pairs:
            time.sleep(self.delay)
            vectors.append(self._vector(f"{title}\n{text}"))
            self.encoded += 1
            if progress is not None:
                progress(1)
        return np.array(vectors, np.float32).reshape(-1, self.width)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """B questions -> (B, D) float32."""
        return np.array([self._vector(text) for text in texts], np.float32).reshape(-1, self.width)

    def _vector(self, text: str) -> np.ndarray[Any, Any]:
        words = re.findall(r"\w+", text.lower())
        return sum((_word_vector(word, self.width) for word in words), np.zeros(self.width, np.float32))


@cache
def _word_vector(word: str, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(crc32(word.encode())).standard_normal(width).astype(np.float32)


class ToyRetriever:
    """Passages with given vectors, searched exactly; a :class:`ragstone.models.Retriever`.

    ``calls`` counts retrievals and ``questions`` holds the texts of the last one.

    Args:
        config: the model's.
        tokenizer: the model's.
        passages: N (title, text) pairs.
        vectors: (N, D) float32, drawn from a fixed seed by default.
        found: finds this many passages at most, however many are asked for.
    """

    def __init__(
        self,
        config: RagConfig,
        tokenizer: RagTokenizer,
        passages: Sequence[tuple[str, str]] = TOY_PASSAGES,
        vectors: np.ndarray[Any, Any] | None = None,
        *,
        found: int | None = None,
    ) -> None:
        width = config.question_encoder.hidden_size
        if vectors is None:
            vectors = np.random.default_rng(0).standard_normal((len(passages), width)).astype(np.float32)
        self.config, self.tokenizer = config, tokenizer
        self.passages, self.vectors = list(passages), vectors
        self.found = len(self.passages) if found is None else found
        self.calls = 0
        self.questions: list[str] = []
        self.question_encoder: Any = None

    def __call__(
        self,
        question_input_ids: Any,
        question_hidden_states: np.ndarray[Any, Any],
        prefix: str | None = None,
        n_docs: int | None = None,
        return_tensors: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        null_passage: bool = False,
    ) -> BatchEncoding:
        """See :class:`ragstone.models.Retriever`; ``return_tensors`` is ``"pt"`` here."""
        import torch
        from transformers import BatchEncoding

        from ragstone.generators.prompts import NULL_PASSAGE, ContextBuilder

        self.calls += 1
        decode = self.tokenizer.question_encoder.batch_decode
        self.questions = list(questions) if questions else decode(question_input_ids, skip_special_tokens=True)
        slots = self.config.n_docs if n_docs is None else n_docs
        best = np.argsort(-(question_hidden_states @ self.vectors.T), axis=1, kind="stable")[
            :, : min(slots, self.found)
        ]
        embeds = np.zeros((len(best), slots, self.vectors.shape[1]), np.float32)
        embeds[:, : best.shape[1]] = self.vectors[best]
        build = ContextBuilder(self.tokenizer.generator, self.config.prompt_format(), causal=self.config.causal)
        null = [NULL_PASSAGE] if null_passage else []
        rows = [[*(self.passages[n] for n in row), *[None] * (slots - len(row)), *null] for row in best]
        contexts = build(self.questions, rows)
        return BatchEncoding(
            {
                "context_input_ids": contexts.input_ids,
                "context_attention_mask": contexts.attention_mask,
                "retrieved_doc_embeds": torch.from_numpy(embeds),
                "retrieved_doc_mask": (torch.arange(slots) < best.shape[1]).expand(len(best), slots),
                "truncated": contexts.truncated,
                "prompt_lengths": contexts.prompt_lengths,
                "doc_ids": [[f"toy-{n}" for n in row] for row in best],
            }
        )

    def tokenize_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B question texts -> ids and mask (B, S)."""
        batch = self.tokenizer(list(questions), padding=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def attach(self, question_encoder: Any) -> None:
        """Keep the model's question encoder as ``question_encoder``."""
        self.question_encoder = question_encoder


def question_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer, ``[CLS] x [SEP]``: lower case, whole words of `TOY_PASSAGES`, else letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(map(" ".join, TOY_PASSAGES)).lower())))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?!'-"
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*specials, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return _wrap(tokenizer, **dict(zip(names, specials, strict=True)))


def seq2seq_tokenizer(kind: Literal["bart", "t5"] = "bart") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ``<s> x </s>`` with ids 0 and 2 as BART's, or ``x </s>`` with id 1 as T5's."""
    from tokenizers import processors

    bart = kind == "bart"
    tokenizer = _byte_level(("<s>", "<pad>", "</s>", "<unk>") if bart else ("<pad>", "</s>", "<unk>"))
    begin, ends = ("<s> ", [("<s>", 0), ("</s>", 2)]) if bart else ("", [("</s>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A </s>", pair=f"{begin}$A </s> $B </s>", special_tokens=ends
    )
    bos = {"bos_token": "<s>"} if bart else {}
    return _wrap(tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **bos)


def causal_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that adds nothing; padding is EOS (id 0). With ``chat`` it has a chat template."""
    tokenizer = _wrap(
        _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    if chat:
        tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _byte_level(specials: tuple[str, ...]) -> Any:
    """Byte-pair encoding learnt from `TOY_PASSAGES`: it can write, and give back, any text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained(specials))


@cache
def _trained(specials: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(" ".join, TOY_PASSAGES), trainer)
    return str(tokenizer.to_str())


def _wrap(tokenizer: Any, **special_tokens: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special_tokens)


_BERT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5)
_BART_SIDE = dict(layers=2, attention_heads=2, ffn_dim=32)
_BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _BART_SIDE.items()}
_T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, initializer_factor=2.0, decoder_start_token_id=0)
_PAD_IS_EOS = dict(bos_token_id=None, pad_token_id=0, eos_token_id=0)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", _BART | dict(d_model=16, init_std=0.5, forced_eos_token_id=None)),
    "t5": ("T5ForConditionalGeneration", _T5),
    "llama": ("LlamaForCausalLM", _BERT | _PAD_IS_EOS | dict(num_key_value_heads=1)),
    "gpt2": ("GPT2LMHeadModel", _PAD_IS_EOS | dict(n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)),
}
GENERATORS = tuple(_FAMILIES)
"""The families of `tiny_generator`: two sequence-to-sequence, two causal."""


def tiny_generator(
    kind: str = "bart", *, seed: int = 0, vocab_size: int | None = None, **config: Any
) -> PreTrainedModel:
    """A generator of some 20,000 random weights, spread widely enough that its answers vary.

    Args:
        kind: one of `GENERATORS`.
        seed: of the weights.
        vocab_size: V; that of the tokenizer that fits by default (`seq2seq_tokenizer`, `causal_tokenizer`).
        config: fields of the model's config that replace the tiny ones.
    """
    import torch
    import transformers

    if kind not in _FAMILIES:
        raise InputError(f"There is no tiny generator {kind!r}; choose one of {', '.join(GENERATORS)}.")
    name, defaults = _FAMILIES[kind]
    model = getattr(transformers, name)
    size = len(_tokenizer_for(kind)) if vocab_size is None else vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(model.config_class(**{**defaults, "vocab_size": size, **config})).eval()


def _tokenizer_for(model_type: str) -> PreTrainedTokenizerFast:
    if model_type in ("bart", "t5"):
        return seq2seq_tokenizer("t5" if model_type == "t5" else "bart")
    return causal_tokenizer()


def tiny_question_encoder(kind: Literal["bert", "dpr"] = "bert", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A BERT, or DPR's question encoder, of random weights for `question_tokenizer`; vectors are 16 wide."""
    import torch
    import transformers

    model = transformers.DPRQuestionEncoder if kind == "dpr" else transformers.BertModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        values = {**_BERT, "vocab_size": len(question_tokenizer()), **config}
        return model(model.config_class(**values)).eval()


def tiny_rag(
    method: Literal["token", "sequence"] = "token",
    kind: str = "bart",
    *,
    question_encoder: Literal["bert", "dpr"] = "bert",
    seed: int = 0,
    **config: Any,
) -> tuple[RagForGeneration, RagTokenizer]:
    """A whole model with its tokenizers; no retriever is set.

    Args:
        method: the model class.
        kind: of generator, one of `GENERATORS`.
        question_encoder: ``"bert"`` or ``"dpr"``.
        seed: of all weights.
        config: fields of :class:`ragstone.RagConfig`.
    """
    from ragstone.models import RagSequenceForGeneration, RagTokenForGeneration, RagTokenizer

    model = RagSequenceForGeneration if method == "sequence" else RagTokenForGeneration
    built = model.from_pretrained_question_encoder_generator(
        question_encoder_model=tiny_question_encoder(question_encoder, seed=seed),
        generator_model=tiny_generator(kind, seed=seed + 1),
        **config,
    )
    return built, RagTokenizer(question_tokenizer(), _tokenizer_for(kind), built.config.question_prompt)
