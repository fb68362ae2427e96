"""What the repository holds: one `Package` for each folder under packages/. Printed for the Makefile."""

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """A folder of packages/ and what its pyproject.toml says."""

    folder: Path
    pyproject: dict[str, Any]

    @property
    def name(self) -> str:
        """The last part of the import name: ``common`` of ``edgebolt.common``."""
        return self.folder.name

    @property
    def project(self) -> dict[str, Any]:
        """The ``[project]`` table."""
        table: dict[str, Any] = self.pyproject["project"]
        return table

    @property
    def extras(self) -> dict[str, list[str]]:
        """Requirements by extra."""
        table: dict[str, list[str]] = self.project.get("optional-dependencies", {})
        return table

    def setting(self, key: str) -> list[str]:
        """A list of the ``[tool.edgebolt]`` table: ``cleanroom-extras`` or ``test-requires``."""
        values: list[str] = self.pyproject.get("tool", {}).get("edgebolt", {}).get(key, [])
        return values


def packages() -> list[Package]:
    """All packages, by name."""
    files = sorted(ROOT.glob("packages/*/pyproject.toml"))
    return [Package(file.parent, tomllib.loads(file.read_text(encoding="utf-8"))) for file in files]


def with_extras(target: str, extras: list[str]) -> str:
    """A pip requirement: ``with_extras("packages/common", ["cli", "plot"])`` is ``packages/common[cli,plot]``."""
    return f"{target}[{','.join(sorted(extras))}]" if extras else target


def main(what: str) -> None:
    """Print the arguments that install every package editable, or those that have mypy check them all."""
    for package in packages():
        if what == "editables":
            print("-e", with_extras(str(package.folder.relative_to(ROOT)), list(package.extras)))
        elif what == "modules":
            print("-p", f"edgebolt.{package.name}")
        else:
            sys.exit(f"usage: {Path(__file__).name} editables|modules, got {what!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
