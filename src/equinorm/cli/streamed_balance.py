"""`equinorm balance` on a checkpoint's folder: solved a component at a time, written a file at a time."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import RenderableType
from torch import Tensor

from equinorm import __version__
from equinorm._display import count
from equinorm.balancing.options import BalanceOptions
from equinorm.checkpoints.plans import write_plan
from equinorm.checkpoints.rewriting import Rewriting, moves_of
from equinorm.checkpoints.solving import Record, Task, check_dtypes, components_of, norm_of, size_of, solve
from equinorm.checkpoints.staging import Rewritten, finish, kept, prepare
from equinorm.cli.folders import Folder, Meter
from equinorm.cli.terminal import Steps
from equinorm.cli.writing import check_is_folder, left_out
from equinorm.reporting.files import OutputError, check_target
from equinorm.reporting.tables import facts
from equinorm.reporting.words import in_bytes, norm_name, number, percent


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is written: a folder, a plan, or both; `force` replaces the plan."""

    folder: Path | None
    plan: Path | None
    force: bool

    def check(self, model: str) -> None:
        """Refuse early what could not be written in the end.

        Raises:
            OutputError: which says why.
        """
        if self.folder is None and self.plan is None:
            raise OutputError("nothing would be written. Name a folder with --output, or a file with --plan.")
        if self.folder is not None:
            check_is_folder(model, self.folder)
        if self.plan is not None:
            check_target(self.plan, (".safetensors",), self.force)
            plan, read = self.plan.resolve(), Path(model).expanduser()
            if self.folder is not None and self.folder.resolve() in plan.parents:
                raise OutputError(f"{self.plan} lies in {self.folder}, which appears when it is whole. Write it elsewhere.")
            if plan.exists() and any(plan.samefile(path) for path in read.glob("*.safetensors") if path.exists()):
                raise OutputError(f"{self.plan} holds weights of {model}, which are read. Write the plan to another file.")


@dataclass(frozen=True, slots=True)
class StreamedBalancing:
    """Record of `equinorm balance` on a checkpoint's folder.

    `residuals` are the largest of any component before and after, of real scales; norms are those at the scales that were
    written. `bytes_read` counts every pass over the files, `bytes_largest` is the largest component.
    """

    model: str
    inputs: str
    p: float
    c: float
    method: str
    biases: bool
    power_of_two: bool
    tol: float
    num_free: int
    dead: int
    files: int
    components: int
    norm_before: float
    norm_after: float
    residuals: tuple[float, float]
    cycles: int
    converged: bool
    underflows: int
    resumed: int
    bytes_read: int
    bytes_written: int
    bytes_largest: int
    seconds: float
    output: str | None
    plan: str | None
    notes: tuple[str, ...] = ()


def streamed_balance(
    folder: Folder, options: BalanceOptions, power_of_two: bool, outputs: Outputs, steps: Steps
) -> StreamedBalancing:
    """Balance a folder into another, or into a plan.

    Raises:
        EquinormError: if it cannot be balanced exactly or written; no output is there then.
    """
    started, checkpoint = time.perf_counter(), folder.checkpoint
    task = folder.task(options, power_of_two)
    held, notes = task.held()
    check_dtypes(task, held)
    sizes = [size_of(part, checkpoint) for part in components_of(task, held)]
    job = {"options": asdict(options), "power_of_two": power_of_two, "symmetries": folder.symmetries.fingerprint}
    staging = None if outputs.folder is None else prepare(checkpoint, outputs.folder, {**job, "by": __version__})
    written = checkpoint.size if staging is not None else 0
    meter = Meter(steps, "balancing", sum(sizes) + written)
    record, done = _solved_and_written(task, held, outputs, staging, meter)
    return StreamedBalancing(
        model=folder.loaded.title,
        inputs=folder.loaded.inputs,
        p=options.p,
        c=options.c,
        method=options.method,
        biases=options.biases,
        power_of_two=power_of_two,
        tol=options.tol,
        num_free=folder.symmetries.num_free,
        dead=record.dead,
        files=len(checkpoint.files),
        components=len(sizes),
        norm_before=norm_of(record.before, options),
        norm_after=norm_of(record.after, options),
        residuals=(record.residual_before, record.residual),
        cycles=record.cycles,
        converged=record.residual <= options.tol,
        underflows=done.underflows,
        resumed=done.resumed,
        bytes_read=sum(sizes) + written,
        bytes_written=written,
        bytes_largest=max(sizes, default=0),
        seconds=time.perf_counter() - started,
        output=None if outputs.folder is None else str(outputs.folder),
        plan=None if outputs.plan is None else str(outputs.plan),
        notes=(*notes, *left_out(done), *folder.notes),
    )


def _solved_and_written(
    task: Task, held: Tensor, outputs: Outputs, staging: Path | None, meter: Meter
) -> tuple[Record, Rewritten]:
    """Solve every component, then write the plan and the folder that are asked for."""
    with kept(staging):
        plan, record = solve(task, held, staging, meter.tick)
        moves = moves_of(plan, task.checkpoint.entries, True)
        if outputs.plan is not None:
            write_plan(plan, outputs.plan)
        if outputs.folder is None or staging is None:
            return record, Rewritten(0, 0, ())
        return record, finish(task.checkpoint, Rewriting(plan, moves, meter.tick), outputs.folder, staging)


def shown_streamed(record: StreamedBalancing) -> RenderableType:
    """What `equinorm balance` prints for a folder."""
    share = percent(record.norm_after - record.norm_before, record.norm_before)
    sizes = f"{count(record.components, 'component')}, the largest of {in_bytes(record.bytes_largest)}"
    pairs = [
        ("model", record.model),
        ("inputs", record.inputs),
        ("free classes", f"{record.num_free:,}"),
        ("solved", sizes),
        (f"{norm_name(record.p)} norm", f"{number(record.norm_before)} → {number(record.norm_after)} ({share})"),
        ("residual", f"{record.residuals[0]:.1e} → {record.residuals[1]:.1e} after {count(record.cycles, 'cycle')} at most"),
    ]
    if record.power_of_two:
        pairs.append(("scales", "powers of two: every weight is 2^k times what it was"))
    if record.dead:
        pairs.append(("dead channels", f"{record.dead:,}, left at scale 1"))
    if record.output:
        pairs.append(("underflows", count(record.underflows, "entry", "entries") if record.underflows else "none"))
    pairs.append(
        ("bytes", f"{in_bytes(record.bytes_read)} read, {in_bytes(record.bytes_written)} written, {record.seconds:.0f} s")
    )
    if record.resumed:
        pairs.append(("resumed", f"{record.resumed} of {record.files} files were finished by an earlier run"))
    return facts([*pairs, ("written", record.output), ("plan", record.plan)], record.notes)
