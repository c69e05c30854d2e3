"""`equinorm apply`: rescale a checkpoint's folder, or one file of it, by a plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from equinorm._display import count
from equinorm.cli.options import Debug, Json, Result
from equinorm.cli.terminal import Steps, run
from equinorm.reporting.tables import facts
from equinorm.rescaling.plan import Plan


@dataclass(frozen=True, slots=True)
class Application:
    """Record of `equinorm apply`."""

    plan: str
    scales: str
    source: str
    underflows: int
    output: str


def apply(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="What `equinorm balance FOLDER --plan FILE` or Plan.save wrote.")
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint's folder, or one .safetensors file of it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write this folder, or this file.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Rescale the weights of a checkpoint's folder, or of one file of it, by a plan. No model is built."""

    def work(steps: Steps) -> Result:
        steps.say(f"reading {plan}")
        found = Plan.load(plan)
        steps.say(f"writing {output}")
        record = Application(str(plan), str(found), str(source), found.rewrite(source, output), str(output))
        return record, shown(record), 0

    run(work, json, debug)


def shown(record: Application) -> RenderableType:
    """What `equinorm apply` prints."""
    pairs = [("plan", f"{record.plan}: {record.scales}"), ("source", record.source)]
    pairs.append(("underflows", count(record.underflows, "entry", "entries") if record.underflows else "none"))
    return facts([*pairs, ("written", record.output)])
