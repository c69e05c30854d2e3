"""The check of built pages finds what readers of the documentation have seen, and doctests are given their heading."""
# ruff: noqa: E402 -- the scripts of the pages are no part of the package

import inspect
from pathlib import Path

import pytest

import equinorm

TABLES = Path(__file__).parents[1] / "docs" / "_tables"

import check

SOURCE = "p in {0.5, 1}\n\n```python\nx = {}\n```\n"
HTML = "<p>p in {0.5, 1}</p><pre><code><span>x</span> = {}</code></pre>"


def test_a_page_as_it_should_be():
    assert check.faults(SOURCE, HTML) == []


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        (HTML.replace("<p>", "<p 0.5_ 1>").replace(" {0.5, 1}", ""), "braces are lost: {0.5, 1}"),
        (HTML + "<blockquote><blockquote><blockquote>import torch</blockquote></blockquote></blockquote>", "3 quotations"),
        (HTML + "<p>&gt;&gt;&gt; import torch</p>", "a doctest is shown as text"),
        (HTML.replace("pre>", "p>"), "1 blocks of code became 0"),
        (HTML + "<p>| a | b |\n| --- | --- |</p>", "a table is shown as text"),
    ],
)
def test_faults_are_found(html, fault):
    assert any(found.startswith(fault) for found in check.faults(SOURCE, html))


def test_code_may_show_what_text_may_not():
    assert check.faults("$x_{12}$\n", "<p>x12</p>") == []
    assert check.faults("", "<pre>&gt;&gt;&gt; 1</pre><code>```</code><script>'>>>'</script>") == []


def test_doctests_are_shown_as_examples():
    examples = pytest.importorskip("examples", reason="needs griffe", exc_type=ImportError)
    griffe = pytest.importorskip("griffe")
    names = [name for name in dir(equinorm) if ">>> " in (inspect.getdoc(getattr(equinorm, name)) or "")]
    assert len(names) >= 5
    for name in names:
        text = examples.headed(inspect.getdoc(getattr(equinorm, name)))
        sections = griffe.Docstring(text).parse("google")
        assert [s.kind.value for s in sections].count("examples") == 1
        assert all(">>>" not in str(s.value) for s in sections if s.kind.value == "text")
    assert examples.headed("No example.") == "No example."
