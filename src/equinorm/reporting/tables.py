"""Tables and lists of facts in the terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text


def table(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], total: Sequence[str] = ()) -> Table:
    """A table of strings; a column is its header and whether it holds numbers (aligned right)."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.show_footer = bool(total)
    for position, (header, numeric) in enumerate(columns):
        footer = total[position] if total else ""
        made.add_column(header, footer=footer, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def facts(pairs: Iterable[tuple[str, str | None]], notes: Iterable[str] = ()) -> Table:
    """Names and values, aligned; what has no value is left out. Notes follow."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in (*pairs, *(("note", note) for note in notes)):
        if value:
            grid.add_row(name, Text(value))
    return grid
