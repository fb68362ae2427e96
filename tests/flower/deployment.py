"""A SuperLink with TLS and node authentication, and SuperNodes, as processes on the loopback interface."""

import contextlib
import datetime
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def certificates(folder):
    """An authority and a server's certificate: ca.pem, server.pem, server.key."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)

    def certificate(name, issuer, key, signing, *extensions):
        found = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        found = found.serial_number(x509.random_serial_number())
        found = found.not_valid_before(now - day).not_valid_after(now + day)
        for extension, critical in extensions:
            found = found.add_extension(extension, critical)
        return found.sign(signing, hashes.SHA256())

    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test SuperLink")])
    key_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False)  # fmt: skip
    root = certificate(
        authority, authority, authority_key, authority_key,
        (x509.BasicConstraints(ca=True, path_length=0), True), (key_id, False),
        (x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), True),
    )  # fmt: skip
    leaf = certificate(
        server, authority, server_key, authority_key,
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), False),
        (x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
         False),
    )  # fmt: skip
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def node_key(folder, name):
    """A SuperNode's pair of keys in OpenSSH's format: name, name.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / name).write_bytes(secret)
    (folder / f"{name}.pub").write_bytes(public)


class Deployment:
    """Starts and ends the processes; each has a log, and a session of its own, so that it ends with its children.

    Args:
        folder: for keys, logs, apps and what devices remember.
    """

    def __init__(self, folder):
        self.folder, self.port = Path(folder), free_port()
        self.processes = {}
        certificates(self.folder)
        home = self.home("user")
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "ca.pem"}"\n'
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name in list(self.processes):
            self.kill(name)

    def home(self, name):
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def environment(self, name):
        return {
            **os.environ,
            "FLWR_HOME": str(self.home(name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self, name, *command):
        with self.log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [shutil.which(command[0], path=self.environment(name)["PATH"]), *map(str, command[1:])],
                env=self.environment(name),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.processes[name]

    def log(self, name):
        return self.folder / f"{name}.log"

    def kill(self, name):
        """End a process and its children, as a power cut does; the SuperLink's child is ended by itself alone."""
        process = self.processes.pop(name)
        if name == "superlink":
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)

    def superlink(self):
        return self.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", self.port,
            "--ssl-ca-certfile", self.folder / "ca.pem", "--ssl-certfile", self.folder / "server.pem",
            "--ssl-keyfile", self.folder / "server.key", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )  # fmt: skip

    def until_it_answers(self, seconds=60):
        """Wait until the SuperLink's port is open."""
        until = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < until, self.log("superlink").read_text()
                time.sleep(0.2)

    def supernode(self, name, client):
        if not (self.folder / name).exists():
            node_key(self.folder, name)
        state = self.folder / "state" / name
        return self.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", self.folder / "ca.pem", "--auth-supernode-private-key", self.folder / name,
            "--port", free_port(), "--node-config", f"partition-id={client} state-dir='{state}'",
        )  # fmt: skip

    def flwr(self, *command):
        """Run Flower's command line to its end and give what it has printed."""
        done = subprocess.run(
            ["flwr", *map(str, command)], env=self.environment("user"), capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr
