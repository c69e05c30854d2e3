"""The command line: what each command reads, does, writes and prints."""

import io
import math
import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from equinorm._errors import BalanceError
from equinorm._symmetries import symmetries
from equinorm.balancing.options import LARGEST_P, LEAST_P
from equinorm.cli import demo as demonstrations, exactness, experiments as _experiments, report, tables
from equinorm.cli.experiments import SHARED
from equinorm.cli.loading import load
from equinorm.cli.records import Balancing, Weights as Pictures
from equinorm.cli.terminal import INTERRUPTED, Commands, Steps, run
from equinorm.cli.weights import WEIGHTS, InputError
from equinorm.cli.writing import check_target, make_folder, save, write_atomically
from equinorm.experiments.config import METHODS
from equinorm.experiments.presets import PRESETS

Result = tuple[Any, RenderableType, int]

_REPORT, _PICTURE = Path("equinorm-demo.html"), Path("equinorm-train.png")

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


Model = Annotated[str, typer.Argument(help="package.module:factory (called without arguments), or an exported .pt2 file.")]
Weights = Annotated[Path | None, typer.Option(help="Load these weights: .safetensors, or a state dict (.pt, .pth).")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help="Shape such as 1x3x224x224, int64:1x16 or (by keyword) mask=bool:1x16; or a file. Once for each."
    ),
]
Opaque = Annotated[
    list[str] | None,
    typer.Option("--opaque", help="Name of a submodule that is not looked into, where torch.export fails. Repeatable."),
]
Train = Annotated[bool | None, typer.Option("--train/--eval", help="Mode of the model; evaluation by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]
Report = Annotated[Path | None, typer.Option(help="Write a report with pictures: .html or .png.")]


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    train: Train = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which channels can be rescaled, and why the others cannot."""

    def work(steps: Steps) -> Result:
        steps.say(f"loading {model}")
        loaded = load(model, weights, inputs or [], train)
        steps.say("finding symmetries")
        record = exactness.inspection(loaded, symmetries(loaded.model, loaded.args, loaded.kwargs, opaque=opaque or ()))
        return record, tables.inspection(record), 0

    run(work, json, debug)


@app.command()
def balance(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the balanced weights to this .safetensors file.")],
    weights: Weights = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    p: Annotated[str, typer.Option("--p", help=f"The norm: a number from {LEAST_P:g} to {LARGEST_P:g}, or inf.")] = "2",
    c: Annotated[float, typer.Option("--c", help="Asymmetry; above 1 moves energy towards the output.")] = 1.0,
    cycles: Annotated[int | None, typer.Option(help="Run exactly so many cycles instead of until --tol.")] = None,
    tol: Annotated[float, typer.Option(help="Residual at which to stop.")] = 1e-6,
    method: Annotated[str, typer.Option(help="two-level, or cyclic (Algorithm 1 of the paper).")] = "two-level",
    biases: Annotated[bool, typer.Option("--biases", help="Count biases in the norm.")] = False,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Round scales to powers of two: outputs stay bitwise the same.")
    ] = False,
    report: Report = None,
    train: Train = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the rescaling-equivalent weights of least norm.

    The deviation of outputs is verified first, in the model's dtype; more than rounding is refused.
    """

    def work(steps: Steps) -> Result:
        norm = _norm(p)
        check_target(output, (".safetensors",), force)
        if report is not None:
            check_target(report, (".html", ".png"), force)
        steps.say(f"loading {model}")
        loaded = load(model, weights, inputs or [], train)
        steps.say("finding symmetries")
        found = symmetries(loaded.model, loaded.args, loaded.kwargs, opaque=opaque or ())
        options = {"p": norm, "c": c, "cycles": cycles, "tol": tol, "method": method, "biases": biases}
        record, pictures = exactness.balancing(loaded, found, **options, power_of_two=power_of_two, progress=steps.solving(tol))
        steps.say("writing")
        record = replace(record, output=str(output), report=str(report) if report else None)
        files = [(output, lambda path: save(loaded.model, path))]
        if report is not None:
            content = _drawn(report, record, pictures)
            files.append((report, lambda path: path.write_bytes(content)))
        write_atomically(files, force)
        return record, tables.balancing(record), 0

    run(work, json, debug)


@app.command()
def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help="package.module:factory, or an exported .pt2 file.")],
    model_b: Annotated[str, typer.Argument(metavar="B", help="Another one, or a file of weights for the factory A.")],
    weights: Weights = None,
    weights_b: Annotated[Path | None, typer.Option(help="Load these weights into B.")] = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    train: Train = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the outputs of two models, and tell whether a rescaling joins their weights.

    Exit code 0 if the outputs are equal up to rounding, 1 if they differ, 2 if they could not be compared, for any reason.
    """

    def work(steps: Steps) -> Result:
        second, file, hint = model_b, weights_b, ""
        if Path(model_b).suffix in WEIGHTS:
            if weights_b is not None:
                raise InputError(f"B is {model_b}, a file of weights: leave out --weights-b, or name a model as B.")
            second, file = model_a, Path(model_b)
        steps.say(f"loading {model_a}")
        a = load(model_a, weights, inputs or [], train, needs_inputs=False)
        steps.say(f"loading {model_b}")
        b = load(second, file, inputs or [], train, needs_inputs=not (a.args or a.kwargs))
        if not (a.args or a.kwargs):
            a = replace(a, args=b.args, kwargs=b.kwargs)
        if a.model is b.model:
            raise InputError(f"{model_a} is one module, not a factory: it cannot hold two sets of weights. Name a factory.")
        if file is not None and weights is None and not model_a.endswith(".pt2"):
            hint = f"A has the weights that {model_a} gives it. Name the file that {file} was made from with --weights."
        steps.say("comparing")
        record = exactness.comparison(a, replace(b, name=model_b), opaque or (), hint)
        return record, tables.comparison(record), int(not record.same_outputs)

    run(work, json, debug)


@app.command()
def demo(
    report: Annotated[Path, typer.Option(help="Where to write the report: .html or .png.")] = _REPORT,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train, unbalance and balance a small network: every prediction stays.

    Needs scikit-learn, no arguments and no network. The default report is replaced if it exists.
    """

    def work(steps: Steps) -> Result:
        replaces = force or report == _REPORT
        check_target(report, (".html", ".png"), replaces)
        record, pictures = demonstrations.demonstrate(say=steps.say)
        content = _drawn(report, record.balancing, pictures)
        write_atomically([(report, lambda path: path.write_bytes(content))], replaces)
        record = replace(record, report=str(report))
        return record, tables.demonstration(record), int(record.predictions_unchanged < record.images)

    run(work, json, debug)


