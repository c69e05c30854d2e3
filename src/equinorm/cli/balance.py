"""`equinorm balance`: write the rescaling-equivalent weights of least norm."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from equinorm._errors import BalanceError
from equinorm._symmetries import symmetries
from equinorm.balancing.options import LARGEST_P, LEAST_P, BalanceOptions
from equinorm.cli.factories import parted
from equinorm.cli.folders import analysed
from equinorm.cli.loading import Loaded, ModelSource, is_folder, load
from equinorm.cli.onnx_files import about, is_onnx, to_write
from equinorm.cli.options import (
    Debug,
    Force,
    Inputs,
    Json,
    Model,
    Opaque,
    PowerOfTwo,
    Report,
    Result,
    Settings,
    Train,
    Trust,
    Weights,
)
from equinorm.cli.streamed_balance import Outputs, shown_streamed, streamed_balance
from equinorm.cli.terminal import Steps, run
from equinorm.cli.verified_balance import Balancing, drawn, energies, verified_balance
from equinorm.cli.weights import InputError
from equinorm.cli.writing import check_output_of, save
from equinorm.reporting.files import REPORTS, Files, check_target, write_atomically
from equinorm.reporting.records import Weights as Pictured
from equinorm.reporting.tables import facts
from equinorm.reporting.words import deviation, norm_name, number, percent


def balance(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write to this .safetensors file, of an ONNX file to this .onnx file, of a FOLDER to this folder.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Write the scales to this .safetensors file, for `equinorm apply` and Plan.load.")
    ] = None,
    weights: Weights = None,
    settings: Settings = None,
    inputs: Inputs = None,
    opaque: Opaque = None,
    p: Annotated[str, typer.Option("--p", help=f"The norm: a number from {LEAST_P:g} to {LARGEST_P:g}, or inf.")] = "2",
    c: Annotated[float, typer.Option("--c", help="Asymmetry; above 1 moves energy towards the output.")] = 1.0,
    cycles: Annotated[int | None, typer.Option(help="Run exactly so many cycles instead of until --tol.")] = None,
    tol: Annotated[float, typer.Option(help="Residual at which to stop.")] = 1e-6,
    method: Annotated[str, typer.Option(help="two-level, or cyclic (Algorithm 1 of the paper).")] = "two-level",
    biases: Annotated[bool, typer.Option("--biases", help="Count biases in the norm.")] = False,
    power_of_two: PowerOfTwo = False,
    report: Report = None,
    train: Train = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the rescaling-equivalent weights of least norm.

    The deviation of outputs is verified first, in the model's dtype; more than rounding is refused.

    A checkpoint's FOLDER is read and written in parts, whatever its size, and every weight is verified instead.
    """

    def work(steps: Steps) -> Result:
        options = BalanceOptions(_norm(p), c, cycles, tol, method, biases)
        if is_folder(model):
            if given := [name for name, value in (("--weights", weights), ("--set", settings), ("--report", report)) if value]:
                raise InputError(f"{given[0]} does not go with a checkpoint's folder, which is never in memory as a whole.")
            outputs = Outputs(output, plan, force)
            outputs.check(model)
            folder = analysed(model, steps, inputs or (), opaque or (), trust_remote_code)
            streamed = streamed_balance(folder, options, power_of_two, outputs, steps)
            return streamed, shown_streamed(streamed), 0
        if not model.endswith((".onnx", ".pt2")):
            parted(model)
        if plan is not None:
            raise InputError(f"--plan goes with a checkpoint's folder only, and {model} is none. Leave it out.")
        if output is None:
            raise InputError(f"{model} needs --output, a file to write.")
        to = _Files(output, report, force)
        to.check(model)
        steps.say(f"loading {model}")
        loaded = load(ModelSource(model, weights, settings or (), trust_remote_code, train=train), inputs or ())
        steps.say("finding symmetries")
        found = symmetries(loaded.model, loaded.args, loaded.kwargs, opaque=opaque or ())
        if is_onnx(model) and not found.num_free:
            raise BalanceError(f"nothing in {model} can be rescaled, and nothing was written. `equinorm inspect` says why.")
        record, pictures = verified_balance(
            *(loaded, found, replace(options, compile=None)),
            power_of_two=power_of_two,
            progress=steps.solving(tol),
            pictured=report is not None,
        )
        steps.say("writing")
        record = to.write(loaded, record, pictures)
        return record, shown(record), 0

    run(work, json, debug)


class _Files(NamedTuple):
    """What is written of a model in memory: its weights, and a report if one is asked for; `force` replaces files."""

    output: Path
    report: Path | None
    force: bool

    def check(self, model: str) -> None:
        """Refuse early what could not be written in the end.

        Raises:
            OutputError: which says why.
        """
        check_output_of(model, self.output, (".onnx",) if is_onnx(model) else (".safetensors",), self.force)
        if self.report is not None:
            check_target(self.report, REPORTS, self.force)

    def write(self, loaded: Loaded, record: Balancing, pictured: Sequence[Pictured]) -> Balancing:
        """Write a model that was balanced; returns its record with what was written.

        Raises:
            EquinormError: if that cannot be done; nothing is there then.
        """
        record = replace(record, output=str(self.output), report=str(self.report) if self.report else None)
        files: Files = [(self.output, lambda path: save(loaded.model, path))]
        written = None
        if self.output.suffix == ".onnx":
            files, written = to_write(loaded.model, loaded.args, self.output)
        if self.report is not None:
            files.append((self.report, drawn(self.report, record, pictured)))
        write_atomically(files, self.force)
        return record if written is None else replace(record, notes=(*record.notes, *about(written, self.output, files)))


def shown(record: Balancing) -> RenderableType:
    """What `equinorm balance` prints."""
    pairs = [("model", record.model), ("inputs", record.inputs), ("free classes", f"{record.num_free:,}")]
    if record.energies:
        share = percent(record.norm_after - record.norm_before, record.norm_before)
        sign = "+" if record.norm_after > record.norm_before else ""
        pairs += [
            (f"{norm_name(record.p)} norm", f"{number(record.norm_before)} → {number(record.norm_after)} ({sign}{share})"),
            ("residual", f"{record.residuals[0]:.1e} → {record.residual:.1e}"),
            ("cycles", f"{record.cycles} {record.method}: {record.reason}"),
        ]
    else:
        pairs.append(("result", f"{record.reason}; the weights are unchanged"))
    if record.dead:
        pairs.append(("dead channels", f"{record.dead:,}, left at scale 1"))
    pairs.append(("deviation", f"{deviation(record.deviation)}; limit {record.limit:g} in {record.dtype}"))
    head = facts([*pairs, ("written", record.output), ("report", record.report)], record.notes)
    parts: list[RenderableType] = [head]
    if record.energies:
        parts += [Text(), energies(record.energies, record.energy_before, record.energy_after, record.p, record.c)]
    return Group(*parts)


def _norm(text: str) -> Any:
    """The number that a text says; another text as it is, which `BalanceOptions` refuses."""
    try:
        return float(text)
    except ValueError:
        return text
