"""Certificates of both sides, from files; plain text on the loopback interface alone."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

__all__ = ["DeviceKeys", "ServerKeys", "is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    Example::

        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
        (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(name: str, file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}={str(file)!r} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class ServerKeys:
    """Files of the cloud, all PEM.

    Args:
        cert, key: its certificate chain and private key.
        client_ca: the authority whose certificates devices must have.
    """

    cert: str | Path
    key: str | Path
    client_ca: str | Path

    def credentials(self) -> grpc.ServerCredentials:
        """For a server that asks devices for a certificate.

        Raises:
            ValueError: for a file that cannot be read.
        """
        pair = (_read("key", self.key), _read("cert", self.cert))
        return grpc.ssl_server_credentials([pair], _read("client_ca", self.client_ca), require_client_auth=True)


@dataclass(frozen=True)
class DeviceKeys:
    """Files of a device, all PEM.

    Args:
        cert, key: its certificate chain and private key.
        ca: the authority of the cloud's certificate.
    """

    cert: str | Path
    key: str | Path
    ca: str | Path

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel.

        Raises:
            ValueError: for a file that cannot be read.
        """
        return grpc.ssl_channel_credentials(_read("ca", self.ca), _read("key", self.key), _read("cert", self.cert))
