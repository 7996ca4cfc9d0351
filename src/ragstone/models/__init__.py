"""Configuration, tokenizers and the model classes."""

from ragstone.models.body import RagModel
from ragstone.models.configuration import RagConfig
from ragstone.models.generation import RagForGeneration, RagSequenceForGeneration, RagTokenForGeneration
from ragstone.models.outputs import RagInputs, RagOutput
from ragstone.models.protocols import Retriever
from ragstone.models.tokenization import RagTokenizer

__all__ = [
    "RagConfig",
    "RagForGeneration",
    "RagInputs",
    "RagModel",
    "RagOutput",
    "RagSequenceForGeneration",
    "RagTokenForGeneration",
    "RagTokenizer",
    "Retriever",
]
