"""Shows doctests of docstrings as code: what begins with >>> is an "Examples" section, also without that heading."""

import re

import griffe

_DOCTEST = re.compile(r"(?m)(?<=\n\n)(?=>>> )")


class Examples(griffe.Extension):
    """Puts the heading above doctests that stand by themselves, for mkdocstrings (mkdocs.yml)."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = headed(obj.docstring.value)


def headed(docstring: str) -> str:
    """A docstring whose doctests have the heading."""
    found = _DOCTEST.search(docstring)
    if found is None:
        return docstring
    before, after = docstring[: found.start()], docstring[found.start() :]
    return f"{before}Examples:\n" + "".join(f"    {line}" if line.strip() else line for line in after.splitlines(keepends=True))
