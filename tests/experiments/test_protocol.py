"""The protocol, and results on disk."""

import json
import math
import multiprocessing
from dataclasses import fields, replace

import pytest
from experiment_tools import TINY, Pretend, result

from equinorm.experiments.config import DEFAULTS, ExperimentError, Run, Sweep, decade, parse, place
from equinorm.experiments.protocol import compare, label
from equinorm.experiments.results import Curves, Results, provenance, read
from equinorm.experiments.workers import Place, Pool

SWEEP = Sweep(TINY, ("baseline",), depths=(2,), batches=(128,), seeds=3, select_epochs=1, lrs=(0.01, 0.1))


def peak(best):
    """Accuracy falls with the distance from the best learning rate, in steps of the grid."""
    return lambda run: 0.9 - 0.01 * abs(place(run.lr) - place(best))


def outcome(accuracy, sweep=SWEEP, results=None, workers=1):
    pool = Pretend(accuracy, workers)
    cells, runs, repeated = compare(sweep, results or Results(None), pool)
    return cells, runs, repeated, pool.started


# ------------------------------------------------------------------------------------------------------------------- grid


def test_grid():
    assert [decade(index) for index in range(-4, 4)] == [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert [place(decade(index)) for index in range(-15, 7)] == list(range(-15, 7))
    with pytest.raises(ExperimentError, match="grid"):
        place(0.03)


@pytest.mark.parametrize("best", [1e-3, 0.02, 0.05, 0.1, 0.5, 5.0])
def test_search_ends_with_both_neighbours_tried(best):
    (cell,), runs, _, started = outcome(peak(best))
    assert cell.run.lr == best
    assert not cell.edge
    tried = {place(float(rate)) for rate in cell.tried}
    assert {place(best) - 1, place(best), place(best) + 1} <= tried
    assert len(started) == len(set(started)) == runs == len(tried) + 3


def test_search_stops_at_the_ends_of_the_grid():
    (low,), *_ = outcome(peak(1e-8))
    (high,), *_ = outcome(peak(1e4))
    assert (low.run.lr, low.edge, high.run.lr, high.edge) == (1e-5, True, 100.0, True)


def test_selection_never_sees_the_test_images():
    (cell,), _, _, started = outcome(peak(0.05))
    selection, final = [run for run in started if run.held_out], [run for run in started if not run.held_out]
    assert {(run.epochs, run.seed) for run in selection} == {(1, 0)}
    assert [(run.epochs, run.seed, run.lr) for run in final] == [(2, seed, 0.05) for seed in range(3)]
    assert started.index(final[0]) == len(selection)  # after every selection run
    assert cell.accuracies == (0.9,) * 3


def test_a_given_rate_is_taken_without_a_search():
    (cell,), runs, _, started = outcome(peak(0.05), replace(SWEEP, select_epochs=0, lrs=(0.5, 0.05)))
    assert [(run.lr, run.held_out) for run in started] == [(0.5, False)] * 3
    assert (cell.run.lr, cell.tried, runs) == (0.5, {}, 3)


def test_ties_go_to_the_smaller_rate():
    (cell,), *_ = outcome(lambda run: 0.5 if run.lr in (0.1, 0.05, 0.2) else 0.1)
    assert cell.run.lr == 0.05


def test_a_diverged_run_loses_to_any_other():
    (cell,), *_ = outcome(lambda run: None if run.lr >= 0.05 else 0.05)
    assert cell.run.lr < 0.05
    assert cell.tried["0.1"] == 0.1  # recorded as chance


def test_mean_and_deviation():
    values = {0: 0.5, 1: 0.6, 2: None}
    (cell,), *_ = outcome(lambda run: values[run.seed] if not run.held_out else peak(0.1)(run))
    assert cell.mean == pytest.approx((0.5 + 0.6 + 0.1) / 3)
    assert cell.deviation == pytest.approx(math.sqrt((0.1**2 + 0.2**2 + 0.3**2) / 2))
    assert cell.diverged == 1
    (single,), *_ = outcome(peak(0.1), replace(SWEEP, seeds=1))
    assert single.deviation is None


def test_every_cell_gets_its_own_rate():
    rates = {("baseline", 1): 0.05, ("baseline", 3): 0.2, ("bn", 1): 0.5, ("bn", 3): 1.0}
    sweep = replace(SWEEP, methods=("baseline", "bn"), depths=(1, 3))
    cells, *_ = outcome(lambda run: peak(rates[run.method, run.depth])(run), sweep, workers=3)
    assert {(cell.run.method, cell.run.depth): cell.run.lr for cell in cells} == rates


def test_progress_ends_at_everything():
    said = []
    compare(SWEEP, Results(None), Pretend(peak(0.05), 2), lambda *state: said.append(state))
    assert said[-1][0] == said[-1][1] == 5 * 1 + 3 * 2  # 0.01, 0.02, 0.05, 0.1 and one neighbour; three final runs
    assert all(done <= total for done, total, _ in said)


# ----------------------------------------------------------------------------------------------------------------- resume


def test_nothing_is_run_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    first = outcome(peak(0.05), results=Results(path))
    lines = path.read_bytes()
    again = outcome(lambda run: pytest.fail("ran again"), results=Results(path))
    assert again[0] == first[0]
    assert (first[1], first[2], again[1], again[2]) == (first[1], 0, first[1], first[1])
    assert path.read_bytes() == lines
    wider = outcome(peak(0.05), replace(SWEEP, seeds=4), Results(path))
    assert [(run.seed, run.held_out) for run in wider[3]] == [(3, False)]


def test_methods_share_what_is_the_same_run():
    """Options that a method does not use make no other run of it."""
    base = replace(TINY, c=1.2, p=3.0, cycles=5, path_every=3)
    assert Sweep(base, ("baseline",), (2,)).cells() == Sweep(TINY, ("baseline",), (2,)).cells()
    assert Sweep(base, ("enorm",), (2,)).cells() != Sweep(TINY, ("enorm",), (2,)).cells()
    assert len(Sweep(replace(TINY, network="conv"), ("bn",), (1, 2, 3)).cells()) == 1


def test_another_program_may_make_some_of_the_runs(tmp_path):
    path = tmp_path / "r.jsonl"
    other, made = Results(path), []

    def accuracy(run):
        made.append(run)
        if run.held_out and len(made) == 1:  # meanwhile someone else does the second start of the search
            other.append(result(replace(run, lr=0.1), 0.3))
        return peak(0.05)(run)

    cells, *_ = outcome(accuracy, results=Results(path))
    assert replace(made[0], lr=0.1) not in made
    assert cells[0].tried["0.1"] == 0.3


# ---------------------------------------------------------------------------------------------------------------- results


def test_results_round_trip(tmp_path):
    path = tmp_path / "r.jsonl"
    odd = result(replace(TINY, c=1.25), diverged=True)
    odd = replace(odd, curves=Curves([1.5, math.inf], [0.5, 0.1], {"a": [1.0, -math.inf]}, [0.25]), pictures={"a": ["x", "y"]})
    kept = [result(TINY), odd]
    results = Results(path)
    for entry in kept:
        results.append(entry)
    assert read(path) == kept
    json.loads(path.read_text().splitlines()[1], parse_constant=lambda name: pytest.fail(name))


def test_a_line_that_was_cut_off_is_skipped_and_kept_apart(tmp_path):
    path = tmp_path / "r.jsonl"
    Results(path).append(result(TINY))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    results = Results(path)
    assert list(results.by_run) == [TINY]
    results.append(result(replace(TINY, seed=1)))
    assert [entry.run.seed for entry in read(path)] == [0, 1]


def test_results_of_an_older_version_are_read(tmp_path):
    """Fields that were added later have their defaults."""
    path = tmp_path / "r.jsonl"
    Results(path).append(result(TINY))
    line = json.loads(path.read_text())
    del line["run"]["warmup"]
    path.write_text(json.dumps(line) + "\n")
    assert [entry.run for entry in read(path)] == [TINY]


def _append(path, worker):
    for seed in range(40):
        entry = result(replace(TINY, seed=seed, batch=worker + 1))
        Results(path).append(replace(entry, pictures={"w": ["x" * 50_000, ""]}))


def test_programs_write_one_file_at_once(tmp_path):
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(path, worker)) for worker in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(path.read_bytes().splitlines()) == 80
    assert {(entry.run.seed, entry.run.batch) for entry in read(path)} == {(s, b) for s in range(40) for b in (1, 2)}


def test_no_results_are_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text("nonsense\n")
    for name, says in (("r.jsonl", "holds no results"), ("missing.jsonl", "there is no file")):
        with pytest.raises(ExperimentError, match=says):
            read(tmp_path / name)


def test_provenance():
    found = provenance("cpu")
    assert len(found["commit"] or "0" * 40) == 40
    assert found["device"] == "cpu"
    assert found["processor"]


# ---------------------------------------------------------------------------------------------------------- configurations


def test_methods_with_options():
    run = parse("enorm:c=1.2,clip=1,biases=true,cycles=3", TINY)
    assert run == replace(TINY, method="enorm", c=1.2, clip=1.0, biases=True, cycles=3)
    assert {item.name: type(DEFAULTS[item.name]) for item in fields(run)} == {
        item.name: type(getattr(run, item.name)) for item in fields(run)
    }
    for text in ("enorm:lr=1", "enorm:x=1", "enorm:c=a", "nothing", "enorm:biases=maybe"):
        with pytest.raises(ExperimentError):
            parse(text, TINY)


def test_labels_name_what_differs():
    base = replace(TINY, c=1.2, clip=1.0)
    assert label(parse("enorm", base).canonical(), base) == "ENorm"
    assert label(parse("enorm:c=1,p=3", base).canonical(), base) == "ENorm c=1 p=3"
    assert label(parse("baseline:clip=0", base).canonical(), base) == "baseline clip=0"


def test_unknown_names_are_refused():
    for changes in ({"data": "mnist"}, {"network": "vgg"}, {"method": "ln"}):
        with pytest.raises(ExperimentError, match="It is one of"):
            Run(**changes)


# ---------------------------------------------------------------------------------------------------------------- workers


def test_errors_in_processes_are_told(tmp_path):
    pool = Pool(1, Place(tmp_path))
    pool.start(Run(data="cifar10"))
    with pytest.raises(ExperimentError, match=r"^there is no .*data_batch_1"):
        pool.finish(print)
    pool.stop()
    dead = Pool(1, Place(tmp_path))
    dead.stop()
    with pytest.raises(ExperimentError, match="worker process ended"):
        dead.finish(print)
