"""Searching for answers: RAG-Token over the marginal distribution, RAG-Sequence thorough, fast and by sampling."""

from ragstone.decoding.candidates import score_candidates
from ragstone.decoding.contexts import Contexts
from ragstone.decoding.marginal_search import rag_token_generate
from ragstone.decoding.outputs import RagGenerateOutput
from ragstone.decoding.rag_sequence import DECODE_MODES, check_decode, rag_sequence_generate
from ragstone.decoding.spans import Spans

__all__ = [
    "DECODE_MODES",
    "Contexts",
    "RagGenerateOutput",
    "Spans",
    "check_decode",
    "rag_sequence_generate",
    "rag_token_generate",
    "score_candidates",
]
