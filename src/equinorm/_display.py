"""How results show themselves: cut to what fits, as HTML for notebooks, as plain data for JSON, and as pictures on request."""

import html
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from equinorm._errors import EquinormError

ROWS = 12
"""Rows of a table in a notebook, before it says how many more there are."""

SCREEN, EACH = 24, 9
"""Most lines about a network that are shown instead of a summary, and of a summary about each kind of thing."""

Section = tuple[Sequence[str], Sequence[Sequence[object]], str]
"""Headers of columns, rows, and what a row is (plural)."""


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["scales"]), listed(["signs", "permutation", "scales"])
    ('scales', 'signs, permutation and scales')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def count(number: int, one: str, many: str = "") -> str:
    """A number of things.

    >>> count(1, "cycle"), count(2_000, "cycle"), count(3, "family", "families")
    ('1 cycle', '2,000 cycles', '3 families')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def sizes(shape: Sequence[int]) -> str:
    """Sizes of the axes of a tensor.

    >>> sizes((3, 4)), sizes(())
    ('3×4', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"


def percent(part: float, whole: float) -> str:
    """A share in percent with one decimal; what is not all, or not nothing, does not read so."""
    share = part / whole if whole else 0.0
    if 0 < abs(share) < 5e-4:
        return "< 0.1%" if share > 0 else "> -0.1%"
    if 0.9995 <= share < 1:
        return "> 99.9%"
    return f"{share:.1%}"


def norm_name(p: float) -> str:
    """ℓ2, ℓ1.5, ℓ∞."""
    return f"ℓ{'∞' if math.isinf(p) else f'{p:g}'}"


def shortened(lines: Sequence[str], most: int, noun: str) -> list[str]:
    """The first lines, and how many more there are of what.

    >>> shortened(["a", "b", "c", "d"], 3, "letters")
    ['a', 'b', '… and 2 more letters']
    """
    return list(lines) if len(lines) <= most else [*lines[: most - 1], f"… and {len(lines) - most + 1:,} more {noun}"]


def and_more(names: Iterable[str], most: int = 6, noun: str = "", between: str = ", ") -> str:
    """The first names in a line, and how many more there are, of what if that is said.

    >>> and_more(["a", "b", "c", "d"], 3), and_more(["a", "b"], 3), and_more("abcde", 2, "letters")
    ('a, b, c and 1 more', 'a, b', 'a, b and 3 more letters')
    """
    names = [*names]
    more = f" and {len(names) - most:,} more {noun}".rstrip() if len(names) > most else ""
    return between.join(names[:most]) + more


def by_reason(left: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Reasons, and the names of all that have each.

    >>> by_reason({"a": "hooks", "b": "shared", "c": "hooks"})
    [('hooks', ['a', 'c']), ('shared', ['b'])]
    """
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name)
    return [*names.items()]


def as_html(title: str, facts: Sequence[tuple[str, object]], *sections: Section) -> str:
    """A table for a notebook: a title, facts, and the first rows of each section. Everything is escaped.

    >>> as_html("x < y", [("cycles", 3)])
    '<div><strong>x &lt; y</strong><table><tbody><tr><th>cycles</th><td>3</td></tr></tbody></table></div>'
    """
    body = "".join(_row([_cell("th", name), _cell("td", value)]) for name, value in facts)
    parts = [f"<strong>{html.escape(title)}</strong>", f"<table><tbody>{body}</tbody></table>" if facts else ""]
    filled = [section for section in sections if section[1]]
    room = max(ROWS - len(facts), 4)
    share = room // max(len(filled), 1)
    room -= sum(min(len(rows), share) for _, rows, _ in filled)  # what short sections leave
    for columns, rows, noun in filled:
        most = share + room
        room -= max(min(len(rows), most) - share, 0)
        shown = rows if len(rows) <= most else rows[: most - 1]
        body = "".join(_row([_cell("td", value) for value in row]) for row in shown)
        if len(rows) > len(shown):
            body += f'<tr><td colspan="{len(columns)}">… and {len(rows) - len(shown):,} more {html.escape(noun)}</td></tr>'
        head = _row([_cell("th", name) for name in columns])
        parts.append(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>")
    return f"<div>{''.join(parts)}</div>"


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(tag: str, value: object) -> str:
    return f"<{tag}>{html.escape(str(value))}</{tag}>"


def plain(value: Any) -> Any:
    """Data as JSON holds it: tuples become lists, numbers that are not finite "inf", "-inf" and "nan", complex ones pairs.

    >>> plain({"p": math.inf, "residuals": (1.0, 0.5)})
    {'p': 'inf', 'residuals': [1.0, 0.5]}
    >>> plain(3 - 4j)
    [3.0, -4.0]
    """
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, complex):
        value = value.real, value.imag
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def drawing(what: str = "balances") -> ModuleType:
    """A file of `reporting`, imported when something is to be drawn.

    Here alone a lower floor asks for a higher one, by name: whoever draws nothing needs no matplotlib.

    Raises:
        EquinormError: if matplotlib is not installed.
    """
    return needed(f"equinorm.reporting.{what}", "pictures need", "cli")


def storing() -> ModuleType:
    """`checkpoints.plans`, imported when a plan goes to a file or comes from one: whoever stores nothing needs no safetensors.

    Raises:
        EquinormError: if safetensors is not installed.
    """
    return needed("equinorm.checkpoints.plans", "files of plans need", "cli")


def needed(name: str, need: str, extra: str, error: type[EquinormError] = EquinormError) -> Any:
    """A module of a package that not everybody has, imported when it is needed.

    Args:
        name: of the module.
        need: what needs it, as "pictures need".
        extra: of this project, which installs it.
        error: to raise.

    Raises:
        EquinormError: of that class, saying what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        package, dot, _ = (missing.name or name).partition(".")
        if package == "equinorm":
            raise
        lacking = f"a newer {package}" if dot else f"{package}, which is not installed"
        raise error(f"{need} {lacking}: pip install 'equinorm[{extra}]'.") from missing
