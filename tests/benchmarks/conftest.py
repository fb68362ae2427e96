"""``--bench-group=NAME`` keeps the benchmarks of one ``@pytest.mark.benchmark(group=NAME)``; see ``make bench``."""

import logging
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# The helpers of this folder are plain modules beside the tests: importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--bench-group", metavar="NAME", help="run only the benchmarks of this group")


def group_of(item):
    marker = item.get_closest_marker("benchmark")
    return marker.kwargs.get("group") if marker else None


def pytest_collection_modifyitems(config, items):
    # collected from above, this file comes too late to add its option
    wanted = config.getoption("--bench-group", default=None)
    if wanted is None:
        return
    groups = {group_of(item) for item in items} - {None}
    if wanted not in groups:
        raise pytest.UsageError(f"no benchmark has group {wanted!r}; there are {sorted(groups)}")
    config.hook.pytest_deselected(items=[item for item in items if group_of(item) != wanted])
    items[:] = [item for item in items if group_of(item) == wanted]


@pytest.fixture(autouse=True)
def quiet_and_single_threaded():
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    torch.set_num_threads(1)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def conditions(request, quiet_and_single_threaded):
    """Under which conditions a row was measured, in its ``extra_info``."""
    if "benchmark" in request.fixturenames:
        names = ("torch", "lightning", "numpy", "safetensors")
        request.getfixturevalue("benchmark").extra_info.update(
            seed=0,
            torch_threads=torch.get_num_threads(),
            versions={"python": platform.python_version(), **{name: version(name) for name in names}},
        )
