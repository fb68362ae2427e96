import shutil
import subprocess

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_hat import (
    LONGEST,
    WIDTH,
    Served,
    Stub,
    autoregressive,
    deep,
    engine,
    free_port,
    prompt,
    rows,
    spoken,
    talk,
    until,
)

from edgebolt.hat import CloudServer, DeviceKeys, DeviceRefusedError, Dialogue, GrpcLink, LinkLostError, ServerKeys
from edgebolt.hat.wire import SERVICE, hat_pb2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "cloud.example"])
def test_no_plain_text_beyond_this_machine(host):
    async def start():
        await CloudServer(engine(), WIDTH, "any", LONGEST).start(host, 0)

    import asyncio

    with pytest.raises(ValueError, match="give --tls-cert, --tls-key and --client-ca"):
        asyncio.run(start())
    with pytest.raises(ValueError, match=r"give keys \(--tls-cert, --tls-key, --ca\), or use a tunnel"):
        GrpcLink(f"{host}:50051", WIDTH, "any")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:http", ""])
def test_addresses_are_host_and_port(address):
    with pytest.raises(ValueError, match="write host:port"):
        GrpcLink(address, WIDTH, "any")


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="rows='float8': use one of"):
        GrpcLink("127.0.0.1:50051", WIDTH, "any", rows="float8")


class Authority:
    """Certificates of one authority, by openssl."""

    def __init__(self, folder, name) -> None:
        self.folder, self.name, self.count = folder, name, 0
        self._run("req", "-x509", *self._new(f"{name}-ca"), "-days", "2", "-subj", f"/CN={name}")
        self.ca = folder / f"{name}-ca.pem"

    def _run(self, *arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30, cwd=self.folder)

    @staticmethod
    def _new(name):
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        return [*key, "-keyout", f"{name}.key", "-out", f"{name}.pem"]

    def pair(self, name):
        """Files of a certificate and its key."""
        names = self.folder / "names.txt"
        names.write_text("subjectAltName=IP:127.0.0.1" if name == "cloud" else f"subjectAltName=DNS:{name}")
        mine = f"{self.name}-{name}"
        self._run("req", *self._new(mine), "-subj", f"/CN={name}")
        self._run(
            *("x509", "-req", "-in", f"{mine}.pem", "-out", f"{mine}.pem", "-days", "2", "-extfile", names),
            *("-CA", self.ca, "-CAkey", f"{self.name}-ca.key", "-CAcreateserial"),
        )
        return {"cert": self.folder / f"{mine}.pem", "key": self.folder / f"{mine}.key"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """A server with certificates, an authority that it trusts, and one that it does not."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with the openssl command, which is not installed")
    folder = tmp_path_factory.mktemp("keys")
    own, foreign = Authority(folder, "own"), Authority(folder, "foreign")
    keys = ServerKeys(**own.pair("cloud"), client_ca=own.ca)
    with Served(keys=keys) as served:
        yield served, own, foreign


def test_certificates_of_both_sides(secured):
    served, own, _ = secured
    link = served.link(keys=DeviceKeys(**own.pair("device"), ca=own.ca))
    assert spoken(Dialogue(talk(), link)) == autoregressive(prompt(9), 16)
    link.close()
    until(lambda: served.engine.conversations == 0)


def test_devices_without_a_certificate_of_the_authority_are_refused(secured):
    served, own, foreign = secured
    with pytest.raises(LinkLostError):  # to gRPC it looks as if the cloud had gone away
        served.link(keys=DeviceKeys(**foreign.pair("device"), ca=own.ca), timeout=5)
    with pytest.raises(LinkLostError):
        served.link(timeout=5)  # in plain text
    plain = grpc.ssl_channel_credentials(own.ca.read_bytes())
    with grpc.secure_channel(served.address, plain) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([]), timeout=5))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError):
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert served.engine.conversations == 0


def test_a_cloud_of_a_foreign_authority_is_refused(secured):
    served, own, foreign = secured
    with pytest.raises(DeviceRefusedError, match=r"not of the authority that was given.*CERTIFICATE_VERIFY_FAILED"):
        served.link(keys=DeviceKeys(**own.pair("other"), ca=foreign.ca), timeout=60)


def test_a_cloud_with_the_certificate_of_another_host_is_refused(secured):
    _, own, _ = secured
    elsewhere, keys = (
        ServerKeys(**own.pair("elsewhere"), client_ca=own.ca),
        DeviceKeys(**own.pair("device"), ca=own.ca),
    )
    with Served(keys=elsewhere) as served, pytest.raises(DeviceRefusedError, match="certificate is for another host"):
        served.link(keys=keys, timeout=60)


def test_a_cloud_in_plain_text_is_refused_by_a_device_with_certificates(secured):
    _, own, _ = secured
    with Served() as served, pytest.raises(DeviceRefusedError, match="it speaks plain text"):
        served.link(keys=DeviceKeys(**own.pair("device"), ca=own.ca), timeout=60)


def test_a_cloud_that_comes_back_with_another_certificate_is_not_tried_again(secured):
    _, own, foreign = secured
    port, keys = free_port(), DeviceKeys(**own.pair("device"), ca=own.ca)
    with Served(port, keys=ServerKeys(**own.pair("cloud"), client_ca=own.ca)) as first:
        link = first.link(keys=keys)
        steps = iter(Dialogue(talk(), link))
        next(steps)
    tried, again = [], link.reopen
    link.reopen = lambda: (tried.append(1), again())
    other = ServerKeys(**foreign.pair("cloud"), client_ca=own.ca)
    with Served(port, keys=other), pytest.raises(DeviceRefusedError, match="not of the authority"):
        next(steps)
    assert len(tried) == 1
    link.close()


def test_conversations_belong_to_their_certificate(secured):
    served, own, _ = secured
    stubs = []
    for name in ("one", "two"):
        pair = {kind: file.read_bytes() for kind, file in own.pair(name).items()}
        credentials = grpc.ssl_channel_credentials(own.ca.read_bytes(), pair["key"], pair["cert"])
        stubs.append(Stub(served, channel=grpc.secure_channel(served.address, credentials)))
        stubs[-1].hear()
    one, two = stubs
    one.upload(bytes(16), 1, 0, rows(3), 1)
    one.hear()
    two.upload(bytes(16), 2, 3, rows(1), 1)
    assert two.hear().held == 0, "another device's conversation of the same name is its own"
    two.send(end=hat_pb2.End(conversation=bytes(16)))
    one.upload(bytes(16), 2, 3, rows(1), 1)
    assert deep(one.hear()).shape == (1, WIDTH)
    for each in stubs:
        each.close()


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_files_that_cannot_be_read_are_named(tmp_path, missing):
    files = {name: tmp_path / name for name in ("cert", "key", "ca")}
    for name, file in files.items():
        if name != missing:
            file.write_text("-")
    with pytest.raises(ValueError, match=f"{missing}=.*No such file"):
        DeviceKeys(**files).credentials()
    with pytest.raises(ValueError, match=f"{missing}=.*No such file"):
        ServerKeys(files["cert"], files["key"], files["ca"]).credentials()
