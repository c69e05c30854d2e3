"""Looks at the pages that were built: what the sources show as code or as braces, readers see as such.

python docs/_tables/check.py site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

PAGES = Path(__file__).parents[1]

_BRACES = re.compile(r"\{[^{}\n`]*\}")
_FORMULA = re.compile(r"(`[^`\n]+`)|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
"""Code, or mathematics, whose braces only group."""

_LEFT = {">>>": "a doctest", "```": "a fence", "| --- |": "a table", "|---": "a table"}
"""What is source, not text, wherever it is read outside of code."""


class Page(HTMLParser):
    """The text of a page, and what of it stands outside of code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.prose, self.blocks, self.quotations = "", "", 0, 0
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Enter an element whose text counts otherwise."""
        self.quotations += tag == "blockquote"
        if tag in ("pre", "code", "script", "style"):
            self._open.append(tag)
            self.blocks += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        """Text of the innermost element."""
        if not {"script", "style"} & set(self._open):
            self.text += data
            self.prose += "" if self._open else data


def faults(source: str, html: str) -> list[str]:
    """What is wrong with a page that was built from this Markdown."""
    page = Page(html)
    found = [f"{what} is shown as text: {sign}" for sign, what in _LEFT.items() if sign in page.prose]
    seen = " ".join(page.text.split())
    braces = _BRACES.findall(_FORMULA.sub(r"\1", source))
    found += [f"braces are lost: {part}" for part in braces if " ".join(part.split()) not in seen]
    if page.quotations > len(re.findall(r"(?m)^(> ?)+", source)):  # >>> is a quotation in three others
        found.append(f"{page.quotations} quotations that the source does not hold")
    fences = len(re.findall(r"(?m)^ *```\w", source))
    if page.blocks < fences:
        found.append(f"{fences} blocks of code became {page.blocks}")
    return found


def main(site: Path) -> int:
    """Print every fault; their number."""
    count = 0
    for path in sorted(PAGES.glob("*.md")):
        html = site / ("index.html" if path.stem == "index" else f"{path.stem}/index.html")
        for fault in faults(path.read_text("utf-8"), html.read_text("utf-8")):
            print(f"{path.name}: {fault}")
            count += 1
    if ">>> " not in Page((site / "api" / "index.html").read_text("utf-8")).text:
        print("api.md: no docstring shows an example")
        count += 1
    return count


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
