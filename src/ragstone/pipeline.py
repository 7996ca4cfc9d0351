"""What most people use: a question in, an answer with its evidence out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ragstone import local
from ragstone.answers import Answer, Evidence, Score
from ragstone.decoding import RagGenerateOutput, Spans, check_decode, score_candidates
from ragstone.decoding.options import option
from ragstone.encoders.precision import choose_dtype, parse_device, parse_dtype
from ragstone.errors import EncoderMismatchError, InputError
from ragstone.generators.prompts import report_truncation
from ragstone.knowledge import Hit, KnowledgeBase, Passage
from ragstone.knowledge.checks import check_count
from ragstone.knowledge.passages import as_passages, check_text
from ragstone.models import RagConfig, RagForGeneration, RagSequenceForGeneration, RagTokenForGeneration, RagTokenizer
from ragstone.models.body import nothing_found
from ragstone.retriever import RagRetriever, saved_index, stack_hits

__all__ = ["RagPipeline"]

METHODS: dict[str, type[RagForGeneration]] = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
PROBE_TOKENS = 256
"""Length of the context on which float32 and bfloat16 are compared."""
MAX_PROBED_PARAMETERS = 2_000_000_000
"""A larger generator keeps the dtype it was loaded in: the probe needs a second copy of it."""


def questions_per_batch(device: torch.device, k: int) -> int:
    """How many questions of K passages are decoded at once: with 200 tokens each, 8,000 tokens of context on a CPU.

    >>> [questions_per_batch(torch.device(name), k) for name in ("cpu", "cuda") for k in (1, 5, 20)]
    [8, 8, 2, 32, 32, 8]
    """
    most = 8 if device.type == "cpu" else 32
    return max(1, min(most, most * 5 // max(k, 1)))


@dataclass(frozen=True)
class _Prepared:
    """B questions with their contexts (B·K, S), scores (B, K) and passages, ready to decode.

    The null passage, if there is one, counts among the K and is the last.
    """

    questions: list[str]
    passages: list[list[Passage]]
    context_input_ids: Tensor
    context_attention_mask: Tensor
    doc_scores: Tensor
    prompt_lengths: Tensor

    def of(self, b: int) -> _Prepared:
        """Question b alone."""
        width = self.doc_scores.shape[1]
        rows = slice(b * width, (b + 1) * width)
        return _Prepared(
            [self.questions[b]],
            [self.passages[b]],
            self.context_input_ids[rows],
            self.context_attention_mask[rows],
            self.doc_scores[b : b + 1],
            self.prompt_lengths[b : b + 1],
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """As the model takes them."""
        return {
            "context_input_ids": self.context_input_ids,
            "context_attention_mask": self.context_attention_mask,
            "doc_scores": self.doc_scores,
        }


class RagPipeline:
    """A model, its tokenizers and a knowledge base.

    Args:
        model: a :class:`ragstone.RagTokenForGeneration` or :class:`ragstone.RagSequenceForGeneration`.
        tokenizer: its :class:`ragstone.RagTokenizer`.
        knowledge_base: a :class:`ragstone.KnowledgeBase`, its folder, or None where passages are always given.
        passage_encoder: encodes given passages; see :class:`ragstone.RagRetriever`.
    """

    def __init__(
        self,
        model: RagForGeneration,
        tokenizer: RagTokenizer,
        knowledge_base: KnowledgeBase | str | Path | None = None,
        *,
        passage_encoder: Any = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        index: Any = KnowledgeBase.open(knowledge_base) if isinstance(knowledge_base, str | Path) else knowledge_base
        self.retriever = RagRetriever(
            model.config,
            tokenizer.question_encoder,
            tokenizer.generator,
            [] if index is None else index,
            passage_encoder,
        )
        model.set_retriever(self.retriever)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        knowledge_base: KnowledgeBase | str | Path | None = None,
        method: Literal["token", "sequence"] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **fields: Any,
    ) -> RagPipeline:
        """Load a checkpoint, or ``"local"``: the default models that need no hub.

        Args:
            name_or_path: a folder that ``save_pretrained`` of Ragstone or transformers wrote, a name, or ``"local"``.
            knowledge_base: see the class; by default the one, or the passages, saved inside the checkpoint.
            method: ``"token"`` or ``"sequence"``; the saved class by default, ``"token"`` for ``"local"``.
            device: where the model runs; CUDA if there is one.
            dtype: what it computes in; ``None`` chooses bfloat16 where a short probe finds it quicker, else float32.
            fields: of :class:`ragstone.RagConfig`, in place of the saved ones.

        Raises:
            ModelError: the checkpoint is missing or damaged.
        """
        if method is not None and method not in METHODS:
            raise InputError(f"method is {method!r}; choose 'token' or 'sequence'.")
        device = parse_device(device)
        name = str(name_or_path)
        index: Any = knowledge_base
        saved = ""
        if name not in (local.LOCAL, local.UNTRAINED):
            config = RagConfig.load(name)
            saved = (config.architectures or [""])[0]
            if index is None:
                index = saved_index(config, Path(name))
        kind = METHODS[method or ("sequence" if "Sequence" in saved else "token")]
        model, tokenizer = kind.from_pretrained(name, **fields), RagTokenizer.from_pretrained(name)
        model = model.to(device=device).eval()
        _set_dtype(model, dtype)
        if model.config.passage_encoder and (Path(name) / model.config.passage_encoder).is_dir():
            model.config.passage_encoder = str(Path(name) / model.config.passage_encoder)
        return cls(model, tokenizer, index)

    @property
    def knowledge_base(self) -> KnowledgeBase | None:
        """The knowledge base, if there is one; `set_knowledge_base` puts another in its place."""
        return self.retriever.index if isinstance(self.retriever.index, KnowledgeBase) else None

    @torch.no_grad()
    def set_knowledge_base(self, knowledge_base: KnowledgeBase | str | Path) -> None:
        """Answer from another knowledge base from now on; no model is loaded again (paper §4.5, index hot-swapping).

        Safe while other threads ask: a call that has begun ends with the base that it began with.

        Raises:
            EncoderMismatchError: the vectors of the base are not of the encoder that the present one has, or not as wide
                as the model's question vectors.
        """
        swapped = self.retriever.with_index(knowledge_base)
        base = swapped.index
        if not isinstance(base, KnowledgeBase):
            raise InputError(f"knowledge_base is {knowledge_base!r}; give a KnowledgeBase or its folder.")
        ids, mask = self.retriever.tokenize_questions(["?"])
        device = self.model.generator.device
        width = self.model.rag.encode_questions(ids.to(device), mask.to(device)).shape[1]
        if base.width != width:
            raise EncoderMismatchError(
                f"{base.path} holds vectors of width {base.width}, but the model's question vectors have width {width}; "
                "give a base that was made with the model's passage encoder, or re-encode this one with `ragstone reindex`"
            )
        if self.knowledge_base is not None:
            base.check_same_encoder(self.knowledge_base)
        self.model.set_retriever(swapped)
        self.retriever = swapped

    @property
    def method(self) -> str:
        """``"token"`` or ``"sequence"``."""
        return self.model.method

    def clear_cache(self) -> None:
        """Forget what a causal generator has read of passages (``model.rag.prompt_store``)."""
        if self.model.rag.prompt_store is not None:
            self.model.rag.prompt_store.clear()

    @overload
    def __call__(self, question: str, **options: Any) -> Answer: ...

    @overload
    def __call__(self, question: Sequence[str], **options: Any) -> list[Answer]: ...

    def __call__(
        self,
        question: str | Sequence[str],
        *,
        k: int | None = None,
        search: Literal["dense", "exact", "keyword", "hybrid"] = "dense",
        where: str | None = None,
        prior: Literal["dense", "search"] = "dense",
        passages: Sequence[Any] | None = None,
        decode: Literal["thorough", "fast"] = "thorough",
        max_new_tokens: int | None = None,
        num_return_sequences: int | None = None,
        extractive: bool | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answer a question, or a list of them.

        Args:
            question: a question, or B of them for a list of answers.
            k: passages a question (K); the model's ``n_docs`` by default.
            search: how passages are found; see :meth:`ragstone.KnowledgeBase.search`.
            where: a filter on passages, as SQL, e.g. ``"source = 'report.pdf'"``.
            prior: ``"dense"``: s = τ·(q·d) whatever the search; ``"search"``: the search's own scores as logits (the
                paper's BM25 ablation).
            passages: read these instead of retrieving: strings, dicts, ``Passage`` or ``Hit`` objects; for a list of
                questions one list for all, or a list of lists. With ``prior="search"`` the scores of the hits are used.
                Nothing is searched then, so ``search`` and ``where`` stay at their defaults and ``k`` leaves none out.
            decode: how RAG-Sequence ranks hypotheses; RAG-Token has no hypotheses to rank and answers alike with either.
            max_new_tokens: of an answer; 32 unless ``max_length`` or the ``generation_config`` given says otherwise.
            num_return_sequences: answers a question, the most probable first when sampling; all but the first are
                ``Answer.alternatives``. 1 unless the ``generation_config`` given says otherwise.
            extractive: answer with a span of a passage or title, word for word (:class:`ragstone.decoding.Spans`); the
                probabilities remain the model's own. ``config.extractive`` by default.
            options: those of transformers' ``generate``, and RAG-Sequence's own: with ``complete=False``, passages that
                cannot change the answer stay unread, and ``Answer.log_prob_bounds`` say how probable it is.

        Raises:
            InputError: an empty question, no passage found (unless there is a null passage to answer from), or options that
                do not fit.
        """
        questions, single = _listed(question)
        given = _given_hits(passages, len(questions), single)
        _check_unsearched(given, k, search, where)
        retriever = self.retriever  # another thread may call `set_knowledge_base` meanwhile
        options = _with_defaults(options, max_new_tokens, num_return_sequences)
        check_decode(decode)
        if isinstance(self.model, RagSequenceForGeneration):
            options["decode"] = decode
        constrained = options.get("prefix_allowed_tokens_fn") is not None
        if extractive and constrained:
            raise InputError(
                "extractive=True and prefix_allowed_tokens_fn both say what may be written; leave one out."
            )
        extractive = self.model.config.extractive and not constrained if extractive is None else extractive
        sampled = option(self.model.rag.adapter(), options, "do_sample", False)
        answers: list[Answer] = []
        for prepared in self._batches(retriever, questions, k, search, where, prior, given):
            if extractive:
                options["prefix_allowed_tokens_fn"] = self._spans(prepared)
            lengths = prepared.prompt_lengths if self.model.config.causal else None
            out = self.model.generate(
                **prepared.inputs, prompt_lengths=lengths, return_dict_in_generate=True, **options
            )
            answers += self._answers(prepared, out, ranked=not sampled)
        return answers[0] if single else answers

    def choose(
        self,
        question: str | Sequence[str],
        choices: Sequence[str],
        *,
        k: int | None = None,
        search: Literal["dense", "exact", "keyword", "hybrid"] = "dense",
        where: str | None = None,
        prior: Literal["dense", "search"] = "dense",
        passages: Sequence[Any] | None = None,
    ) -> Any:
        """Answer with the most probable of given strings, as in classification; the others are ``Answer.alternatives``.

        Every choice is scored in full, end of sequence included, under the same passages, which are read once.

        Args:
            question: a question, for an `Answer`, or B of them, for a list.
            choices: the strings, such as labels.
            k, search, where, prior, passages: as in calling the pipeline.
        """
        questions, single = _listed(question)
        given = _given_hits(passages, len(questions), single)
        _check_unsearched(given, k, search, where)
        retriever = self.retriever  # another thread may call `set_knowledge_base` meanwhile
        _check_choices(choices)
        candidates = self.tokenizer.target_ids(choices)
        answers: list[Answer] = []
        for prepared in self._batches(retriever, questions, k, search, where, prior, given):
            inputs = self.model.rag.prepare(**prepared.inputs, prompt_lengths=prepared.prompt_lengths)
            out = score_candidates(*self.model.answer_contexts(inputs), candidates, method=self.method)
            answers += self._answers(prepared, out, ranked=False)
        return answers[0] if single else answers

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """Yield an answer while it is found; options as in calling the pipeline.

        RAG-Token yields tokens as they are decided, and joined they are the answer of a greedy search. RAG-Sequence yields
        the whole of its best answer so far whenever that changes, and the last one is the answer.
        """
        if not isinstance(question, str):
            raise InputError(f"stream answers one question, not {question!r}; call the pipeline itself for several.")
        from queue import SimpleQueue
        from threading import Thread

        from transformers import TextStreamer

        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        tokenizer = self.tokenizer.generator

        class Pieces(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.put(text)

        def best(b: int, tokens: tuple[int, ...]) -> None:
            pieces.put(tokenizer.decode(tokens, skip_special_tokens=True).strip())

        def work() -> None:
            watching = {"watcher": best} if self.method == "sequence" else {"streamer": Pieces(tokenizer, **plain)}
            try:
                answer = self(question, **watching, **options)
                if self.method == "sequence":
                    pieces.put(answer.text)
                pieces.put(None)
            except BaseException as error:  # handed to the reader below, whatever it is
                pieces.put(error)

        plain = {"skip_prompt": False, "skip_special_tokens": True}
        Thread(target=work, daemon=True).start()
        before = None
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece and not (self.method == "sequence" and piece == before):
                yield piece
            before = piece

    def _batches(
        self,
        retriever: RagRetriever,
        questions: list[str],
        k: int | None,
        search: str,
        where: str | None,
        prior: str,
        given: list[list[Hit]] | None,
    ) -> Iterator[_Prepared]:
        """As many questions at once as their passages allow."""
        k = check_count("k", self.model.config.n_docs if k is None else k)
        most = min(k, len(retriever.index)) if given is None else max(map(len, given), default=0)
        size = questions_per_batch(self.model.generator.device, most)
        for start in range(0, len(questions), size):
            part = slice(start, start + size)
            rows = None if given is None else given[part]
            yield self._prepare(retriever, questions[part], k, search, where, prior, rows)

    @torch.no_grad()
    def _prepare(
        self,
        retriever: RagRetriever,
        questions: list[str],
        k: int,
        search: str,
        where: str | None,
        prior: str,
        given: list[list[Hit]] | None,
    ) -> _Prepared:
        """Find (or take) passages, score them, write their contexts."""
        if prior not in ("dense", "search"):
            raise InputError(f"prior is {prior!r}; choose 'dense' or 'search'.")
        rag, device = self.model.rag, self.model.generator.device
        ids, mask = retriever.tokenize_questions(questions)
        vectors = rag.encode_questions(ids.to(device), mask.to(device)).float()
        if given is not None:
            hits = given if prior == "search" else self._encode_given(retriever, given)
        else:
            hits = retriever.retrieve(vectors.cpu().numpy(), k, questions=questions, search=search, where=where)
        if rag.null_passage is None:
            _check_found(questions, hits)
        k = max(1, *map(len, hits))  # no slot is left empty by all questions
        if prior == "search":
            if not all(_is_number(hit.score) for row in hits for hit in row):
                raise InputError("prior='search' with passages of your own needs their scores; pass Hit objects.")
            rows = [[float(hit.score) for hit in row] + [-np.inf] * (k - len(row)) for row in hits]
            scores = torch.tensor(rows, dtype=torch.float32, device=device)
        else:
            stacked = (torch.from_numpy(values).to(device) for values in stack_hits(hits, k, vectors.shape[1]))
            scores = rag.score_passages(vectors, *stacked)
        passages = [[hit.passage for hit in row] for row in hits]
        null = rag.null_passage is not None
        contexts = retriever.contexts(questions, passages, k, null_passage=null)
        report_truncation(contexts.truncated, self.model.config.prompt_format().max_length)
        given_contexts = contexts.input_ids.to(device), contexts.attention_mask.to(device)
        scores = rag.add_null_passage(scores, vectors)
        return _Prepared(questions, passages, *given_contexts, scores, contexts.prompt_lengths.to(device))

    @staticmethod
    def _encode_given(retriever: RagRetriever, given: list[list[Hit]]) -> list[list[Hit]]:
        """Vectors of the passages that the caller brought, each encoded once."""
        flat = list({id(h.passage): h.passage for row in given for h in row}.values())
        vectors = retriever.encode_passages(flat)
        place = {id(p): n for n, p in enumerate(flat)}
        return [[replace(h, vector=vectors[place[id(h.passage)]]) for h in row] for row in given]

    def _spans(self, prepared: _Prepared) -> Callable[[int, Tensor], list[int]]:
        """What ``generate`` calls to learn which tokens continue a span of a question's passages."""
        prompt = 0 if self.model.rag.adapter().start_token_id is None else 1
        opening, end = self.tokenizer.target_frame()
        limit = self.model.config.prompt_format().max_length  # a word has at least one token: no more of them are read
        spans = [
            Spans(self.tokenizer.generator, [text for p in row for text in (p.title, p.text)], opening, end, limit)
            for row in prepared.passages
        ]
        return lambda b, tokens: spans[b].next_tokens(tokens[prompt:].tolist())

    def _answers(self, prepared: _Prepared, out: RagGenerateOutput, *, ranked: bool) -> list[Answer]:
        assert out.sequences is not None
        n = len(out.sequences) // len(prepared.questions)
        answers = []
        for b in range(len(prepared.questions)):
            found = [self._answer(prepared, b, out, b * n + i) for i in range(n)]
            first, *others = found if ranked else sorted(found, key=lambda answer: -answer.log_prob)
            answers.append(replace(first, alternatives=tuple(others)))
        return answers

    def _answer(self, prepared: _Prepared, b: int, out: RagGenerateOutput, row: int) -> Answer:
        """Row ``row`` of the output as an answer to question ``b``."""
        assert out.sequences is not None
        assert out.scored is not None
        assert out.log_probs is not None
        assert out.posteriors is not None
        generator = self.tokenizer.generator
        counts = out.scored[row]
        tokens = out.sequences[row][-len(counts) :][counts].tolist() if len(counts) else []
        log_prob = out.log_probs[row]
        low, high = (log_prob, log_prob) if out.log_prob_bounds is None else out.log_prob_bounds[row]
        posterior = out.posteriors[row]
        by_token = posterior.unsqueeze(1).expand(-1, len(tokens))
        if out.token_posteriors is not None:
            by_token = out.token_posteriors[row][:, counts]
        real = len(prepared.passages[b])
        prior = prepared.doc_scores[b].softmax(dim=0)
        null = self.model.rag.null_passage is not None
        evidence = zip(
            prepared.passages[b],
            prepared.doc_scores[b, :real].tolist(),
            prior[:real].tolist(),
            posterior[:real].tolist(),
            strict=True,
        )
        alone, unconditional = prepared.of(b), out.nothing is None
        return Answer(
            question=prepared.questions[b],
            text=generator.decode(tokens, skip_special_tokens=True).strip(),
            log_prob=float(log_prob),
            log_prob_bounds=(float(low), float(high)),
            passages=tuple(Evidence(*values) for values in evidence),
            tokens=tuple(generator.decode([token]) for token in tokens),
            token_posteriors=by_token[:real].float().cpu().numpy(),
            method=self.method,
            null_prior=float(prior[-1]) if null else 0.0,
            null_posterior=float(posterior[-1]) if null else 0.0,
            nothing=0.0 if out.nothing is None else float(out.nothing[row]),
            _scorer=lambda text: self._score(alone, text, empty_too=unconditional or not text),
        )

    @torch.no_grad()
    def _score(self, prepared: _Prepared, text: str, *, empty_too: bool) -> Score:
        inputs = self.model.rag.prepare(**prepared.inputs, prompt_lengths=prepared.prompt_lengths)
        contexts = self.model.answer_contexts(inputs, empty_too=empty_too)
        out = score_candidates(*contexts, self.tokenizer.target_ids([text]), method=self.method)
        assert out.log_probs is not None
        assert out.posteriors is not None
        posterior = out.posteriors[0].tolist()
        null = 0.0 if self.model.rag.null_passage is None else posterior[-1]
        return Score(float(out.log_probs), tuple(posterior[: len(prepared.passages[0])]), null)


def _listed(question: str | Sequence[str]) -> tuple[list[str], bool]:
    """The questions, none of them empty, and whether there was a single one."""
    questions = [question] if isinstance(question, str) else _as_list("question", question, "a string or a list")
    for text in questions:
        if not isinstance(text, str):
            raise InputError(f"A question is {_shown(text)}; write it as a string.")
        if not text.strip():
            raise InputError(f"The question {text!r} is empty; write a question.")
        check_text(f"The question {_shown(text)}", text)
    return questions, isinstance(question, str)


def _as_list(name: str, values: Any, wanted: str) -> list[Any]:
    """What can be iterated over as a list; of a mapping that would be its keys, which nobody means."""
    try:
        if not isinstance(values, Mapping | bytes):
            return list(values)
    except TypeError:
        pass
    raise InputError(f"{name} is {_shown(values)}; pass {wanted}.")


def _shown(value: object) -> str:
    """A value as an error names it.

    >>> _shown(5), _shown("why? " * 20)
    ('5', "'why? why? why? why? why? why? why? why? why? why? why? why?…'")
    """
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:59]}…")
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and not math.isnan(value)
    except TypeError:
        return False


