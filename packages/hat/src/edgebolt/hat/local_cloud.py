"""A cloud in a process of its own, on this machine: for demonstrations and measurements."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["local_cloud"]


@contextmanager
def local_cloud(model: str, *arguments: str, timeout: float = 60.0) -> Iterator[str]:
    """``python -m edgebolt.hat cloud`` at a free port, until the block is left in whatever way.

    Args:
        model: a folder, ``"smollm2"`` or a name on the hub.
        *arguments: more of the command line, such as ``"--threads", "1"``.
        timeout: seconds until it is healthy, once it listens, and until it has ended, once it is told to.

    Yields:
        Its address.

    Raises:
        RuntimeError: if it ends before it serves; with what it has said.

    Example::

        >>> with local_cloud("smollm2", "--batch-tokens", "512") as address:  # doctest: +SKIP
        ...     client = HatClient(address, model)
    """
    command = [sys.executable, "-m", "edgebolt.hat", "cloud", "--model", model, "--port", "0", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:  # a pipe that nobody reads would fill
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8")
        assert process.stdout is not None
        try:
            address = _address(process.stdout)
            if address is None:
                process.wait(timeout)
                log.seek(0)
                raise RuntimeError(f"The cloud has not started: {log.read()[-2000:].strip()}")
            with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                check(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
            yield address
        finally:
            process.terminate()  # it answers what has come in, and ends
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
            finally:  # too late, or told again to stop
                process.kill()
                process.wait()
                process.stdout.close()


def _address(said: IO[str]) -> str | None:
    """The address in the line that it says when it serves; None if it ends without."""
    return next((found[1] for line in said if (found := re.search(r" at (\S+:\d+),", line))), None)
