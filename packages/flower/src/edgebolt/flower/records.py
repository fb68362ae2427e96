"""What travels through Flower: who a client is, an order, an answer, each in records of built-ins and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from edgebolt.common.communication import Message, MessageError
from edgebolt.common.devices import DeviceProfile
from edgebolt.common.engines.engine import Answer, Order
from edgebolt.common.engines.job import versions as common_versions
from edgebolt.common.federated.visit import Visit
from edgebolt.flower.plain_bytes import dump_plain, load_plain

__all__ = [
    "Facts",
    "RecordError",
    "answer_records",
    "facts_records",
    "model_bytes",
    "order_records",
    "read_answer",
    "read_facts",
    "read_order",
    "versions",
]

_FORMAT = 1
_FACTS, _ORDER, _MODEL, _ANSWER = "edgebolt.client", "edgebolt.order", "edgebolt.model", "edgebolt.answer"
_MAX_BYTES = 2**31 - 2**20  # Flower's own limit for one object is 2 GiB


class RecordError(ValueError):
    """Received records are not what this side can read."""


@dataclass(frozen=True)
class Facts:
    """What a client says about itself before the run.

    Attributes:
        client: its index in the population.
        samples: training samples.
        batch_size: of its loader.
        drop_last: whether its loader drops an incomplete batch.
        versions: of the packages whose disagreement would change results, as one line.
        beginning: digest of the module's weights before the run.
    """

    client: int
    samples: int
    batch_size: int
    drop_last: bool
    versions: str
    beginning: str


@cache
def versions() -> str:
    """What runs here, as one line; which build of torch it is, for a CPU or a GPU, does not matter."""
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in sorted(common_versions().items()))


def facts_records(facts: Facts) -> RecordDict:
    """A client's answer to the question who it is."""
    return RecordDict({_FACTS: ConfigRecord({"format": _FORMAT, **asdict(facts)})})


def read_facts(records: RecordDict) -> Facts:
    """The inverse of :func:`facts_records`.

    Raises:
        RecordError: for other records.
    """
    record = _record(records, _FACTS)
    kinds = {"client": int, "samples": int, "batch_size": int, "drop_last": bool, "versions": str, "beginning": str}
    facts = Facts(**{name: _value(record, name, kind) for name, kind in kinds.items()})
    if facts.client < 0 or facts.samples < 0 or facts.batch_size < 1:
        raise RecordError(f"a client cannot be {facts}")
    return facts


def model_bytes(message: Message) -> bytes:
    """What an order's message is but for the visit: for all who are sent the same, the same.

    Raises:
        ValueError: for a message that is too long for Flower.
    """
    model = message.with_header(visit=None).to_bytes()
    if len(model) > _MAX_BYTES:
        raise ValueError(
            f"The model takes {len(model)} bytes and Flower carries {_MAX_BYTES}: train less of it (LoRA), or send it "
            "with a codec such as Float16()."
        )
    return model


def order_records(order: Order, run: dict[str, Any], model: bytes) -> RecordDict:
    """An order, and the model in a record of its own: Flower stores once what several clients are sent alike.

    Args:
        order: whose memory is the name of what the device keeps.
        run: what is the same for all orders of a run: built-ins.
        model: its message, of :func:`model_bytes`.
    """
    fields = {name: getattr(order, name) for name in order.__dataclass_fields__ if name != "message"}
    plain = {
        **fields,
        "visit": order.visit.to_plain(),
        "profile": asdict(order.profile),
        "delivered": [(visit.to_plain(), round) for visit, round in order.delivered],
    }
    return RecordDict(
        {
            _ORDER: ConfigRecord({"format": _FORMAT, "versions": versions(), "plain": dump_plain([plain, run])}),
            _MODEL: ConfigRecord({"bytes": model}),
        }
    )


def read_order(records: RecordDict) -> tuple[Order, dict[str, Any]]:
    """The inverse of :func:`order_records`.

    Raises:
        RecordError: for other records, and for those of other versions.
    """
    record = _record(records, _ORDER)
    there, here = _value(record, "versions", str), versions()
    if there != here:
        raise RecordError(f"the server has {there}, this client {here}: install the same versions")
    model = _value(_record(records, _MODEL, False), "bytes", bytes)
    try:
        plain, run = load_plain(_value(record, "plain", bytes))
        visit = Visit.from_plain(plain["visit"])
        order = Order(
            **{
                **plain,
                "visit": visit,
                "profile": DeviceProfile(**plain["profile"]),
                "message": Message.from_bytes(model).with_header(visit=visit.order()),
                "delivered": [(Visit.from_plain(told), round) for told, round in plain["delivered"]],
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the order cannot be read: {error}") from error
    return order, run


def answer_records(answer: Answer) -> RecordDict:
    """What a visit has come to; its memory is the name of what the device keeps."""
    figures = {name: getattr(answer, name) for name in ("loss_sum", "sample_flops", "memory")}
    record = ConfigRecord({"format": _FORMAT, "plain": dump_plain(figures)})
    if answer.message is not None:
        record["message"] = answer.message.to_bytes()
    return RecordDict({_ANSWER: record})


def read_answer(records: RecordDict, order: Order) -> Answer:
    """The inverse of :func:`answer_records`.

    Args:
        records: what the client has sent.
        order: that it answers.

    Raises:
        RecordError: for records that are no answer to the order.
    """
    record = _record(records, _ANSWER)
    try:
        figures = load_plain(_value(record, "plain", bytes))
        answer = replace(Answer(None), **figures)
        message = None if order.died else Message.from_bytes(_value(record, "message", bytes))
    except (MessageError, TypeError) as error:
        raise RecordError(f"the answer cannot be read: {error}") from error
    flops = answer.sample_flops
    numbers = (answer.loss_sum, *flops) if isinstance(flops, tuple) and len(flops) == 2 else ()
    if not numbers or not all(isinstance(number, float) for number in numbers):
        raise RecordError(f"the answer's figures are {figures}")
    if answer.memory is not None and not isinstance(answer.memory, str):
        raise RecordError(f"the answer names a memory {answer.memory!r}")
    if message is not None and message.header.get("client") != order.visit.client:
        raise RecordError(f"the answer is of client {message.header.get('client')!r}")
    if message is not None and not isinstance(message.header.get("report"), dict):
        raise RecordError("the answer has no report")
    return replace(answer, message=message)


def _record(records: RecordDict, name: str, versioned: bool = True) -> ConfigRecord:
    found = records.config_records.get(name)
    if found is None:
        raise RecordError(f"there is no record {name!r}, only {sorted(records)}")
    if versioned and found.get("format") != _FORMAT:
        raise RecordError(
            f"record {name!r} has format {found.get('format')!r}, this side reads {_FORMAT}: install the same "
            "edgebolt-flower on server and clients"
        )
    return found


def _value(record: ConfigRecord, name: str, kind: type) -> Any:
    value = record.get(name)
    if type(value) is not kind:
        raise RecordError(f"{name!r} is of type {type(value).__name__}, not {kind.__name__}")
    return value