def _check_found(questions: Sequence[str], hits: Sequence[Sequence[Hit]]) -> None:
    """Say which question has nothing to be answered from; the model itself knows the questions by number only."""
    for question, row in zip(questions, hits, strict=True):
        if not row:
            raise nothing_found(f"the question {_shown(question)}")


def _check_unsearched(given: list[list[Hit]] | None, k: int | None, search: str, where: str | None) -> None:
    """Refuse options of a search beside passages to be read as they are."""
    if given is None:
        return
    for name, value, default in (("search", search, "dense"), ("where", where, None)):
        if value != default:
            raise InputError(
                f"{name}={value!r} is for a search, and the passages given are read as they are; "
                f"leave out {name} or passages."
            )
    most = max(map(len, given), default=0)
    if k is not None and check_count("k", k) < most:
        raise InputError(f"k={k} is for a search, and all {most} passages given are read; leave out k, or pass fewer.")


def _check_choices(choices: Sequence[str]) -> None:
    if choices and not isinstance(choices, str):
        for choice in choices:
            check_text("a choice", choice)
        if len(set(choices)) == len(choices):
            return
    raise InputError(f"choices is {choices!r}; pass a list of different strings.")


def _with_defaults(options: dict[str, Any], max_new_tokens: int | None, answers: int | None) -> dict[str, Any]:
    """What ``generate`` is told: 32 tokens and one answer where neither the caller nor the config given says otherwise."""
    if "return_dict_in_generate" in options:
        raise InputError("return_dict_in_generate has no place here: a pipeline returns answers; leave it out.")
    config = options.get("generation_config")
    lengths = options.get("max_length"), *(getattr(config, name, None) for name in ("max_new_tokens", "max_length"))
    if max_new_tokens is None and all(length is None for length in lengths):
        max_new_tokens = 32
    if answers is None:
        answers = getattr(config, "num_return_sequences", None)
    options = {
        **options,
        "num_return_sequences": 1 if answers is None else check_count("num_return_sequences", answers),
    }
    return options if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}


