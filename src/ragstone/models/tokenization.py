"""Two tokenizers, one front: questions in the question encoder's vocabulary, targets in the generator's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER, TruncationStrategy
from transformers.utils import PaddingStrategy

from ragstone import local
from ragstone.errors import InputError, ModelError
from ragstone.marginal import IGNORED
from ragstone.models.adapters import base_of
from ragstone.models.configuration import RagConfig

__all__ = ["RagTokenizer"]

_FOLDERS = ("question_encoder_tokenizer", "generator_tokenizer")
_OPTIONS = {"split_special_tokens", *signature(PreTrainedTokenizerBase.__call__).parameters}
_OPTIONS -= {"self", "text_pair_target", "kwargs"}
"""What transformers' tokenizers can be told; they pass over anything else."""


class RagTokenizer:
    """The question encoder's and the generator's tokenizer.

    Args:
        question_encoder: tokenizer of the question encoder.
        generator: tokenizer of the generator.
        question_prompt: put before every question (``"query: "`` and the like), where the encoder was trained with one.
    """

    def __init__(self, question_encoder: Any, generator: Any, question_prompt: str = "") -> None:
        self.question_encoder = question_encoder
        self.generator = generator
        self.question_prompt = question_prompt

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> RagTokenizer:
        """Load both tokenizers of a checkpoint, saved by Ragstone or transformers, or those of ``"local"``."""
        if str(name_or_path) in (local.LOCAL, local.UNTRAINED):
            folders = (local.resolve(local.LOCAL, kind) for kind in ("encoder", "generator"))
            return cls(*(AutoTokenizer.from_pretrained(folder, **kwargs) for folder in folders))
        config = kwargs.pop("config", None) or RagConfig.load(name_or_path)
        base = getattr(config, "base_model", None)  # which transformers' own config does not have
        if base is not None:
            return cls.from_pretrained(base_of(Path(name_or_path), base), **kwargs)
        parts = []
        for folder, part in zip(_FOLDERS, (config.question_encoder, config.generator), strict=True):
            try:
                # Of a folder without its files transformers makes an empty tokenizer, to which every word is unknown.
                if Path(name_or_path).is_dir() and not any(Path(name_or_path, folder).glob("*")):
                    raise OSError("there are no files")
                parts.append(AutoTokenizer.from_pretrained(name_or_path, subfolder=folder, config=part, **kwargs))
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{name_or_path} holds no usable {folder}; save one there with RagTokenizer(…).save_pretrained: {error}"
                ) from error
        return cls(parts[0], parts[1], getattr(config, "question_prompt", ""))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``question_encoder_tokenizer/`` and ``generator_tokenizer/``, as transformers does."""
        folder = Path(save_directory)
        if folder.is_file():
            raise InputError(f"{folder} is a file; name a folder to save the tokenizers in.")
        for name, tokenizer in zip(_FOLDERS, (self.question_encoder, self.generator), strict=True):
            tokenizer.save_pretrained(folder / name)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        text_target: str | Sequence[str] | None = None,
        *,
        max_target_length: int | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Tokenise questions, targets, or both.

        ``text`` goes through the question encoder's tokenizer. ``text_target`` goes through the generator's and becomes
        ``labels``, EOS at the end and −100 behind it. Given alone it is also there as ``input_ids`` and
        ``attention_mask``, padded with the padding token, as transformers' tokenizers do. Options are theirs, too;
        ``max_target_length`` is the ``max_length`` of targets. A misspelt option is a TypeError.
        """
        unknown = sorted(kwargs.keys() - _OPTIONS)
        if unknown:
            raise TypeError(
                f"RagTokenizer has no option {', '.join(unknown)}; it takes those of transformers' tokenizers."
            )
        for_targets = kwargs if max_target_length is None else {**kwargs, "max_length": max_target_length}
        if text is None and text_target is None:
            raise InputError("Pass text (questions), text_target (answers), or both.")
        if text is None:
            return self._targets(text_target, alone=True, **for_targets)
        if self.question_prompt:
            text = self.question_prompt + text if isinstance(text, str) else [self.question_prompt + t for t in text]
        out = self.question_encoder(text, text_pair, **kwargs)
        if text_target is not None:
            out["labels"] = self._targets(text_target, **for_targets)["labels"]
        return out

    def prepare_seq2seq_batch(
        self,
        src_texts: str | Sequence[str],
        tgt_texts: str | Sequence[str] | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        padding: bool | str = "longest",
        return_tensors: str | None = None,
        truncation: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Questions and targets as one batch: ``input_ids``, ``attention_mask`` and, given targets, ``labels``.

        Args:
            src_texts: the questions, B strings or one.
            tgt_texts: the targets, as many.
            max_length: of a question, in tokens.
            max_target_length: of a target; ``max_length`` by default.
            padding, return_tensors, truncation, kwargs: as in transformers' tokenizers.
        """
        questions = [src_texts] if isinstance(src_texts, str) else list(src_texts)
        limit = max_length or min(self.question_encoder.model_max_length, 512)
        options = {"padding": padding, "truncation": truncation, "return_tensors": return_tensors, **kwargs}
        batch = self(questions, max_length=limit, **options)
        if tgt_texts is not None:
            targets = [tgt_texts] if isinstance(tgt_texts, str) else list(tgt_texts)
            if len(targets) != len(questions):
                raise InputError(f"{len(questions)} questions came with {len(targets)} targets; pass one target each.")
            options["max_length"] = max_target_length or max_length or min(self.generator.model_max_length, 512)
            batch["labels"] = self._targets(targets, **options)["labels"]
        return batch

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Generated sequences to texts; see the generator tokenizer's ``batch_decode``."""
        return self.generator.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """One generated sequence to text; see the generator tokenizer's ``decode``."""
        return self.generator.decode(*args, **kwargs)

    def target_ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Targets as token ids, each closed with EOS and at most ``max_length`` long, EOS included.

        A tokenizer that closes a text itself keeps all of its special tokens (BART, T5, mBART's languages); any other
        (causal ones) gets no BOS, since a target continues its context, and EOS appended.
        """
        tokenizer = self.generator
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        closed = self._closes_texts(eos)
        options = {"truncation": True, "max_length": max_length} if closed and max_length else {}
        ids = tokenizer(text_target=list(texts), add_special_tokens=closed, padding=False, **options)["input_ids"]
        if closed or eos is None:
            return [list(row)[:max_length] for row in ids]
        return [[*list(row)[: None if max_length is None else max_length - 1], eos] for row in ids]

    def target_frame(self) -> tuple[list[int], int]:
        """The tokens that every target begins with (of a causal generator none), and the one that ends it.

        Raises:
            InputError: targets have no end of their own.
        """
        empty, other = self.target_ids(["", "a"])
        for place, (token, another) in enumerate(zip(empty, other, strict=False)):
            if token != another:
                return empty[:place], token
        raise InputError("The generator's tokenizer ends answers with no token of its own; give it an EOS token.")

    def _closes_texts(self, eos: int | None) -> bool:
        """Whether EOS stands among the last two tokens of a text (mBART puts its language code last)."""
        return eos in self.generator(text_target="a")["input_ids"][-2:]

    def _targets(
        self,
        texts: str | Sequence[str] | None,
        *,
        alone: bool = False,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> BatchEncoding:
        """Targets, cut and padded as transformers' tokenizers understand it; ``others`` say nothing of targets."""
        assert texts is not None
        single = isinstance(texts, str)
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        cuts = truncation is True or (truncation and TruncationStrategy(truncation) != "do_not_truncate")
        pads = PaddingStrategy("longest" if padding is True else padding or "do_not_pad")
        if max_length is None and self.generator.model_max_length <= LARGE_INTEGER:
            max_length = self.generator.model_max_length
        limit = max_length if cuts else None
        rows = self.target_ids([texts] if isinstance(texts, str) else texts, limit)
        fill = next((t for t in (self.generator.pad_token_id, self.generator.eos_token_id) if t is not None), 0)
        width: int | None = None
        if pads != "do_not_pad":
            multiple = pad_to_multiple_of or 1
            width = max([(max_length or 0) if pads == "max_length" else 0, *map(len, rows)])
            width = math.ceil(width / multiple) * multiple
        if return_tensors is not None and len({len(row) for row in rows}) > 1 and width is None:
            raise InputError("The targets have different lengths; pass padding=True to make one tensor of them.")

        def padded(value: int, rows: list[list[int]]) -> list[list[int]]:
            return rows if width is None else [row + [value] * (width - len(row)) for row in rows]

        data = {"labels": padded(IGNORED, rows)}
        if alone:
            data["input_ids"] = padded(fill, rows)
            data["attention_mask"] = padded(0, [[1] * len(row) for row in rows])
        if return_tensors is None and single:
            return BatchEncoding({name: values[0] for name, values in data.items()})
        return BatchEncoding(data, tensor_type=return_tensors)
