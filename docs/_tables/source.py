"""What is written down in the source already: the rules, how the states of optimizers scale, and what commands print."""

import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from equinorm.discovery.rules import NOT_HOMOGENEOUS, TABLE
from equinorm.rescaling.optimizer_laws import ELSEWHERE, LAWS, OptimizerLaw

KINDS = {
    "movement": "Entries only move",
    "placement": "Entries to places that an index names",
    "elementwise": "Each entry on its own",
    "reduction": "Along axes",
    "normalization": "Normalization",
    "contraction": "Products summed over an axis",
    "algebra": "Several products, and functions of whole matrices",
    "recurrent": "Recurrent layers and cells",
}
"""Heading of each module of rules."""

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
"""Digits of an exponent, as they stand behind its base."""


def operations() -> str:
    """One table for each kind of rule, one row for each rule; and what is known to have none."""
    rules: dict[Callable[..., Any], list[str]] = {}
    for name, rule in TABLE.items():
        if rule.__module__.startswith("equinorm."):  # examples of the pages register others
            rules.setdefault(rule, []).append(name)
    unknown = {rule.__module__ for rule in rules} - {f"equinorm.discovery.rules.{module}" for module in KINDS}
    if unknown:
        raise ValueError(f"modules of rules without a heading in the documentation: {sorted(unknown)}")
    parts = [f"{sum(map(len, rules.values()))} operators have a rule.\n"]
    for module, heading in KINDS.items():
        parts += [f"\n## {heading}\n", "| Law | Operators (`aten`) |", "| --- | --- |"]
        for rule, names in rules.items():
            if rule.__module__ == f"equinorm.discovery.rules.{module}":
                parts.append(f"| {_cell(_law(rule))} | {' '.join(f'`{name}`' for name in names)} |")
    names = " ".join(f"`{name}`" for name in NOT_HOMOGENEOUS)
    parts += ["\n## Not homogeneous\n", f"These pin what they read, and have no rule for that reason: {names}."]
    return "\n".join(parts) + "\n"


def _law(rule: Callable[..., Any]) -> str:
    if rule.__doc__:
        return rule.__doc__.strip().partition("\n\n")[0]
    degree: Fraction | int = inspect.getclosurevars(rule).nonlocals["degree"]
    if degree == 0:
        return "Positively homogeneous of degree 0: the result does not scale."
    return f"Positively homogeneous of degree {degree}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def optimizers() -> str:
    """How the state of each optimizer that Equinorm itself knows scales where its parameter scales by s."""
    rows = ["| Optimizer | State where w ↦ s·w |", "| --- | --- |"]
    for kind, known in ((kind, known) for kind, known in LAWS.items() if not known.is_registered):
        rows.append(f"| `{kind.__name__}` | {_states(known)} |")
    for name, known in ELSEWHERE.items():
        rows.append(f"| `{name.partition('.')[0]}`'s `{name.rpartition('.')[2]}` | {_states(known)} |")
    return "\n".join(rows) + "\n"


def _states(known: OptimizerLaw) -> str:
    return ", ".join(
        f"`{name}` " + (f"· s{law.exponent if law.exponent != 1 else ''}".translate(RAISED) if law.exponent else "unchanged")
        for name, law in known.states.items()
    )


ALL_HELP = """
import contextlib, io, json, sys
from equinorm_command import COMMANDS, main
found = {}
for command in ("", *COMMANDS):
    sys.argv = ["equinorm", *command.split(), "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main()
    found[command] = text.getvalue().strip()
json.dump(found, sys.stdout)
"""
"""Prints what all commands say of themselves."""


@functools.cache
def _all_help() -> dict[str, str]:
    """In a process of its own, since the width is read where typer is imported."""
    plain = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    ran = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=True, env=plain)
    return json.loads(ran.stdout)


def command_help(command: str = "") -> str:
    """Output of `equinorm COMMAND --help` as a text block."""
    return f"```text\n{_all_help()[command]}\n```\n"


MARKERS = {"operations": operations, "optimizers": optimizers, "help": command_help}
