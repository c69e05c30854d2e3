"""The protocol: learning rates from the held-out training images, then final runs scored on the test images.

The grid of learning rates is 1, 2, 5 times powers of ten. A search starts at a few places of it and goes on until both
neighbours of the best rate have been tried, so that the best never lies at an edge. Ties go to the smaller rate.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from equinorm.experiments.config import DEFAULTS, METHODS, Run, Sweep, decade, place
from equinorm.experiments.results import Result, Results
from equinorm.experiments.workers import Epoch, Here, Pool, describe

LOWEST, HIGHEST = place(1e-5), place(100.0)
"""The search ends here, whatever it finds."""

Report = Callable[[float, float, str], None]
"""Called with the epochs done, the epochs known of so far, and what has just happened."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A method at one depth and batch size.

    Attributes:
        run: its configuration, with the chosen learning rate and the first seed.
        label: of the method.
        tried: held-out accuracy by learning rate.
        edge: the chosen rate lies at the end of the grid: no better one was looked for.
        accuracies: test accuracy of each seed.
        mean: of these.
        deviation: their standard deviation; None for a single seed.
        diverged: how many final runs did.
        seconds: mean time of training.
    """

    run: Run
    label: str
    tried: dict[str, float]
    edge: bool
    accuracies: tuple[float, ...]
    mean: float
    deviation: float | None
    diverged: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MethodComparison:
    """Record of `equinorm train`.

    Attributes:
        sweep: what was asked for.
        cells: the outcome.
        runs: how many runs the outcome rests on.
        repeated: how many of them were in the file of results already.
        results: that file.
        picture: where the picture was written.
    """

    sweep: Sweep
    cells: tuple[Cell, ...]
    runs: int
    repeated: int
    results: str | None = None
    picture: str | None = None


Search = Generator[Sequence[Run], Any, Cell]
"""Yields the runs whose results it needs next; is sent all results; returns the cell."""


def search(cell: Run, sweep: Sweep) -> Search:
    """Choose a learning rate, then make the final runs."""
    template = replace(cell, epochs=sweep.select_epochs, held_out=True, seed=0)
    scores: dict[int, float] = {}
    tried: dict[int, float] = {}
    wanted = {place(lr) for lr in sweep.lrs} if sweep.select_epochs else set()
    best = place(sweep.lrs[0])
    while wanted:
        runs = {index: replace(template, lr=decade(index)) for index in sorted(wanted)}
        found = yield list(runs.values())
        tried.update({index: found[run].accuracy for index, run in runs.items()})
        scores.update({index: -1.0 if found[run].diverged else found[run].accuracy for index, run in runs.items()})
        best = max(sorted(scores), key=lambda index: scores[index])
        wanted = {index for index in (best - 1, best + 1) if index not in scores and LOWEST <= index <= HIGHEST}
    final = [replace(cell, lr=decade(best), seed=seed) for seed in range(sweep.seeds)]
    results = yield final
    accuracies = tuple(results[run].accuracy for run in final)
    return Cell(
        run=final[0],
        label=label(cell, sweep.base),
        tried={f"{decade(index):g}": tried[index] for index in sorted(tried)},
        edge=best in (LOWEST, HIGHEST),
        accuracies=accuracies,
        mean=fmean(accuracies),
        deviation=stdev(accuracies) if len(accuracies) > 1 else None,
        diverged=sum(results[run].diverged for run in final),
        seconds=fmean(results[run].seconds for run in final),
    )


def label(run: Run, base: Run) -> str:
    """The method's name, and the options in which it differs from what all share."""
    apart = ("data", "network", "method", "depth", "batch", "lr", "held_out", "seed")
    names = [name for name in DEFAULTS if name not in apart]
    usual = replace(base, method=run.method).canonical()
    options = [f"{name}={getattr(run, name):g}" for name in names if getattr(run, name) != getattr(usual, name)]
    return " ".join([METHODS[run.method].label, *options])


def compare(
    sweep: Sweep, results: Results, pool: Here | Pool, report: Report = lambda *_: None
) -> tuple[tuple[Cell, ...], int, int]:
    """Run a sweep; what the results hold already is not run again.

    Returns:
        The cells in the sweep's order, how many runs they rest on, and how many of these were not made now.
    """
    schedule = _Schedule(sweep, results, pool, report)
    made = 0
    while not schedule.is_done:
        results.refresh()  # another program may have made some of the runs
        schedule.start_runs()
        made += schedule.finish_run()
        schedule.resume_searches()
    return schedule.cells, len(schedule.used), len(schedule.used) - made


class _Schedule:
    """Searches that wait for runs, and runs that wait for workers.

    Attributes:
        used: runs that any search has asked for.
    """

    def __init__(self, sweep: Sweep, results: Results, pool: Here | Pool, report: Report) -> None:
        self._results, self._pool, self._report = results, pool, report
        self._searches = {cell: search(cell, sweep) for cell in sweep.cells()}
        self._cells: dict[Run, Cell] = {}
        self._needs: dict[Run, Sequence[Run]] = {}  # of searches that wait
        self._waiting = dict[Run, None]()  # in their order
        self._running: dict[Run, int] = {}  # epochs done
        self.used: set[Run] = set()
        for cell in self._searches:
            self._advance(cell, None)

    @property
    def is_done(self) -> bool:
        """Has every search ended?"""
        return len(self._cells) == len(self._searches)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Outcomes in the sweep's order."""
        return tuple(self._cells[cell] for cell in self._searches)

    def start_runs(self) -> None:
        """Give work to every free worker."""
        while self._waiting and len(self._running) < self._pool.workers:
            run = next(iter(self._waiting))
            del self._waiting[run]
            if run not in self._results.by_run:
                self._running[run] = 0
                self._pool.start(run)

    def finish_run(self) -> bool:
        """Wait for one of the runs that were started and keep its result; False if there is none."""
        if not self._running:
            return False
        result = self._pool.finish(self._hear)
        self._results.append(result)
        del self._running[result.run]
        self._say(f"{describe(result.run)}: {'diverged' if result.diverged else f'{result.accuracy:.1%}'}")
        return True

    def resume_searches(self) -> None:
        """Let the searches go on whose runs are all there."""
        for cell in [cell for cell, runs in self._needs.items() if all(run in self._results.by_run for run in runs)]:
            del self._needs[cell]
            self._advance(cell, self._results.by_run)

    def _advance(self, cell: Run, sent: Mapping[Run, Result] | None) -> None:
        """Let a search go on until it needs a run that is not there."""
        try:
            while cell not in self._needs:
                runs = self._searches[cell].send(sent)
                self.used.update(runs)
                missing = [run for run in runs if run not in self._results.by_run]
                if missing:
                    self._needs[cell] = runs
                    self._waiting.update((run, None) for run in missing if run not in self._running)
                sent = self._results.by_run
        except StopIteration as end:
            self._cells[cell] = end.value

    def _hear(self, epoch: Epoch) -> None:
        self._running[epoch.run] = epoch.number
        self._say(f"{describe(epoch.run)}: {epoch.accuracy:.1%}")

    def _say(self, text: str) -> None:
        finished = sum(run.epochs for run in self.used if run in self._results.by_run) + sum(self._running.values())
        self._report(finished, max(sum(run.epochs for run in self.used), 1), text)
