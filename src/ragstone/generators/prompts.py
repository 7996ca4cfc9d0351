"""Contexts: what a generator reads for one (passage, question).

For a seq2seq generator a context is ``prefix + title + title_sep + text + doc_sep + question``, as existing RAG checkpoints
expect it. For a causal one it is the whole prompt up to the answer, *defined* as the concatenation of two pieces that are
tokenised separately, header + passage | question + turn end, so that a passage's keys and values do not depend on what
follows. Truncation cuts the passage, never the question.

The null passage has neither title nor text. A seq2seq context keeps its separators all the same, a causal one leaves the
whole passage part out, its wording too, and goes from the header straight to the question.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ragstone.errors import InputError, ModelError
from ragstone.questions import is_unicode

__all__ = ["NULL_PASSAGE", "ContextBatch", "ContextBuilder", "PromptFormat", "pad_rows", "report_truncation"]

logger = logging.getLogger(__name__)

NULL_PASSAGE = ("", "")
"""Neither title nor text: what the generator reads in the slot of the null passage (paper, appendix F)."""

_CHARACTERS_PER_TOKEN = 100
"""No tokenizer turns fewer tokens than this fraction of a text's characters: longer text is cut before it is tokenised."""

_LONGEST_WORD = 64
"""Characters of a word within which every cut is tried; text without spaces is bisected."""

