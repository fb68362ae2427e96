import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fake_grid.py, small_run.py: importlib mode puts no folder on the path


@pytest.fixture(autouse=True)
def flower_home(tmp_path, monkeypatch):
    """Nothing of a test is written to the user's own Flower home, and Flower calls nobody."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
