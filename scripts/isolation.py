"""Run inside a clean room, by its Python: ``isolation.py legend`` fails unless edgebolt.legend is alone and light.

Alone: of all edgebolt packages only it and common can be imported, and from this environment. Light: each of its
modules imports, as the first of all too, and none brings in a library that only an extra asks for.
"""

import importlib
import os
import pkgutil
import re
import sys
from importlib import metadata
from pathlib import Path


def distribution(requirement: str) -> str:
    """The normalised name in a requirement: ``distribution("PyYAML>=6; extra == 'x'")`` is ``pyyaml``."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def imports_first(module: str) -> bool:
    """Whether ``module`` can be the first of edgebolt's to be imported: a circle shows only in some orders.

    Tried in a fork, for a fresh beginning in which other libraries are there already.
    """
    child = os.fork()
    if child == 0:
        for name in [name for name in sys.modules if name.startswith("edgebolt.")]:
            del sys.modules[name]
        try:
            importlib.import_module(module)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


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
    modules = []
    for folder in (Path(base, name) for base in namespace):
        files = [path for path in folder.rglob("*.py") if path.name != "__main__.py"]
        parts = [path.relative_to(folder.parent).with_suffix("").parts for path in sorted(files)]
        modules += [".".join(("edgebolt", *part)).removesuffix(".__init__") for part in parts]
    for module in modules:
        importlib.import_module(module)
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
    if circles := [module for module in modules if not imports_first(module)]:
        sys.exit(f"these cannot be imported before the others: {circles}")


if __name__ == "__main__":
    main(sys.argv[1])
