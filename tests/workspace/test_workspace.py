"""Rules that no single package can check: layout, versions, imports, documentation."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from monorepo import ROOT, packages

PACKAGES = packages()
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)


def lines_with(pattern, files):
    """``path:number: text`` of each line that matches."""
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]


# layout


def test_namespace_has_no_init():
    assert not list(ROOT.glob("packages/*/src/edgebolt/__init__.py")), "it would hide every other package"


@each_package
def test_folder_is_complete(package):
    source = package.folder / "src" / "edgebolt"
    assert [path.name for path in source.iterdir() if path.name != "__pycache__"] == [package.name]
    for file in ("README.md", "LICENSE", f"src/edgebolt/{package.name}/__init__.py"):
        assert (package.folder / file).read_text(encoding="utf-8").strip(), f"{file} is empty"
    assert (source / package.name / "py.typed").exists()
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert list((ROOT / "tests" / package.name).rglob("test_*.py"))
    assert (ROOT / "docs" / f"{package.name}.md").exists()
    assert list((ROOT / "tests" / "benchmarks").glob(f"test_bench_{package.name}*.py"))


def test_files_stay_short():
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert not {file: length for file, length in lengths.items() if length > 500}


# projects


@each_package
def test_projects_agree(package):
    common = next(other for other in PACKAGES if other.name == "common")
    assert package.project["name"] == f"edgebolt-{package.name}"
    for key in ("version", "requires-python", "license", "license-files", "readme"):
        assert package.project[key] == common.project[key], key
    assert package.pyproject["build-system"] == common.pyproject["build-system"]
    assert "Typing :: Typed" in package.project["classifiers"]


@each_package
def test_siblings_are_compatible_releases(package):
    required = [Requirement(line) for line in package.project["dependencies"]]
    siblings = {one.name: str(one.specifier) for one in required if one.name.startswith("edgebolt-")}
    major_minor = ".".join(package.project["version"].split(".")[:2])
    assert siblings == ({} if package.name == "common" else {"edgebolt-common": f"~={major_minor}"})


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)], "not an exact, public version"
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = list(root["dependency-groups"]["dev"])
    for package in PACKAGES:
        wanted += [*package.project["dependencies"], *package.setting("test-requires")]
        wanted += [line for extra in package.extras.values() for line in extra]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if not name.startswith("edgebolt-"):
            assert name in pinned, f"{requirement} has no pin: run `make constraints`"
            assert requirement.specifier.contains(pinned[name]), f"{requirement} refuses {pinned[name]}"


# imports


def imported_names(file):
    """The dotted name of everything that ``file`` imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_public_lightning_names():
    wrong = lines_with(r"lightning\.[a-z_.]*\._|\.fit_loop\b", SOURCES)
    for file in SOURCES:
        for name in imported_names(file):
            private = re.match(r"lightning\b.*\._", name)
            if private or name.partition(".")[0] == "pytorch_lightning":
                wrong.append(f"{file.relative_to(ROOT)}: {name}")
    assert not wrong


# documentation


def public_objects(package):
    """``(module, name, object)`` of each name in the ``__all__`` of the package and its subpackages."""
    root = importlib.import_module(f"edgebolt.{package.name}")
    inside = [info.name for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}.") if info.ispkg]
    for module in [root, *map(importlib.import_module, inside)]:
        for name in getattr(module, "__all__", []):
            yield module.__name__, name, getattr(module, name)


@each_package
def test_public_names_have_docstrings(package):
    bare = []
    for module, name, thing in public_objects(package):
        doc = (
            thing.__doc__ if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing) else "data"
        )
        # a dataclass without a docstring gets its own signature for one
        if not doc or doc.startswith(f"{name}("):
            bare.append(f"{module}.{name}")
    assert not bare


@each_package
def test_public_names_are_documented(package):
    pages = (ROOT / "docs" / f"{package.name}.md", package.folder / "README.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.exists())
    names = {name for _, name, _ in public_objects(package)}
    assert names, f"edgebolt.{package.name} exports nothing: no __all__ found"
    assert not sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", text))


@each_package
def test_readme_has_a_row(package):
    assert lines_with(rf"^\|.*\bedgebolt-{package.name}\b", [ROOT / "README.md"])


# hygiene


def test_no_machine_paths_or_registries():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    # a bracket in each pattern keeps this file from matching itself
    patterns = (r"https?://\S*p[y]pi", r"https?://\S*p[y]thonhosted", r"download\.p[y]torch", r"fil[e]:///",
                r"(^|[^\w.])/(wor[k]|opt/whee[l]s|opt/py[p]i|hom[e]|roo[t]|User[s])/")  # fmt: skip
    assert files
    assert not lines_with("|".join(patterns), files)
