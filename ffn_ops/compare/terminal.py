# SPDX-License-Identifier: BSD-3-Clause
"""The comparison on the terminal, with rich: progress and tables. Imported only once rich is known to be there."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from .tables import Table


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )


def show(console: Console, table: Table) -> None:
    """Cells are plain text: brackets in them are not markup."""
    rich_table = RichTable(title=Text(table.title), title_justify="left")
    for column in table.columns:
        rich_table.add_column(Text(column), overflow="fold")
    for row in table.rows:
        rich_table.add_row(*(Text(cell) for cell in row))
    console.print(rich_table)
    console.print(Text(table.note, style="dim"))
    console.print()


def show_list(console: Console, title: str, lines: list[str]) -> None:
    console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Text(f"- {line}"))
    console.print()
