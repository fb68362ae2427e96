import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))  # tiny_models.py: importlib mode puts no folder on the path

QUICK = {"llama", "gpt2", "bert"}  # one for each way to lay weights out: what is run where ``slow`` is left out


def pytest_collection_modifyitems(items):
    for item in items:
        kind = item.callspec.params.get("kind") if hasattr(item, "callspec") else None
        if kind and kind not in QUICK and item.path.parent == Path(__file__).parent:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A function: for a family, the dense checkpoint, its pruned files and the same pruned in memory; read-only."""
    import tiny_models

    @functools.cache
    def made(kind, prune_attention=True):
        folder = tmp_path_factory.mktemp(kind)
        model = tiny_models.tiny(kind)
        dense = tiny_models.saved(model, folder / "dense")
        dense_parameters = sum(parameter.numel() for parameter in model.parameters())
        streamed = tiny_models.prune(str(dense), output=folder / "small", prune_attention=prune_attention)
        report = tiny_models.prune(model, prune_attention=prune_attention)
        return SimpleNamespace(
            dense=dense,
            small=folder / "small",
            model=model,
            report=report,
            streamed=streamed,
            dense_parameters=dense_parameters,
        )

    return made
