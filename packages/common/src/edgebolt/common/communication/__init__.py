"""Messages, codecs and the traffic ledger: what travels, how it is spelled, what it cost."""

from edgebolt.common.communication.codec import Codec, Dense, Float16
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.hybrid_sign import HybridSign
from edgebolt.common.communication.ledger import TrafficLedger
from edgebolt.common.communication.message import Message, MessageError, Tensors
from edgebolt.common.communication.packed import PackedCodec, RatioCodec
from edgebolt.common.communication.quantized import QSGD, Int8, SignSGD
from edgebolt.common.communication.sparse_ternary import SparseTernary
from edgebolt.common.communication.top_k import TopK
from edgebolt.common.communication.update_compression import UpdateCompression

__all__ = [
    "JSON",
    "QSGD",
    "Codec",
    "Dense",
    "Float16",
    "HybridSign",
    "Int8",
    "Message",
    "MessageError",
    "PackedCodec",
    "RatioCodec",
    "SignSGD",
    "SparseTernary",
    "Tensors",
    "TopK",
    "TrafficLedger",
    "UpdateCompression",
]
