"""``--bench-group=NAME`` keeps the benchmarks of one ``@pytest.mark.benchmark(group=NAME)``; see ``make bench``."""

import pytest


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
