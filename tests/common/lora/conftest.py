import sys
from pathlib import Path

import pytest
from tiny_text import Texts, adapted
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # families.py: importlib mode puts no folder on the path


@pytest.fixture(autouse=True)
def with_transformers():
    for library in ("transformers", "peft"):
        pytest.importorskip(library, reason="needs edgebolt-common[llm]")


@pytest.fixture
def module():
    """``make(ranks=4, **config)``."""
    return adapted


@pytest.fixture
def batch():
    return next(iter(DataLoader(Texts(), batch_size=4)))
