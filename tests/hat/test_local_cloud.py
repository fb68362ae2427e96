"""The command-line cloud in a process of its own."""

import socket

import pytest
from tiny_hat import llama, prompt

from edgebolt.hat import HatClient, LinkLostError
from edgebolt.hat.local_cloud import local_cloud

pytestmark = pytest.mark.slow


def test_a_cloud_serves_until_the_block_is_left(tmp_path):
    llama().save_pretrained(tmp_path)
    options = ("--dtype", "float64", "--threads", "1", "--batch-tokens", "0")
    with pytest.raises(ZeroDivisionError), local_cloud(str(tmp_path), *options) as address:
        with HatClient(address, llama()) as client, HatClient(None, llama()) as alone:
            wanted = alone.generate(prompt(6), 5, stops=()).tokens
            assert client.generate(prompt(6), 5, stops=()).tokens == wanted
        1 / 0  # noqa: B018
    host, _, port = address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5)
    with pytest.raises(LinkLostError):
        HatClient(address, llama())


def test_a_cloud_that_cannot_start_says_why(tmp_path):
    message = r"The cloud has not started: .*error: --tls-key, --client-ca missing"
    with pytest.raises(RuntimeError, match=message), local_cloud(str(tmp_path), "--tls-cert", "some.pem"):
        pass
