"""The command line, assembled from its commands."""

import io
import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from equinorm.cli.align import align
from equinorm.cli.apply import apply
from equinorm.cli.balance import balance
from equinorm.cli.canonical import canonical
from equinorm.cli.compare import compare
from equinorm.cli.demo import demo
from equinorm.cli.equalize import equalize
from equinorm.cli.figures import figures
from equinorm.cli.inspect import inspect
from equinorm.cli.terminal import INTERRUPTED, Commands
from equinorm.cli.train import train

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, solve and apply the rescaling symmetries of PyTorch networks.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"equinorm {metadata.version('equinorm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (inspect, balance, equalize, apply, compare, align, canonical, demo, train, figures):
    app.command()(_command)


def main() -> None:
    """Entry point of the `equinorm` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show ℓ shows a question mark
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
