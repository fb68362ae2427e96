"""Visits on the actors of Ray."""

from __future__ import annotations

import os
import queue
import signal
import sys
import tempfile
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from edgebolt.common.communication import Message
from edgebolt.common.engines.engine import Answer, Engine, Order
from edgebolt.common.engines.travel import dumped, same_tensors

if TYPE_CHECKING:
    from edgebolt.common.engines.job import Job

__all__ = ["RayEngine"]

_TRIES = 3
_NOTHING = Message({})  # in place of one that travels apart
_PATIENCE = 60.0  # seconds, after which the user hears that a worker has not begun
_SHARED = 16  # messages in Ray's object store that many visits may be sent


class RayEngine(Engine):
    """Trains visits on actors of `Ray <https://docs.ray.io>`_, each of which holds the module and the data once.

    The model goes to the object store once for all visits that are sent the same. Idle actors take the next visit.
    Device memories lie in the object store, so any actor may run any client. An actor that dies is replaced and its
    visit run again, from the same seed; a visit whose actor dies three times is a failed one. What the module's own
    code raises is raised in the user's process at once.

    Ray's own connections carry pickles and are not encrypted by default: use a cluster whose machines and network you
    trust (`Ray's own words <https://docs.ray.io/en/latest/ray-security/index.html>`_). A Ray that is started here
    listens on this machine's loopback alone, and is shut down after the fit.

    Args:
        num_workers: actors; ``None``: as many as the resources allow.
        resources_per_worker: what Ray sets aside for each: ``"cpu"`` (default 1, also its number of threads),
            ``"gpu"`` (a share such as 0.25 lets four actors use one) and your own names.
        address: of a running cluster, as in ``ray.init``: ``"auto"``, ``"host:port"``. ``None``: the one that this
            process is connected to, or else a new one on this machine, whatever ``RAY_ADDRESS`` says.

    Raises:
        ImportError: without Ray: ``pip install "edgebolt-common[ray]"``.
        ValueError: for arguments that make no sense, and at the beginning of a fit for more than the cluster has.

    Example::

        >>> from edgebolt.common.engines import RayEngine
        >>> from edgebolt.common.federated import FedAvg, FederatedStrategy
        >>> strategy = FederatedStrategy(FedAvg(), engine=RayEngine(num_workers=2))  # doctest: +SKIP
    """

    def __init__(
        self,
        num_workers: int | None = None,
        resources_per_worker: dict[str, float] | None = None,
        address: str | None = None,
    ) -> None:
        if num_workers is not None and (type(num_workers) is not int or num_workers < 1):
            raise ValueError(f"num_workers={num_workers!r}: use 1 or more, or None for as many as fit.")
        resources = {"cpu": 1.0, **(resources_per_worker or {})}
        if not all(amount >= 0 for amount in resources.values()) or not any(resources.values()):
            raise ValueError(f"resources_per_worker={resources_per_worker!r}: use amounts such as {{'cpu': 1}}.")
        _ray()
        self.num_workers, self.resources, self.address = num_workers, resources, address
        self.ahead = 1
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer | BaseException] = {}
        self._arrived = threading.Condition()
        self._shared: OrderedDict[tuple[object, ...], tuple[Message, Any]] = OrderedDict()
        self._asked = 0  # orders that have not been answered
        self._started = self._joined = self._kept = False

    def __enter__(self) -> RayEngine:
        """Keep the actors from fit to fit, until the block is left: starting them takes seconds."""
        self._kept = True
        return self

    def __exit__(self, *error: object) -> None:
        self._kept = False
        self._stop()

    def __repr__(self) -> str:
        return f"RayEngine(num_workers={self.num_workers}, resources_per_worker={self.resources})"

    def begin(self, job: Job) -> None:
        """Connect to Ray or start it, put the job into its store and wait until every actor is ready.

        Raises:
            TypeError: names what cannot be pickled.
            ValueError: if the cluster has less than is asked for.
            RuntimeError: if an actor cannot begin.
        """
        ray = _ray()
        device, share = job.module.device, self.resources.get("gpu", 0.0)
        if (device.type != "cpu") != bool(share):
            raise ValueError(
                f"The module is on {device} and each worker has {share:g} GPUs: give each a share with "
                "resources_per_worker={'gpu': 0.5}, or train on the CPU with Trainer(accelerator='cpu')."
            )
        if device.index:
            raise ValueError(f"The module is on {device}, and a worker's own is always the first: devices=1, and "
                             "CUDA_VISIBLE_DEVICES for another one.")  # fmt: skip
        blob = dumped(job, ray.cloudpickle.dumps)
        if ray.is_initialized() and self.address not in (None, "auto") and not self._joined:
            there = ray.get_runtime_context().gcs_address
            if there != self.address:
                raise ValueError(
                    f"address={self.address!r}, and this process is connected to Ray at {there}: leave out address, "
                    "or call ray.shutdown() before."
                )
        self._connect()
        if self._threads:  # the last fit was broken off before it could end
            self._dismiss()
            self._let_go()
        number = self._fitting([node["Resources"] for node in ray.nodes() if node["Alive"]])
        kept = bool(self._workers)
        if not kept:
            options = {
                "num_cpus": self.resources["cpu"],
                "num_gpus": self.resources.get("gpu", 0.0),
                "resources": {name: n for name, n in self.resources.items() if name not in ("cpu", "gpu")},
            }
            kind = ray.remote(_Actor).options(**options)
            self._workers = [_Worker(kind, job.versions, options) for _ in range(number)]
        stored = ray.put(np.frombuffer(blob, np.uint8))
        for worker in self._workers:
            worker.begin(stored, list(sys.path))
        for worker in self._workers:
            try:
                worker.wait()
            except ray.exceptions.RayActorError as error:
                if not kept:
                    raise RuntimeError(f"A worker could not begin: {error}") from error
                worker.anew()  # it has died since the last fit
                worker.wait()
        self.ahead = 4 * number
        self._orders, self._answers, self._asked = queue.SimpleQueue(), {}, 0
        # Two threads an actor: the next visit is on its way while one is being trained.
        self._threads = [
            threading.Thread(target=self._pull, args=(worker, self._orders, self._answers), daemon=True)
            for worker in self._workers * 2
        ]
        for thread in self._threads:
            thread.start()

    def _connect(self) -> None:
        """To Ray; what is asked of it before would start one by itself, on all of the machine's addresses."""
        ray = _ray()
        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)  # Ray takes it, and Lightning ends a fit by it
            self._started = self.address is None
            if self._started:
                _start_here(ray)
            else:
                ray.init(self.address, log_to_driver=False)
                self._joined = True
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _fitting(self, nodes: list[dict[str, float]]) -> int:
        """How many workers the nodes' resources allow; each has to fit into one node."""
        names = {"cpu": "CPU", "gpu": "GPU"}

        def fit(node: dict[str, float], name: str) -> int:
            there, amount = node.get(names.get(name, name), 0.0), self.resources[name]
            if name == "gpu" and amount < 1:  # a share is of one GPU
                return int(there) * int(1 / amount + 1e-9)
            return int(there / amount + 1e-9)

        asked = [name for name, amount in self.resources.items() if amount]
        fitting = sum(min(fit(node, name) for name in asked) for node in nodes)
        if fitting < (self.num_workers or 1):
            totals = {name: sum(node.get(names.get(name, name), 0.0) for node in nodes) for name in asked}
            raise ValueError(
                f"num_workers={self.num_workers} with {self._words(self.resources)} each is more than the "
                f"{len(nodes)} machine(s) of Ray have, {self._words(totals)} in all, which are enough for {fitting}: "
                "use fewer workers, or less for each with resources_per_worker=..."
            )
        return self.num_workers or fitting

    @staticmethod
    def _words(amounts: dict[str, float]) -> str:
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())

    def submit(self, order: Order) -> None:
        """Queue an order; the next idle actor takes it."""
        self._asked += 1
        self._orders.put(replace(order, message=self._stored(order.message)))

    def _stored(self, message: Message) -> Any:
        """The message in the object store, where visits that are sent the same find the same."""
        key = same_tensors(message)
        if key not in self._shared:
            blob = message.with_header(visit=None).to_bytes()
            self._shared[key] = (message, _ray().put(np.frombuffer(blob, np.uint8)))
            if len(self._shared) > _SHARED:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key][1]

    def answer(self, order: Order) -> Answer:
        """Wait for a visit."""
        with self._arrived:
            while order.number not in self._answers:
                self._arrived.wait()
            answer = self._answers.pop(order.number)
        self._asked -= 1
        if isinstance(answer, torch.OutOfMemoryError):
            answer.add_note("Use fewer workers, or a smaller batch_size. The last checkpoint is whole.")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _pull(
        self,
        worker: _Worker,
        orders: queue.SimpleQueue[Order | None],
        answers: dict[int, Answer | BaseException],
    ) -> None:
        while (order := orders.get()) is not None:
            answer: Answer | BaseException
            try:
                answer = worker.run(order)
            except BaseException as error:  # it is the user's process that raises it
                answer = error
            with self._arrived:
                answers[order.number] = answer
                self._arrived.notify_all()

    def put(self, memory: bytes) -> Any:
        """Into the object store."""
        self._connect()
        return _ray().put(np.frombuffer(memory, np.uint8))

    def get(self, stored: Any) -> bytes:
        """From the object store."""
        return bytes(_ray().get(stored))

    def end(self) -> None:
        """Stop the actors, and Ray if it was started here; inside ``with engine:`` they wait for the next fit."""
        if not self._kept:
            self._stop()
            return
        if self._asked:  # the fit was broken off, with visits on the way
            self._dismiss()
        self._let_go()

    def _let_go(self) -> None:
        for _ in self._threads:
            self._orders.put(None)
        for thread in self._threads:
            thread.join(timeout=10)
        self._threads = []
        self._shared.clear()

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _stop(self) -> None:
        self._dismiss()
        self._let_go()
        if self._started:
            self._started = False
            _ray().shutdown()


