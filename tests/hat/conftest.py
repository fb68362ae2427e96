import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tiny_hat.py: importlib mode puts no folder on the path
from tiny_hat import Served, Stub


@pytest.fixture(scope="module")
def served():
    with Served() as found:
        yield found


@pytest.fixture
def link(served):
    found = served.link()
    yield found
    found.close()


@pytest.fixture
def stub(served):
    found = Stub(served)
    yield found
    found.close()