@app.command()
def train(
    preset: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}; or a .json or .yaml file.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder of the images, for every preset but digits.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Of {', '.join(METHODS)}; 'bn enorm:c=1.2,clip=1' with options.")] = None,
    depths: Annotated[str | None, typer.Option(help="Square layers of the fully connected network, such as 1,9,15.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, such as 16,64,256.")] = None,
    lrs: Annotated[str | None, typer.Option(help="Where the search for learning rates starts, such as 0.02,0.1,0.5.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Final runs of each method.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of final runs.")] = None,
    select_epochs: Annotated[int | None, typer.Option(help="Of runs that choose the learning rate.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=f"Of all runs, as clip=1: {', '.join(SHARED)}.")] = None,
    results: Annotated[Path | None, typer.Option(help="Append results to this .jsonl file, and repeat none in it.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture: .png.")] = _PICTURE,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a network with several methods and compare them.

    Learning rates are chosen on held-out training images. Without arguments: deep networks on scikit-learn's digits.
    """

    def work(steps: Steps) -> Result:
        lists = {"methods": methods, "depths": depths, "batches": batches, "lrs": lrs}
        numbers = {"seeds": seeds, "select_epochs": select_epochs}
        shared = [*(settings or []), *([f"epochs={epochs}"] if epochs is not None else [])]
        asked = _experiments.sweep(preset, {**lists, **numbers}, shared)
        check_target(picture, (".png",), force or picture == _PICTURE)
        record, content = _experiments.run(asked, data, results, workers, device, steps.count)
        write_atomically([(picture, lambda path: path.write_bytes(content))], True)
        record = replace(record, picture=str(picture))
        return record, _experiments.summary(record), 0

    run(work, json, debug, str)


@app.command()
def figures(
    results: Annotated[Path, typer.Argument(help="What equinorm train --results wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("figures"),
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw accuracy by depth and batch size, learning curves, learning rates, norms, imbalance and weights."""

    def work(steps: Steps) -> Result:
        record, drawn = _experiments.figures(results, output, steps.say)
        make_folder(output)
        write_atomically([(path, lambda file, content=content: file.write_bytes(content)) for path, content in drawn], force)
        return record, _experiments.drawn(record), 0

    run(work, json, debug, str)


def _norm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (LEAST_P <= value <= LARGEST_P or value == math.inf):
        raise BalanceError(f"--p must be a number from {LEAST_P:g} to {LARGEST_P:g}, or inf, not {text}.")
    return value


def _drawn(path: Path, record: Balancing, pictures: list[Pictures]) -> bytes:
    if path.suffix == ".png":
        return report.png(record, pictures)
    return report.page(record, pictures).encode()


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


if __name__ == "__main__":
    main()