class _Worker:
    """One actor, or the one that has taken its place."""

    def __init__(self, kind: Any, *arguments: Any) -> None:
        self._kind, self._arguments = kind, arguments
        self._lock = threading.Lock()
        self._running: deque[int] = deque()  # what this actor has, in the order in which it runs it
        self._stopped = False
        self._actor: Any = None
        self._job: tuple[Any, ...] = ()
        self._begun: Any = None  # is there when the actor has begun with its job

    def begin(self, *job: Any) -> None:
        """Give the actor its job."""
        self._job = job
        if self._actor is None:
            self.anew()
        else:
            self._begun = self._actor.begin.remote(*job)

    def anew(self) -> None:
        """Another actor, in place of one that has died."""
        self._actor, self._running = self._kind.remote(*self._arguments), deque()
        self._begun = self._actor.begin.remote(*self._job)

    def wait(self) -> None:
        """Until the actor has begun; the user hears of it if that takes long."""
        while not _ray().wait([self._begun], timeout=_PATIENCE)[0]:
            rank_zero_warn(
                f"A worker has not begun within {_PATIENCE:g} s: Ray may be waiting for resources that others use "
                "(`ray status` says), or an import takes long."
            )
        _ray().get(self._begun)

    def run(self, order: Order) -> Answer:
        """Run a visit, again if the actor dies with it."""
        ray = _ray()
        died = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError)
        failures: list[str] = []
        while True:
            with self._lock:
                actor, running = self._actor, self._running
                running.append(order.number)
                answer, memory = actor.run.options(num_returns=2).remote(
                    replace(order, message=_NOTHING, memory=None), order.message, order.memory
                )
            try:
                message, remembers, figures = ray.get(answer)
            except died as error:
                with self._lock:
                    blamed = running[0] == order.number
                    if self._stopped:
                        return Answer(None, failure="the run has ended")
                    if actor is self._actor:
                        self.anew()
                if blamed:
                    failures.append(str(error).strip())
                if len(failures) == _TRIES:
                    return Answer(None, failure=failures[-1])
                with suppress(*died):  # the next try meets that too
                    self.wait()
                continue
            except BaseException:
                with self._lock:
                    running.remove(order.number)
                raise
            with self._lock:
                running.remove(order.number)
            received = None if message is None else Message.from_bytes(message.data)
            return Answer(received, memory=memory if remembers else None, **figures)

    def stop(self) -> None:
        """For good."""
        with self._lock:
            self._stopped = True
            if self._actor is not None:
                _ray().kill(self._actor)


