"""However a fit ends, nothing of its workers is left, and everybody says why."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("engine_scripts.py"))
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
MARK = "EDGEBOLT_TEST_RUN"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install "edgebolt-common[ray]"')


def marked(mark):
    """Processes that have inherited a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def listening(pids):
    """Addresses, in hexadecimal, on which processes take connections."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for pid in pids:
        try:
            files = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
        found |= {sockets[name] for name in files & sockets.keys()}
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.2)


@needs_ray
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_ray(sent, tmp_path):
    mark = uuid.uuid4().hex
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "ray_slow"],
            env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
    wait_for(lambda: "step 10" in output.read_text() or process.poll() is not None, 90)
    pids = marked(mark)
    assert len(pids) > 3, output.read_text()
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert listening(pids) and listening(pids) <= loopback
    os.kill(process.pid, sent)
    process.wait(timeout=150)
    assert (process.returncode == 0) == (sent == signal.SIGTERM), output.read_text()  # Lightning ends fits by it
    wait_for(lambda: not marked(mark), 30)


def run_ranks(*command):
    return subprocess.run([*RANKS, *command], capture_output=True, text=True, timeout=120)


def test_fits_on_ranks_that_fail_and_go_on(tmp_path):
    """All in one start of the ranks, which takes longer than the fits."""
    done = run_ranks("fits_on_ranks", tmp_path)
    assert done.returncode == 0, done.stderr
    said = {(case, rank): (tmp_path / f"{case}-{rank}").read_text() for case in ("1", "all") for rank in "01"}
    assert "Rank 1 failed:" in said["1", "0"]
    for case, rank in (("1", "0"), ("1", "1"), ("all", "0"), ("all", "1")):
        failing = "1" if case == "1" else rank
        assert f"ZeroDivisionError: in the module's own code on rank {failing}" in said[case, rank]
    assert "Rank 0 failed:" in (tmp_path / "early-1").read_text()
    assert all("in the sanity check on rank 0" in (tmp_path / f"early-{rank}").read_text() for rank in "01")
    assert [path.name for path in tmp_path.glob("after-*")] == ["after-0.ckpt"]
    assert "leave out init_process_group" in (tmp_path / "group-0").read_text()
    for case in ("fine", "resumed", "datamodule"):
        assert (tmp_path / f"{case}-0").read_text() == (tmp_path / f"{case}-1").read_text() == "same", case


def test_a_rank_that_dies_ends_all():
    done = run_ranks("rank_dies", "1")
    assert done.returncode != 0
    assert re.search(r"exitcode\s*: 3\b", done.stderr), done.stderr