_WORD = re.compile(r"\S+")
_PASSAGE, _QUESTION = "\ue000passage\ue000", "\ue000question\ue000"


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a passage and a question become a context.

    ``prefix``, ``title_sep`` and ``doc_sep`` shape the context of a seq2seq generator; ``system``, ``passage`` and
    ``question`` that of a causal one, where ``{passage}`` stands for title and text and ``{question}`` for the question.
    ``passage`` ends with its placeholder: what follows a passage belongs to ``question``, which is never cut.
    ``max_length`` is in tokens of the whole context.
    """

    max_length: int = 300
    lowercase_questions: bool = False
    prefix: str = ""
    title_sep: str = " / "
    doc_sep: str = " // "
    system: str = ""
    passage: str = "{passage}"
    # The answer begins on a line of its own: its first word is then tokenised without a leading space, as targets are.
    question: str = "\n\nQuestion: {question}\nAnswer:\n"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InputError(f"max_combined_length is {self.max_length}; it must be at least 1 token.")
        for name, placeholder in (("passage", "{passage}"), ("question", "{question}")):
            if getattr(self, name).count(placeholder) != 1:
                raise InputError(f"prompt_{name} is {getattr(self, name)!r}; it must hold {placeholder} exactly once.")
        if not self.passage.endswith("{passage}"):
            raise InputError(
                f"prompt_passage is {self.passage!r}; it must end with {{passage}}, since the end is cut where a passage is "
                "too long. Put what follows into prompt_question."
            )


@dataclass(frozen=True)
class ContextBatch:
    """Contexts of B questions with K passages each, rows in the order b·K + k.

    ``input_ids`` and ``attention_mask`` are (B·K, S), padded to the longest on the right; ``truncated`` is (B, K) bool. An
    empty slot holds one token that nothing reads: its prior is 0. ``prompt_lengths`` (B, K) counts the tokens at the
    beginning of each causal context that depend on its passage alone; 0 for seq2seq contexts and empty slots.
    """

    input_ids: Tensor
    attention_mask: Tensor
    truncated: Tensor
    prompt_lengths: Tensor


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    cut: bool = False
    prompt_length: int = 0


@dataclass
class ContextBuilder:
    """Builds contexts for one generator.

    Args:
        tokenizer: the generator's tokenizer.
        form: see :class:`PromptFormat`.
        causal: whether the generator is a causal language model.
    """

    tokenizer: Any
    form: PromptFormat
    causal: bool = False
    _chat: tuple[str, str] = field(init=False, repr=False)
    _special_tokens: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Some chat models declare the marks of a turn as added tokens only.
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special_tokens = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._chat = self._chat_frame() if self.causal else ("", "")

    def __call__(self, questions: Sequence[str], passages: Sequence[Sequence[tuple[str, str] | None]]) -> ContextBatch:
        """Contexts of ``questions`` (B) with (title, text) ``passages`` (B × K); None is an empty slot."""
        if len(questions) != len(passages):
            raise InputError(f"{len(questions)} questions came with passages for {len(passages)}; pass one list each.")
        widths = {len(row) for row in passages}
        if len(widths) > 1:
            raise InputError(f"The questions have different numbers of passage slots {sorted(widths)}; fill with None.")
        for question in questions:
            if self._too_long(question):
                raise self._no_room(question)
        if self.form.lowercase_questions:
            questions = [question.lower() for question in questions]
        build = self._causal_rows if self.causal else self._seq2seq_rows
        rows = build([(q, passage) for q, row in zip(questions, passages, strict=True) for passage in row])
        input_ids, mask = pad_rows([row.ids for row in rows], fill=self._fill)
        shape = len(questions), max(widths, default=0)
        truncated = torch.tensor([row.cut for row in rows], dtype=torch.bool).view(shape)
        lengths = torch.tensor([row.prompt_length for row in rows], dtype=torch.long).view(shape)
        return ContextBatch(input_ids, mask, truncated, lengths)

    @property
    def _fill(self) -> int:
        tokenizer = self.tokenizer
        return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def _seq2seq_rows(self, pairs: list[tuple[str, tuple[str, str] | None]]) -> list[_Row]:
        whole = [self._join(question, passage) if passage else None for question, passage in pairs]
        ids = iter(self._tokenize([text for text in whole if text is not None], special=True))
        rows = []
        for (question, passage), text in zip(pairs, whole, strict=True):
            if passage is None or text is None:
                rows.append(_Row([self._fill]))
                continue
            row = next(ids)
            cut = any(map(self._too_long, passage)) or len(row) > self.form.max_length
            rows.append(_Row(self._cut_to_fit(question, passage) if cut else row, cut))
        return rows

    def _join(self, question: str, passage: tuple[str, str], cut: int | None = None) -> str:
        """The context as text, with the first ``cut`` characters of title and text (all by default)."""
        title, text = (part[: self._character_limit] for part in passage)
        if cut is not None:
            title, text = title[:cut], text[: max(cut - len(title), 0)]
        title, text, question = map(self._plain, (title, text, question))
        title = title.removeprefix('"').removesuffix('"')
        form = self.form
        return f"{form.prefix}{title}{form.title_sep}{text}{form.doc_sep}{question}".replace("  ", " ")

    def _cut_to_fit(self, question: str, passage: tuple[str, str]) -> list[int]:
        """The context with the longest beginning of the passage that fits.

        More words are more tokens, so whole words are bisected. Inside the word that no longer fits more characters can
        be fewer tokens, so every cut is tried.
        """

        def rows(cuts: Sequence[int]) -> list[list[int]]:
            return self._tokenize([self._join(question, passage, cut) for cut in cuts], special=True)

        def tokens(cut: int) -> int:
            return len(rows([cut])[0])

        longest = self.form.max_length
        title, text = (part[: self._character_limit] for part in passage)
        words = [
            (start, word.end()) for start, part in ((0, title), (len(title), text)) for word in _WORD.finditer(part)
        ]
        ends = [0, *(start + end for start, end in words), len(title) + len(text)]
        whole = bisect_right(ends, longest, key=tokens)
        if not whole:
            raise self._no_room(question)
        first, last = ends[whole - 1], ends[min(whole, len(ends) - 1)]
        if last - first > _LONGEST_WORD:
            first += bisect_right(range(first, last), longest, key=tokens) - 1
        tried = rows(range(first, min(first + _LONGEST_WORD, last) + 1))
        return next(row for row in reversed(tried) if len(row) <= longest)

    def _causal_rows(self, pairs: list[tuple[str, tuple[str, str] | None]]) -> list[_Row]:
        before, after = self._chat
        heads = [
            before + self.form.passage.replace("{passage}", self._plain("\n".join(filter(None, passage))))
            if any(passage)
            else before
            for _, passage in pairs
            if passage
        ]
        tails = {
            question: self.form.question.replace("{question}", self._plain(question)) + after for question, _ in pairs
        }
        head_ids = iter(self._tokenize(heads, special=False))
        tail_ids = dict(zip(tails, self._tokenize(list(tails.values()), special=False), strict=True))
        header = len(self._tokenize([before], special=False)[0]) if before else 0
        bos = self._leading_bos()
        rows = []
        for question, passage in pairs:
            if passage is None:
                rows.append(_Row([self._fill]))
                continue
            head, tail = next(head_ids), tail_ids[question]
            room = self.form.max_length - len(bos) - len(tail)
            if room < min(header, len(head)):
                raise self._no_room(question)
            begin = bos + head[:room]
            rows.append(_Row(begin + tail, len(head) > room or any(map(self._too_long, passage)), len(begin)))
        return rows

    def _chat_frame(self) -> tuple[str, str]:
        """What the chat template writes before and after the user's message; the system text alone where there is none."""
        system = self.form.system
        if not getattr(self.tokenizer, "chat_template", None):
            return (f"{system}\n\n" if system else ""), ""
        user = {"role": "user", "content": _PASSAGE + _QUESTION}
        messages = [{"role": "system", "content": system}, user] if system else [user]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises: some know no system role
            raise ModelError(
                f"The tokenizer's chat template cannot write the prompt ({error}); clear it, or set prompt_system=''."
            ) from error
        frame = re.fullmatch(f"(.*){_PASSAGE}{_QUESTION}(.*)", text, flags=re.DOTALL)
        if frame is None:
            raise ModelError("The tokenizer's chat template does not write the user's message as it is; clear it.")
        return frame[1], frame[2]

    def _leading_bos(self) -> list[int]:
        """BOS where the tokenizer begins every text with one; a chat template writes it itself."""
        if getattr(self.tokenizer, "chat_template", None):
            return []
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenize(["a"], special=True)[0][0] == bos else []

    def _plain(self, text: str) -> str:
        """Text without the strings of special tokens: a passage must not be able to end the user's turn."""
        return self._special_tokens.sub(" ", text[: self._character_limit])

    @property
    def _character_limit(self) -> int:
        return self.form.max_length * _CHARACTERS_PER_TOKEN

    def _too_long(self, text: str) -> bool:
        return len(text) > self._character_limit

    def _no_room(self, question: str) -> InputError:
        return InputError(
            f"The question {question[:60]!r}… alone fills the {self.form.max_length} tokens of a context; "
            "shorten it or raise max_combined_length."
        )

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a text longer than the model is cut below, so the tokenizer's warning would be wrong.
        try:
            out = self.tokenizer(texts, add_special_tokens=special, padding=False, truncation=False, verbose=False)
        except (TypeError, UnicodeError) as error:
            broken = next((text for text in texts if not is_unicode(text)), None)
            if broken is None:
                raise
            raise InputError(f"{broken[:60]!r} is not valid Unicode (it holds half a character); repair it.") from error
        return list(out["input_ids"])


def report_truncation(truncated: Tensor, max_length: int) -> None:
    """One warning for a call in which contexts lost the end of their passage; ``truncated`` is (B, K) bool."""
    if truncated.any():
        logger.warning(
            "%d of %d contexts were longer than %d tokens; their passages were cut.",
            int(truncated.sum()),
            truncated.numel(),
            max_length,
        )


def pad_rows(rows: Sequence[Sequence[int]], *, fill: int) -> tuple[Tensor, Tensor]:
    """Pad N rows of token ids on the right to the longest: ids (N, S) and mask (N, S)."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n, : len(row)] = 1
    return ids, mask
