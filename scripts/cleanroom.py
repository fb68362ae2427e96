"""Prove that a package stands alone: install it, and common, in a new environment and run its tests there.

``cleanroom.py`` takes every package, ``cleanroom.py common`` the named ones, and ``cleanroom.py --changed`` those that
changed since the last tag (all, where there is none), without the tests marked ``slow``, which ``make unit`` runs. Two
keys of a package's ``[tool.edgebolt]`` table matter: ``cleanroom-extras`` names extras to install (default: none) and
``test-requires`` what the tests need beside pytest.

All packages need common. So what common alone brings, torch above all, is installed once, in an environment of its
own, and every room begins as a copy of that by hard links.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from monorepo import ROOT, Package, packages, with_extras

# A change under one of these concerns every package.
SHARED = ("constraints.txt", "packages/common/", "pyproject.toml", "scripts/", "tests/conftest.py", "tests/tiny_")


class CommandError(Exception):
    """A command failed; the message holds the command and its whole output."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run ``command`` without the checkout on its import path and return its output."""
    hidden = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV"}  # what is imported is compiled once
    env = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode:
        raise CommandError(f"$ {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def changed(every: list[Package]) -> list[Package]:
    """The packages that differ from the last tag, uncommitted and new files included; all where there is no tag."""
    try:
        tag = run("git", "describe", "--tags", "--abbrev=0").strip()
    except CommandError:
        return every
    new = run("git", "ls-files", "--others", "--exclude-standard")
    files = (run("git", "diff", "--name-only", tag) + new).splitlines()
    if any(file.startswith(SHARED) for file in files):
        return every
    return [p for p in every if any(file.startswith((f"packages/{p.name}/", f"tests/{p.name}/")) for file in files)]


def build(chosen: list[Package], folder: Path) -> dict[str, Path]:
    """Wheels of ``chosen`` and of common, by package name; built with the hatchling that constraints.txt pins."""
    wheels = {}
    for name in sorted({"common", *(package.name for package in chosen)}):
        target = folder / name
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target,
            ROOT / "packages" / name)  # fmt: skip
        (wheels[name],) = target.glob("*.whl")
    return wheels


def pip_install(venv: Path) -> tuple[str | Path, ...]:
    """The command of an environment's own pip, with the versions that constraints.txt pins."""
    pip = (venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile")
    return (*pip, "--constraint", ROOT / "constraints.txt")


def base(venv: Path, common: Path) -> None:
    """Make an environment of what every room has: the newest pip, torch, common with what it needs, and pytest."""
    run(sys.executable, "-m", "venv", venv)
    run(*pip_install(venv), "--upgrade", "pip")
    run(*pip_install(venv), "torch")  # first and by itself, as `make install` does
    run(*pip_install(venv), common, "pytest")
    run(venv / "bin" / "python", "-c", "import lightning, pytest")  # compiled here, for all


def room(venv: Path, like: Path) -> None:
    """Make an environment with the packages of another; pip replaces files, so that those of the other stay."""
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (packages,) = like.glob("lib/python*/site-packages")
    shutil.copytree(packages, venv / packages.relative_to(like), copy_function=os.link, dirs_exist_ok=True)


def check(package: Package, wheels: dict[str, Path], folder: Path, quick: bool) -> str:
    """Install ``package`` in an environment under ``folder`` and test it there; returns pytest's last line."""
    room(folder / "venv", folder.parent / ".base")
    install, python = pip_install(folder / "venv"), folder / "venv" / "bin" / "python"
    own = with_extras(str(wheels[package.name]), package.setting("cleanroom-extras"))
    others = [wheels["common"]] if package.name != "common" else []
    run(*install, own, *others, "pytest", *package.setting("test-requires"))

    tests = folder / "tests"
    shutil.copytree(ROOT / "tests" / package.name, tests / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for shared in (ROOT / "tests").glob("*.py"):  # conftest.py and what it puts on the path
        shutil.copy(shared, tests)
    shutil.copy(ROOT / "pyproject.toml", folder)
    run(python, ROOT / "scripts" / "isolation.py", package.name, cwd=folder)
    # pytest's own settings stay, the options of plugins that are not installed here go
    pytest = (python, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider")
    chosen = ("-m", "not slow") if quick else ()
    return run(*pytest, *chosen, f"tests/{package.name}", cwd=folder).splitlines()[-1].strip("= ")


def timed_check(package: Package, wheels: dict[str, Path], folder: Path, quick: bool) -> str:
    """Check one package and clear up; returns the line to print."""
    start = time.perf_counter()
    summary = check(package, wheels, folder / package.name, quick)
    shutil.rmtree(folder / package.name)  # an environment with torch takes about a gigabyte
    return f"clean room {package.name}: {summary}; {time.perf_counter() - start:.0f} s in all"


def main() -> None:
    """Check the packages that the command line asks for; exits with the output of the first command that fails."""
    parser = argparse.ArgumentParser(description="Install packages alone and run their tests.")
    parser.add_argument("names", nargs="*", metavar="package", help="default: all")
    parser.add_argument("--changed", action="store_true", help="those that changed since the last tag")
    options = parser.parse_args()
    every = packages()
    unknown = set(options.names) - {package.name for package in every}
    if unknown:
        parser.error(f"no such package: {sorted(unknown)}; there are {[package.name for package in every]}")
    chosen = [package for package in every if not options.names or package.name in options.names]
    if options.changed:
        chosen = [package for package in changed(every) if package in chosen]
    if not chosen:
        print("clean room: no package changed since the last tag")
        return
    with tempfile.TemporaryDirectory(prefix="cleanroom-") as temporary:
        try:
            wheels = build(chosen, Path(temporary, "wheels"))
            base(Path(temporary, ".base"), wheels["common"])
            with ThreadPoolExecutor(max_workers=2) as pool:  # each mostly waits for pip, or for one thread of tests
                for line in pool.map(
                    lambda package: timed_check(package, wheels, Path(temporary), options.changed), chosen
                ):
                    print(line, flush=True)
        except CommandError as error:
            sys.exit(f"clean room: failed\n{error}")


if __name__ == "__main__":
    main()
