"""The command line, assembled from its commands."""

from equinorm.cli.align import align
from equinorm.cli.apply import apply
from equinorm.cli.balance import balance
from equinorm.cli.canonical import canonical
from equinorm.cli.compare import compare
from equinorm.cli.demo import demo
from equinorm.cli.equalize import equalize
from equinorm.cli.figures import figures
from equinorm.cli.inspect import inspect
from equinorm.cli.terminal import Commands
from equinorm.cli.train import train
from equinorm_command import assembled, run

app = assembled((inspect, balance, equalize, apply, compare, align, canonical, demo, train, figures), Commands)


def main() -> None:
    """Run it."""
    run(app)
