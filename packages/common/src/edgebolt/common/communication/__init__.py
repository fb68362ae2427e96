"""Messages, codecs and the traffic ledger: what travels, how it is spelled, what it cost."""

from edgebolt.common.communication.codec import Codec, Dense, Float16
from edgebolt.common.communication.header import JSON
from edgebolt.common.communication.ledger import TrafficLedger
from edgebolt.common.communication.message import Message, MessageError, Tensors

__all__ = ["JSON", "Codec", "Dense", "Float16", "Message", "MessageError", "Tensors", "TrafficLedger"]
