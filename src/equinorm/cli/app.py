"""The command line, assembled from its commands."""

import importlib

from equinorm.cli.terminal import Commands
from equinorm_command import COMMANDS, assembled, run

app = assembled([getattr(importlib.import_module(f"equinorm.cli.{name}"), name) for name in COMMANDS], Commands)


def main() -> None:
    """Run it."""
    run(app)
