"""A hook of mkdocs: formulas become MathML while the pages are built, so that browsers typeset them without any script.

`pymdownx.arithmatex` marks what stands between dollars; here it is translated. Nothing is fetched when a page is viewed.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas as MathML. A block scrolls by itself where it is wider than the screen."""

    def typeset(found: re.Match[str]) -> str:
        place, formula = found.group(1), html.unescape(found.group(2)).strip()
        made = convert(formula, display="block" if place == "div" else "inline")
        return f'<{place} class="formula">{made}</{place}>'

    return _MARKED.sub(typeset, content)
