"""The server's side: a Flower ``ServerApp`` in which an ordinary ``Trainer`` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from edgebolt.flower.engine import FlowerEngine

__all__ = ["server_app"]


def server_app(
    fit: Callable[[FlowerEngine, Context], Any], timeout: float = 600.0, failures: int | None = None
) -> ServerApp:
    """A ``ServerApp`` that calls ``fit`` with an engine; the rest is the script that you have.

    Args:
        fit: builds a ``Trainer`` with ``FederatedStrategy(..., clients=engine.clients(loader), engine=engine)`` and
            calls its ``fit``; the context has the run's configuration, ``flwr run --run-config``.
        timeout: seconds from the sending of an order to its answer, training included.
        failures: visits in a row that fail and so end the run; ``None``: as many as there are clients, at least 5.

    Example::

        >>> import lightning as L
        >>> from edgebolt.common.federated import FedAvg, FederatedStrategy
        >>> def fit(engine, context):
        ...     loader = held_out()  # samples of the server's own
        ...     strategy = FederatedStrategy(FedAvg(), clients=engine.clients(loader, min_clients=3), engine=engine)
        ...     L.Trainer(max_epochs=context.run_config["rounds"], strategy=strategy).fit(Net(), loader)
        >>> app = server_app(fit)
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        fit(FlowerEngine(grid, timeout, failures), context)

    return app
