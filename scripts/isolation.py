"""Run inside a clean room, by its Python: ``isolation.py legend`` fails unless edgebolt.legend is alone and light.

Alone: of all edgebolt packages only it and common can be imported, and from this environment. Light: each of its
modules imports, and none brings in a library that only an extra asks for.
"""

import importlib
import pkgutil
import re
import sys
from importlib import metadata
from pathlib import Path


def distribution(requirement: str) -> str:
    """The normalised name in a requirement: ``distribution("PyYAML>=6; extra == 'x'")`` is ``pyyaml``."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def main(name: str) -> None:
    """Check package ``name``; exits with a message where it is not alone or not light."""
    namespace = importlib.import_module("edgebolt").__path__
    found = {module.name for module in pkgutil.iter_modules(namespace)}
    if found != {name, "common"}:
        sys.exit(f"edgebolt.{name} is installed alone, but these can be imported: {sorted(found)}")
    if any(not Path(folder).resolve().is_relative_to(Path(sys.prefix).resolve()) for folder in namespace):
        sys.exit(f"edgebolt is imported from outside of {sys.prefix}: {list(namespace)}")

    # torchmetrics imports matplotlib wherever it is installed: not the doing of edgebolt
    for library in ("torch", "lightning.pytorch", "torchmetrics"):
        importlib.import_module(library)
    before = set(sys.modules)
    package = importlib.import_module(f"edgebolt.{name}")
    for module in pkgutil.walk_packages(package.__path__, f"edgebolt.{name}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    loaded = {module.partition(".")[0] for module in set(sys.modules) - before}

    extra = {distribution(line) for line in metadata.requires(f"edgebolt-{name}") or [] if "extra ==" in line}
    owners = {
        module: {distribution(owner) for owner in by} for module, by in metadata.packages_distributions().items()
    }
    heavy = sorted(module for module in loaded if owners.get(module, set()) & extra)
    if heavy:
        sys.exit(
            f"importing edgebolt.{name} imports {heavy}, which only an extra asks for: import it where it is used"
        )


if __name__ == "__main__":
    main(sys.argv[1])
