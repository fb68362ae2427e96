"""The whole of it: processes, TLS, keys, a device that is lost. Two minutes, so EDGEBOLT_DEPLOYMENT=1 asks for it."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from deployment import Deployment, node_key
from small_run import SAMPLES, exact, remembering, serial, without


def wait_for(path, deployment, seconds):
    until = time.monotonic() + seconds
    while not path.exists():
        logs = {name: deployment.log(name).read_text()[-2000:] for name in deployment.processes}
        assert time.monotonic() < until, f"{path.name} is not there after {seconds} s: {logs}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif("EDGEBOLT_DEPLOYMENT" not in os.environ, reason="two minutes of processes: EDGEBOLT_DEPLOYMENT=1")
def test_three_devices_one_of_which_is_lost(tmp_path):
    app, results = tmp_path / "app", tmp_path / "results"
    shutil.copytree(Path(__file__).with_name("real_app"), app, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("small_run.py"), app)
    results.mkdir()
    with Deployment(tmp_path) as deployment:
        deployment.superlink()
        deployment.until_it_answers()
        nodes = [f"node{client}" for client in range(len(SAMPLES))]
        for client, name in enumerate(nodes):
            node_key(tmp_path, name)
            code, said = deployment.flwr("supernode", "register", tmp_path / f"{name}.pub")
            assert code == 0, said
            deployment.supernode(name, client)
        stranger = deployment.supernode("stranger", client=len(SAMPLES))
        assert stranger.wait(timeout=60) != 0, "a key that nobody has registered is refused"
        assert "Failed to activate SuperNode" in deployment.log("stranger").read_text()

        code, said = deployment.flwr("run", app, "--run-config", f'folder="{results}"')
        assert code == 0, said
        wait_for(results / "round-0", deployment, 240)
        deployment.kill("node1")
        wait_for(results / "result.pt", deployment, 400)
        memories = [len(list((tmp_path / "state" / name).glob("*/*.memory"))) for name in nodes]

    came_to = torch.load(results / "result.pt", weights_only=False)
    assert [row["round/visits"] for row in came_to["history"]] == [3, 3, 3]
    assert came_to["failed"], "the device was lost too late"
    assert {client for _, client in came_to["failed"]} == {1}
    strategy, module = serial(algorithm=remembering(), fleet=without(*came_to["failed"]))
    assert exact(module.state_dict()) == exact(came_to["weights"])
    assert memories[0] == memories[2] == 3
    delivered = [row["round/delivered"] for row in strategy.history]
    assert [row["round/delivered"] for row in came_to["history"]] == delivered
