"""Print the JSON of a benchmark run as a Markdown table for each group: ``bench_table.py run.json > benchmarks.md``.

A row's ``extra_info`` may hold ``target``, a figure -> the most that it may be; ``seconds`` stands for the median.
Whether it is met is shown beside it. Time is reported and judged by readers, never asserted: machines are noisy.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONDITIONS = ("seed", "torch_threads", "versions")  # the same for all rows: said once
IN_A_COLUMN = ("ratio", "ratio_min", "ratio_max", "target", "baseline")  # have a column of their own


def main() -> None:
    """Print the tables of one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("file", type=Path, help="written by pytest --benchmark-json=FILE or --benchmark-autosave")
    print(tables(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


def tables(run: dict[str, Any]) -> str:
    """All groups of a run, in the order of the file, under a line that says where and on what it was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run["benchmarks"]:
        groups.setdefault(row["group"] or "no group", []).append(row)
    return "\n\n".join([conditions(run), *(f"## {name}\n\n{table(rows)}" for name, rows in groups.items())])


def conditions(run: dict[str, Any]) -> str:
    """Machine, versions, threads and seed."""
    info: dict[str, Any] = next((row["extra_info"] for row in run["benchmarks"] if row["extra_info"]), {})
    machine = run.get("machine_info", {})
    processor = machine.get("cpu", {})
    said = [f"{processor.get('brand_raw', machine.get('machine', 'unknown'))}, {processor.get('count', '?')} cores"]
    said += [f"{name} {version}" for name, version in info.get("versions", {}).items()]
    said += [f"{name.replace('_', ' ')} {info[name]}" for name in CONDITIONS if name in info and name != "versions"]
    if commit := run.get("commit_info", {}).get("id"):
        said.append(f"commit {commit[:7]}{' with changes' if run['commit_info'].get('dirty') else ''}")
    return f"{run.get('datetime', '')[:10]}: {'; '.join(said)}."


def table(rows: list[dict[str, Any]]) -> str:
    """One group."""
    infos = [row["extra_info"] for row in rows]
    names = list(dict.fromkeys(key for info in infos for key in info if key not in (*CONDITIONS, *IN_A_COLUMN)))
    head = ["benchmark", "median", "spread", "runs", "ratio to baseline", "target", *names]
    cells = [[*cells_of(row), *(shown(row["extra_info"].get(name)) for name in names)] for row in rows]
    used = [index for index in range(len(head)) if index == 0 or any(cell[index] for cell in cells)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join("| " + " | ".join(line[index] for index in used) + " |" for line in lines)


def cells_of(row: dict[str, Any]) -> list[str]:
    """What every row has: name, time, comparison, verdict."""
    stats, info = row["stats"], row["extra_info"]
    ratio = ""
    if "ratio" in info and info.get("baseline") != row.get("param"):
        ratio = f"{info['ratio']:.2f} ({info['ratio_min']:.2f} to {info['ratio_max']:.2f})"
    figures = {"seconds": stats["median"], **info}
    verdicts = [
        f"{name} ≤ {limit:g}: {'met' if figures[name] <= limit else 'missed'}"
        for name, limit in info.get("target", {}).items()
    ]
    name = row["name"].removeprefix("test_")
    return [name, seconds(stats["median"]), seconds(stats["iqr"]), str(stats["rounds"]), ratio, ", ".join(verdicts)]


def seconds(value: float) -> str:
    """In the unit that fits: ``1.23 s``, ``45.6 ms``, ``7.89 µs``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def shown(value: Any) -> str:
    """A cell: whole numbers in full, others to four digits, nested ones as their items."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    items: Iterable[Any] = value.items() if isinstance(value, dict) else enumerate(value)
    return ", ".join(f"{key} {shown(item)}" for key, item in items)


if __name__ == "__main__":
    main()
