"""Averaging with a deadline: of a uniform cohort, and of Oort's."""

from __future__ import annotations

from edgebolt.common.federated import Algorithm, Closing, Deadline, Oort, ReportLoss, Selector

__all__ = ["ImpatientFedAvg", "OortFedAvg"]


class ImpatientFedAvg(Algorithm):
    """FedAvg that does not wait for ever: what comes after the deadline, or never, is left out.

    Source: McMahan et al. 2017; the deadline is common practice.

    Args:
        closing: when a round ends; default ``Deadline()``.

    Example::

        >>> from edgebolt.common.federated import Deadline
        >>> ImpatientFedAvg(Deadline(slack=2.0)).closing.slack
        2.0
    """

    def __init__(self, closing: Closing | None = None) -> None:
        super().__init__(closing=Deadline() if closing is None else closing)


class OortFedAvg(Algorithm):
    """The same with the participants that Oort chooses, who knows of losses and times and nothing of failures.

    Source: Lai et al., OSDI 2021; see :class:`~edgebolt.common.federated.Oort` for what is reduced. A device that was
    chosen and never delivered counts as one that was never seen.

    Args:
        closing: when a round ends; default ``Deadline()``.
        selector: default ``Oort()``.

    Example::

        >>> OortFedAvg(selector=Oort(penalty=1.0)).selector.penalty
        1.0
    """

    def __init__(self, closing: Closing | None = None, selector: Selector | None = None) -> None:
        super().__init__(
            selector=Oort() if selector is None else selector,
            callbacks=[ReportLoss()],
            closing=Deadline() if closing is None else closing,
        )
