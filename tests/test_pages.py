"""The check of the built pages finds what it looks for, and the README keeps to its length."""
# ruff: noqa: E402 -- the check is no part of the package

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

import pages

WHOLE = """<html><head><link rel="stylesheet" href="style.css"></head>
<body><h1 id="top">Title</h1><a href="#top">up</a> <a href="sub/">sub</a> <a href="https://example.org">away</a>
<code>$$ and ``` are code</code></body></html>"""


def build(folder, **changed):
    files = {"index.html": WHOLE, "sub/index.html": '<a href="../">back</a>', "style.css": "p { color: red }"}
    for name, text in (files | {name.replace("_", "."): text for name, text in changed.items()}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return pages.broken(folder)


def test_a_whole_site_has_no_faults(tmp_path):
    assert build(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<a href="nowhere/">x</a>', "nowhere/ leads nowhere"),
        ('<a href="sub/#nothing">x</a>', "has no such anchor"),
        ('<a href="#nothing">x</a>', "has no such anchor"),
        ('<img src="https://example.org/x.png">', "fetches https://example.org/x.png"),
        ('<script src="//example.org/x.js"></script>', "fetches //example.org/x.js"),
        ("<p>```python</p>", "``` is left in the text"),
        ("<p>$$x$$</p>", "$$ is left in the text"),
    ],
)
def test_what_is_broken_is_found(tmp_path, text, fault):
    (found,) = build(tmp_path, index_html=text)
    assert found.startswith("index.html: ")
    assert fault in found


def test_style_sheets_fetch_nothing(tmp_path):
    (found,) = build(tmp_path, style_css="@font-face { src: url(https://example.org/x.woff2) }")
    assert found == "style.css: fetches https://example.org/x.woff2"


@pytest.mark.skipif(pages.browser() is None, reason="there is no Chromium here")
def test_a_page_that_scrolls_sideways_is_found(tmp_path):
    build(tmp_path, index_html="<main><div style='width: 700px'>wide</div></main>")
    (found,) = pages.too_wide(tmp_path, pages.browser())
    assert found.startswith("/index.html: 7")
    assert "on a screen of 390; div wide" in found


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == listed


def test_the_readme_has_at_most_600_words():
    text = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    words = re.sub(r"\]\([^)]*\)", "]", " ".join(prose)).split()
    assert len(words) <= 600


def test_files_that_the_readme_links_are_there():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    local = [link for link in links if not link.startswith("https:")]
    assert len(local) > 15
    assert [link for link in local if not (ROOT / link).exists()] == []
