"""`Encoder`: texts in, float32 vectors out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ragstone import local
from ragstone.encoders.checkpoint import (
    SENTENCE_TRANSFORMERS_POOLINGS,
    EncoderSettings,
    fingerprint,
    load_backbone,
    load_tokenizer,
    longest_input,
    read_encoder_settings,
)
from ragstone.encoders.pooling import embed
from ragstone.encoders.precision import PROBE_TEXTS, choose_dtype, parse_device, parse_dtype
from ragstone.errors import InputError, ModelError

__all__ = ["Encoder", "EncoderSpec", "load_encoder"]

# Padded tokens in a batch. On a CPU the working set of a small encoder then stays near its caches; larger was slower.
_CPU_BATCH_TOKENS = 2048
_GPU_BATCH_TOKENS = 32768
# Texts tokenised and sorted by length together: enough to find equal lengths, small enough to hold in memory.
_CHUNK = 8192
# No tokenizer makes fewer tokens of running text than one from so many characters, so what lies beyond is never seen.
_CHARACTERS_PER_TOKEN = 20


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides which vector a text gets; a knowledge base keeps it in its manifest.

    Attributes:
        name: name or folder, as `load_encoder` takes it.
        fingerprint: hash of the weights, see `ragstone.encoders.fingerprint`.
        pooling: one of `ragstone.encoders.POOLINGS`.
        normalize: whether vectors are scaled to length 1.
        template: how a passage becomes text: ``"pair"`` (DPR's (title, text) pair) or ``"title\\ntext"``.
        width: D, the width of the vectors.
        max_length: number of tokens, special ones included, after which a text is cut.
        question_prompt: put before every question.
        passage_prompt: put before every passage.
    """

    name: str
    fingerprint: str
    pooling: str
    normalize: bool
    template: str
    width: int
    max_length: int
    question_prompt: str = ""
    passage_prompt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """Rebuild a spec from what `to_dict` gave; unknown keys are passed over.

        Raises:
            InputError: a field is missing.
        """
        try:
            return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        except TypeError as error:
            raise InputError(f"An encoder's description lacks a field ({error}).") from error


