"""Fills the pages with what source and results say, so that they cannot drift from it.

    python docs/_tables/fill.py

What stands between `<!-- NAME ARGUMENTS -->` and `<!-- end -->` in a page is made by the function of that name in `MARKERS`.
"""

import re
from collections.abc import Callable
from pathlib import Path

import audited
import beginnings
import between
import claims
import large
import rounding
import source
import speed

import discovery

PAGES = Path(__file__).parents[1]

MARKERS: dict[str, Callable[..., str]] = {
    **claims.MARKERS,
    **audited.MARKERS,
    **speed.MARKERS,
    **discovery.MARKERS,
    **large.MARKERS,
    **rounding.MARKERS,
    **between.MARKERS,
    **beginnings.MARKERS,
    **source.MARKERS,
}

OPENING = re.compile(r"<!-- (?!end )(\w+)[^>]*-->")
"""Name of each marker."""

_FILLED = re.compile(r"(<!-- (\w+)([^>]*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, markers: dict[str, Callable[..., str]] = MARKERS) -> str:
    """A page with these markers filled anew. What stood on a line of its own keeps to lines of its own."""

    def fill(found: re.Match[str]) -> str:
        opening, name, arguments, before, end = found.groups()
        if name not in markers:
            return found.group()
        made = markers[name](*arguments.split())
        return f"{opening}\n\n{made.strip()}\n\n{end}" if "\n" in before else f"{opening}{made}{end}"

    return _FILLED.sub(fill, text)


def main() -> None:
    """Write the pages that change."""
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text("utf-8")
        if (made := filled(text)) != text:
            page.write_text(made, "utf-8")
            print(f"filled {page.name}")


if __name__ == "__main__":
    main()
