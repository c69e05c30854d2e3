"""A report as one HTML page without external references."""

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from equinorm.reporting.style import STYLE, render

Part = tuple[float, str, Callable[[Any], None]]
"""Height in inches, title and painter of one picture."""


def page(title: str, facts: Iterable[tuple[str, str]], parts: Sequence[Part], table: str) -> str:
    """Title, facts, pictures, and a table that is HTML already."""
    escape = html.escape
    sections = []
    with matplotlib.rc_context(STYLE):
        for height, name, draw in parts:
            figure = Figure(figsize=(10, height), layout="constrained")
            draw(figure)
            image = base64.b64encode(render(figure)).decode("ascii")
            name = escape(_plain(name))
            sections.append(f'<section><h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{image}"></section>')
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1><dl>{listed}</dl>\n"
        + "\n".join(sections)
        + f"\n{table}</main></body></html>\n"
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> str:
    """A section with a table of strings; everything is escaped."""

    def row(cells: Sequence[str], tag: str = "td") -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    foot = f"<tfoot>{row(total)}</tfoot>" if total else ""
    body = f"<thead>{row(columns, 'th')}</thead><tbody>{''.join(map(row, rows))}</tbody>{foot}"
    return f"<section><h2>{html.escape(title)}</h2><table>{body}</table></section>"


_STYLE = (
    "body{margin:0;background:#fff;color:#22272e;font:15px/1.5 system-ui,sans-serif}"
    "main{max-width:62rem;margin:2.5rem auto;padding:0 1.5rem}"
    "h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1.05rem;margin:2.2rem 0 .6rem}img{width:100%;height:auto}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.5rem;margin:0}"
    "dt{color:#66707c}dd{margin:0;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.2rem 1.6rem .2rem 0;text-align:right;font-weight:400}"
    "th:first-child,td:first-child{text-align:left}thead th{color:#66707c;border-bottom:1px solid #d5dae0}"
    "tfoot td{border-top:1px solid #d5dae0;font-weight:600}"
)


def _plain(title: str) -> str:
    """A title without the mathematics that only pictures can typeset."""
    return title.partition(",")[0] if "$" in title else title