class Encoder:
    """Turns passages and questions into vectors.

    Texts are sorted by length and run in batches of a fixed number of tokens, so that hardly anything is padded; the
    vectors come in the order of the texts. A vector does not depend on what else is encoded with it, beyond rounding.

    Attributes:
        model: the raw Hugging Face module; it may also be trained elsewhere, after which ``spec.fingerprint`` is stale.
        tokenizer: its tokenizer.
        spec: what decides the vectors.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec

    @classmethod
    def from_parts(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, *, name: str
    ) -> Encoder:
        """Build an encoder from a model in memory, describing it: fingerprint, width and longest input.

        Raises:
            InputError: ``settings`` ask for an unknown pooling, or for texts of no token.
            ModelError: the model has no output for the pooling asked for.
        """
        with torch.inference_mode():
            token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
            width = embed(model, token, pooling=settings.pooling, normalize=False).shape[1]
        spec = EncoderSpec(
            name=name,
            fingerprint=fingerprint(model),
            pooling=settings.pooling,
            normalize=settings.normalize,
            template=settings.template,
            width=width,
            max_length=longest_input(model, tokenizer, settings.max_length),
            question_prompt=settings.question_prompt,
            passage_prompt=settings.passage_prompt,
        )
        return cls(model, tokenizer, spec)

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and how vectors are made, in the layout of sentence-transformers.

        Raises:
            InputError: the pooling is one that this layout cannot say.
        """
        place, spec = Path(folder), self.spec
        files: dict[str, Any] = {}
        if spec.template != "pair":  # of DPR its own class says everything
            pooling = SENTENCE_TRANSFORMERS_POOLINGS.get(spec.pooling)
            if pooling is None:
                known = ", ".join(SENTENCE_TRANSFORMERS_POOLINGS)
                raise InputError(f"The pooling {spec.pooling!r} of {spec.name!r} cannot be saved; use one of {known}.")
            modules = {"": "Transformer", "1_Pooling": "Pooling"} | (
                {"2_Normalize": "Normalize"} if spec.normalize else {}
            )
            files = {
                "modules.json": [
                    {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                    for n, (path, kind) in enumerate(modules.items())
                ],
                "sentence_bert_config.json": {"max_seq_length": spec.max_length},
                "1_Pooling/config.json": {"embedding_dimension": spec.width, "pooling_mode": pooling},
                "config_sentence_transformers.json": {
                    "prompts": {"query": spec.question_prompt, "document": spec.passage_prompt},
                    "similarity_fn_name": "cosine" if spec.normalize else "dot",
                },
            }
        self.model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        for name, values in files.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(json.dumps(values, indent=2), encoding="utf-8")

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self.spec.width

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; vectors come out as float32 always."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def encode_passages(
        self, pairs: Sequence[tuple[str, str]], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Encode passages.

        Args:
            pairs: N pairs (title, text); either may be empty. Of a very long text only the beginning is read.
            progress: called after each batch with the number of passages in it.

        Returns:
            Vectors (N, D).

        Raises:
            InputError: something other than a pair of strings is given.
            ModelError: a vector is not finite.
        """
        return self._encode(*self._passage_texts(pairs), progress)

    def embed_passages(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """N pairs (title, text) as one batch -> (N, D), in the model's dtype and mode, with gradient where that is on."""
        tokens, types = self._tokenize(*self._passage_texts(pairs))
        return embed(self.model, **self._pad(tokens, types), pooling=self.spec.pooling, normalize=self.spec.normalize)

    def _passage_texts(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str] | None]:
        """What is read of passages: N texts, or N pairs of them."""
        for i, pair in enumerate(pairs):
            if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise InputError(f"Passage {i} is {pair!r}; give a pair of strings (title, text).")
        prompt = self.spec.passage_prompt
        if self.spec.template == "pair":
            return [prompt + title for title, _ in pairs], [text for _, text in pairs]
        # A passage without a title, or without a text, is the other of the two alone.
        return [prompt + "\n".join(part for part in pair if part) for pair in pairs], None

    def encode_questions(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode questions.

        Args:
            texts: B questions.

        Returns:
            Vectors (B, D).

        Raises:
            InputError: something other than strings is given.
            ModelError: a vector is not finite.
        """
        if isinstance(texts, str):
            raise InputError("Give a list of questions, not one string.")
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"A question is {text!r}; give a string.")
        return self._encode([self.spec.question_prompt + text for text in texts], None, None)

    @torch.inference_mode()
    def _encode(
        self, firsts: list[str], seconds: list[str] | None, progress: Callable[[int], None] | None
    ) -> NDArray[np.float32]:
        """Encode single texts, or pairs of them, to (N, D)."""
        vectors = np.empty((len(firsts), self.width), np.float32)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(firsts), _CHUNK):
                stop = min(start + _CHUNK, len(firsts))
                tokens, types = self._tokenize(firsts[start:stop], seconds[start:stop] if seconds else None)
                for rows in self._batches([len(row) for row in tokens]):
                    batch = self._pad([tokens[i] for i in rows], [types[i] for i in rows] if types else None)
                    out = embed(self.model, **batch, pooling=self.spec.pooling, normalize=self.spec.normalize)
                    vectors[[start + i for i in rows]] = out.float().cpu().numpy()
                    if progress is not None:
                        progress(len(rows))
        finally:
            self.model.train(was_training)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            bad = firsts[int(np.argmin(finite))]
            raise ModelError(
                f"The encoder {self.spec.name!r} gave values that are not finite for {bad[:60]!r} in {self.dtype}; "
                "load it with dtype='float32', and if that does not help its weights are damaged."
            )
        return vectors

    def _tokenize(self, firsts: list[str], seconds: list[str] | None) -> tuple[list[list[int]], list[list[int]] | None]:
        """Return token ids, and token types where they say anything (for pairs)."""
        cut = self.spec.max_length * _CHARACTERS_PER_TOKEN
        encoded = self.tokenizer(
            [text[:cut] for text in firsts],
            [text[:cut] for text in seconds] if seconds is not None else None,
            truncation=True,
            max_length=self.spec.max_length,
            return_attention_mask=False,
            verbose=False,
        )
        tokens = encoded["input_ids"]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        largest = max((max(row) for row in tokens if row), default=0)
        if largest >= vocabulary:
            raise ModelError(
                f"The tokenizer of the encoder {self.spec.name!r} gives token {largest}, but the model knows only "
                f"{vocabulary}; load the tokenizer that was saved with it."
            )
        return tokens, encoded.get("token_type_ids") if seconds is not None else None

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Group rows of similar length so that a padded batch has at most the budget of tokens, longest first."""
        budget = _CPU_BATCH_TOKENS if self.device.type == "cpu" else _GPU_BATCH_TOKENS
        rows: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if rows and (len(rows) + 1) * lengths[rows[0]] > budget:
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    def _pad(self, tokens: list[list[int]], types: list[list[int]] | None) -> dict[str, Any]:
        """Return (B, S) inputs, padded on the right; the mask is None where nothing is padded."""
        lengths = np.array([len(row) for row in tokens])
        real = np.arange(max(1, lengths.max())) < lengths[:, None]

        def fill(rows: list[list[int]], padding: int) -> torch.Tensor:
            array = np.full(real.shape, padding, np.int64)
            array[real] = np.concatenate(rows)
            return torch.from_numpy(array).to(self.device)

        return {
            "input_ids": fill(tokens, self.tokenizer.pad_token_id or 0),
            "attention_mask": None if real.all() else torch.from_numpy(real.astype(np.int64)).to(self.device),
            "token_type_ids": fill(types, 0) if types else None,
        }


def load_encoder(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    question_prompt: str | None = None,
    passage_prompt: str | None = None,
    max_length: int | None = None,
) -> Encoder:
    """Load any encoder.

    What is not given is read from the checkpoint, see `read_encoder_settings`.

    Args:
        name_or_path: ``"local"``, a folder, or a name on the hub.
        device: default: CUDA if there is a device, else the CPU.
        dtype: what the model computes in; None or ``"auto"`` takes bfloat16 where it is measured to pay, see
            `ragstone.encoders.precision`.
        pooling: one of `POOLINGS`.
        normalize: scale each vector to length 1.
        question_prompt: put before every question.
        passage_prompt: put before every passage.
        max_length: number of tokens after which a text is cut.

    Raises:
        InputError: an option cannot be used.
        ModelError: there is no such model, or it is damaged or incomplete.
        MissingExtraError: ``"local"`` is not installed.
    """
    wanted = parse_dtype(dtype)
    place = parse_device(device)
    settings = read_encoder_settings(
        name_or_path,
        pooling=pooling,
        normalize=normalize,
        question_prompt=question_prompt,
        passage_prompt=passage_prompt,
        max_length=max_length,
    )
    model = load_backbone(name_or_path, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(name_or_path)
    name = str(name_or_path)
    if name != local.LOCAL and Path(name).is_dir():
        name = str(Path(name).resolve())  # so that a knowledge base finds it from wherever it is opened
    encoder = Encoder.from_parts(model, tokenizer, settings, name=name)
    if wanted is None:
        batch = tokenizer(PROBE_TEXTS, truncation=True, max_length=encoder.spec.max_length, return_tensors="pt")

        def run(model: PreTrainedModel) -> torch.Tensor:
            return embed(model, batch["input_ids"], pooling=settings.pooling, normalize=settings.normalize)

        wanted = choose_dtype(model, run, encoder.spec.fingerprint, place)
    encoder.model = model.to(device=place, dtype=wanted)
    return encoder