class _Actor:
    """The process of a worker: takes orders from Ray and trains them in a ``Trainer.fit`` on a thread of its own."""

    def __init__(self, versions: dict[str, str], options: dict[str, Any]) -> None:
        from edgebolt.common.engines.job import versions as here

        if here() != versions:
            raise RuntimeError(
                f"The worker has {here()}, the server {versions}: install the same versions on all machines."
            )
        torch.set_num_threads(max(1, int(options["num_cpus"])))
        self._accelerator = "gpu" if options["num_gpus"] else "cpu"
        self._thread: threading.Thread | None = None

    def begin(self, job: np.ndarray, paths: list[str]) -> None:
        """Take up a job, after the former one; modules of the user's are found where the user's process finds them."""
        sys.path.extend(path for path in paths if path not in sys.path)
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(_ray().cloudpickle.loads(job.data),), daemon=True)
        self._thread.start()

    def _work(self, job: Job) -> None:
        import lightning.pytorch as pl
        from filelock import FileLock

        from edgebolt.common.engines.worker import work

        try:
            if isinstance(job.data, pl.LightningDataModule):
                user = os.getuid() if hasattr(os, "getuid") else ""
                with FileLock(Path(tempfile.gettempdir(), f"edgebolt-prepare-data-{user}.lock")):
                    job.data.prepare_data()  # the workers of a machine one after the other
                job.data.prepare_data = lambda: None  # type: ignore[method-assign]
            work(job, self._orders.get, self._finish, self._accelerator)
        except BaseException as error:
            self._answers.put(error)
            while self._orders.get() is not None:  # each visit that is still asked for comes to this
                self._answers.put(error)

    def _finish(self, order: Order, answer: Answer) -> None:
        self._answers.put(answer)

    def run(self, order: Order, message: np.ndarray, memory: np.ndarray | None) -> tuple[Any, Any]:
        """Train one visit; the memory is returned apart, so that it need not leave the store."""
        if self._thread is None:
            raise RuntimeError("The worker could not begin; see its own log.")
        received = Message.from_bytes(message.data).with_header(visit=order.visit.order())
        self._orders.put((replace(order, message=received), None if memory is None else memory.data))
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        update = None if answer.message is None else np.frombuffer(answer.message.to_bytes(), np.uint8)
        kept = None if answer.memory is None else np.frombuffer(answer.memory, np.uint8)
        figures = {"loss_sum": answer.loss_sum, "sample_flops": answer.sample_flops}
        return (update, kept is not None, figures), kept


def _start_here(ray: Any) -> None:
    """Start Ray so that it listens on the loopback interface.

    It would take the machine's outward address, and turns "127.0.0.1" into that; on systems where it makes no cluster
    it takes the loopback. That choice is a constant, and for the processes that it starts an environment variable.
    """
    from ray._private import ray_constants

    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    cluster, before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        ray.init(
            "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _system_config={"worker_niceness": 0},  # 15: whatever else runs on the machine would go first
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = cluster
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ImportError('RayEngine needs Ray: pip install "edgebolt-common[ray]".') from error
    return ray
