"""Any ``AutoModel`` -> vectors: checkpoints and their settings, pooling, batching, precision, fingerprint."""

from ragstone.encoders.checkpoint import EncoderSettings, fingerprint, load_backbone, read_encoder_settings
from ragstone.encoders.encoder import Encoder, EncoderSpec, load_encoder
from ragstone.encoders.pooling import POOLINGS, embed, pool

__all__ = [
    "POOLINGS",
    "Encoder",
    "EncoderSettings",
    "EncoderSpec",
    "embed",
    "fingerprint",
    "load_backbone",
    "load_encoder",
    "pool",
    "read_encoder_settings",
]
