"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Columns", "print_table"]

Columns = Mapping[str, Mapping[str, str]]
"""Column -> {row -> cell}; all columns have the rows of the first."""


def print_table(title: str, columns: Columns) -> None:
    """Print a table of ``{column: {row: cell}}``; rich draws it if it is installed.

    Example::

        >>> from edgebolt.common.tables import print_table
        >>> print_table("Two runs", {"FedAvg": {"rounds": "9"}, "FedProx": {"rounds": "10"}})    # doctest: +SKIP
    """
    names = next(iter(columns.values()))
    head, lines = ["", *columns], [[name, *(cells[name] for cells in columns.values())] for name in names]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]
        print(title)
        for name, *cells in [head, *lines]:
            print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
        return
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
