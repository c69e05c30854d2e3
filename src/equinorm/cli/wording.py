"""The library's arguments as options of the command line.

Errors name arguments as Python writes them: `name=value` anywhere, `name must …` or `name: …` at the start. Whoever typed a
command reads the option instead.
"""

import ast
import re

OPTIONS = {
    "p": "--p",
    "c": "--c",
    "cycles": "--cycles",
    "tol": "--tol",
    "method": "--method",
    "biases": "--biases",
    "power_of_two": "--power-of-two",
    "opaque": "--opaque",
    "force": "--force",
    "largest": "--largest",
    "free": "--free-only",
    "fold": "--fold",
    "args": "--input",
    "kwargs": "--input",
}
"""Option of each argument that commands pass on."""

OFF = {"free": "--no-free", "fold": "--no-fold"}
"""Options that turn arguments off; others are left out."""

_NAMES = "|".join(OPTIONS)
_VALUE = r"True|False|None|math\.inf|-?\d[\w.+-]*\d|-?\d|'[^']*'|\"[^\"]*\"|\[[^\]]*\]"
_GIVEN = re.compile(rf"(?<![\w.`-])({_NAMES})=({_VALUE})")
_SUBJECT = re.compile(rf"(^|[.:;] )({_NAMES})(?= (?:must|counts|holds)\b|: )")


def worded(text: str) -> str:
    """A message with options in place of arguments, and values as a shell takes them."""
    text = _GIVEN.sub(lambda found: _option(*found.groups()), text)
    text = _SUBJECT.sub(lambda found: found.group(1) + OPTIONS[found.group(2)], text)
    text = text.replace("The exporter's full report is in the attribute `cause`.", "--debug shows the exporter's full report.")
    return re.sub(r"(?<=must be )None or |\bmath\.(?=inf\b)", "", text)


def forced(text: str) -> str:
    """A message of a command that passes on no argument but `force`: others may be settings that the user has typed."""
    return text.replace("force=True", OPTIONS["force"])


def _option(name: str, value: str) -> str:
    option = OPTIONS[name]
    if value in ("True", "False", "None"):
        return option if value == "True" else OFF.get(name, f"no {option}")
    if value[0] not in "'\"[":
        return f"{option} {value}"
    given = ast.literal_eval(value)
    return " ".join(f"{option} {part}" for part in ([given] if isinstance(given, str) else given))