def _given_hits(passages: Sequence[Any] | None, batch: int, single: bool) -> list[list[Hit]] | None:
    """B lists of hits from what the caller gave: one list for all questions, or a list of lists."""
    if passages is None:
        return None
    if isinstance(passages, _ONE):
        raise InputError("passages is one passage; pass a list of them.")
    rows = _as_list("passages", passages, "a list of them")
    lists = 0 if single else sum(isinstance(row, Iterable) and not isinstance(row, _ONE) for row in rows)
    nested = lists > 0
    if nested and lists < len(rows):
        raise InputError("passages holds lists beside single passages; pass one list, or one a question.")
    if nested and lists != batch:
        raise InputError(f"passages holds {lists} lists for {batch} questions; pass one list, or one a question.")
    given = [_as_hits(row) for row in rows] if nested else [_as_hits(rows)] * batch
    if not all(given):
        raise InputError("passages is empty; pass at least one, or leave it out to search the knowledge base.")
    return given


_ONE = (str, Mapping, Passage, Hit)


def _as_hits(values: Sequence[Any]) -> list[Hit]:
    """Passages that no search found have no score."""
    hits = [value if isinstance(value, Hit) else Hit(value, np.nan) for value in values]
    passages = as_passages([hit.passage for hit in hits])
    return [replace(hit, passage=passage) for hit, passage in zip(hits, passages, strict=True)]


def _set_dtype(model: RagForGeneration, dtype: torch.dtype | str | None) -> None:
    """Both parts in ``dtype``; None leaves the question encoder as it is and decides the generator's by measuring."""
    wanted = parse_dtype(dtype)
    generator = model.generator
    if wanted is not None:
        model.to(dtype=wanted)
    elif generator.dtype == torch.float32 and generator.num_parameters() <= MAX_PROBED_PARAMETERS:
        ids = torch.arange(PROBE_TOKENS).view(1, -1) % generator.config.get_text_config(decoder=True).vocab_size
        adapter_of = type(model.rag.adapter())

        def run(candidate: Any) -> Tensor:
            # One label: the logits of the first answer token, (1, V).
            return adapter_of(candidate).logits(ids, torch.ones_like(ids), ids[:, :1])[:, -1]

        # What pays depends on the shapes, not on the weights.
        key = json.dumps(generator.config.to_dict(), sort_keys=True, default=str)
        model.generator.to(choose_dtype(generator, run, key, generator.device))
