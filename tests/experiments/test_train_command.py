"""`equinorm train` and `equinorm figures`, from the command line."""

import json
import math
from pathlib import Path

import pytest
from cli_tools import folder, invoke, record, refusal
from experiment_tools import TINY, result

from equinorm.experiments import presets, trainer, unfinished
from equinorm.experiments.config import Run, asymmetry
from equinorm.experiments.figures import pictures
from equinorm.experiments.results import Results, read
from equinorm.experiments.series import experiments

__all__ = ["folder"]

SMALL = ["--seeds", "2", "--epochs", "2", "--select-epochs", "1", "--lrs", "0.1", "--workers", "1"]
SMALL += ["--set", "width=16", "--depths", "2", "--batches", "128"]
PNG = b"\x89PNG\r\n\x1a\n"


def train(*more, **options):
    return record("train", *SMALL, *more, **options)


def test_digits_end_to_end(folder):
    found = train("--methods", "baseline,bn,path_sgd,enorm", "--results", "r.jsonl")
    assert [cell["run"]["method"] for cell in found["cells"]] == ["baseline", "bn", "path_sgd", "enorm"]
    for cell in found["cells"]:
        one, two = cell["accuracies"]
        assert cell["mean"] == pytest.approx((one + two) / 2)
        assert cell["deviation"] == pytest.approx(abs(one - two) / math.sqrt(2))
        assert f"{cell['run']['lr']:g}" in cell["tried"]
        assert cell["run"]["epochs"] == 2
        assert cell["run"]["width"] == 16
        best = max(cell["tried"].values())
        assert cell["tried"][f"{cell['run']['lr']:g}"] == best
    assert found["repeated"] == 0
    assert (folder / "equinorm-train.png").read_bytes().startswith(PNG)
    results = read(folder / "r.jsonl")
    assert len(results) == found["runs"] == sum(len(cell["tried"]) + 2 for cell in found["cells"])
    again = train("--methods", "baseline,bn,path_sgd,enorm", "--results", "r.jsonl")
    assert again["cells"] == found["cells"]
    assert again["repeated"] == again["runs"] == found["runs"]


def test_table_shows_the_record():
    text = invoke("train", *SMALL, "--methods", "gn enorm:c=1.5", "--results", "r.jsonl").stdout
    found = train("--methods", "gn enorm:c=1.5", "--results", "r.jsonl")
    for cell, name in zip(found["cells"], ("GN", "ENorm c=1.5"), strict=True):
        line = next(line for line in text.splitlines() if line.strip().startswith(name + "  "))
        assert f"{100 * cell['mean']:.2f}%" in line
        assert f"{100 * cell['deviation']:.2f}" in line
        assert f" {cell['run']['lr']:g} " in line


def test_several_processes(folder, monkeypatch):
    """Two processes give the curves of one, and of this one: a seed decides everything. Nothing unfinished is left."""
    found = []
    monkeypatch.setattr(unfinished, "SAVED_EVERY", 0.0)
    for name, workers in (("a.jsonl", "1"), ("b.jsonl", "2")):
        train("--methods", "baseline", "--results", name, "--workers", workers)
        found.append({entry.run: (entry.accuracy, entry.curves) for entry in read(folder / name)})
    assert found[0] == found[1]
    assert not list(folder.glob("*.unfinished"))


def test_an_interrupted_command_goes_on(folder, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVED_EVERY", 0.0)
    original, seen = trainer.Trainer.epoch, []

    def epoch(self, *args):
        seen.append(len(self.curves.loss))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(trainer.Trainer, "epoch", epoch)
    arguments = ["--methods", "enorm", "--epochs", "4", "--seeds", "1", "--select-epochs", "0", "--results", "r.jsonl"]
    invoke("train", *SMALL, *arguments, code=130)
    (kept,) = (folder / "r.unfinished").iterdir()
    kept.with_name(f".{kept.name}.abc.tmp").touch()  # as of a program that was killed while it wrote
    train(*arguments)
    assert seen == [0, 1, 2, 2, 3]
    assert not (folder / "r.unfinished").exists()


def test_presets_from_files(folder):
    sweep = {"base": {"width": 16, "epochs": 1, "clip": 1}, "methods": ["bn"], "depths": [1], "batches": [128], "seeds": 1}
    (folder / "s.json").write_text(json.dumps(sweep))
    found = record("train", "--preset", "s.json", "--select-epochs", "1", "--lrs", "0.1", "--workers", "1")
    assert found["cells"][0]["run"]["method"] == "bn"
    assert found["sweep"]["base"]["clip"] == 1
    yaml = pytest.importorskip("yaml")
    (folder / "s.yaml").write_text(yaml.safe_dump(sweep))
    assert presets.preset("s.yaml") == presets.preset("s.json")
    for content in ("[1]", "{", '{"base": {"x": 1}}'):
        (folder / "s.json").write_text(content)
        assert "s.json" in refusal("train", "--preset", "s.json")


def test_every_preset_is_valid():
    for name, sweep in presets.PRESETS.items():
        assert sweep.cells(), name
        assert len(set(sweep.cells())) == len(sweep.methods) * len(sweep.depths) * len(sweep.batches)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--preset", "x"], "there is no preset 'x'"),
        (["--methods", "adam"], "there is no method 'adam'"),
        (["--set", "lr=1"], "'lr' is no setting"),
        (["--set", "clip=much"], "clip='much'"),
        (["--depths", "1,a"], "--depths"),
        (["--lrs", "0.3"], "0.3 is no learning rate of the grid"),
        (["--seeds", "0"], "at least 1"),
        (["--device", "cuda:7"], "CUDA"),
        (["--preset", "fc"], "--data"),
        (["--picture", "a.gif"], ".png"),
    ],
)
def test_refusals(folder, arguments, part):
    assert part in refusal("train", "--workers", "1", *arguments)
    assert list(folder.iterdir()) == []


def test_figures(folder):
    train("--methods", "baseline,enorm", "--depths", "1,2", "--results", "r.jsonl")
    found = record("figures", "r.jsonl", "-o", "out")
    names = {"accuracy-depth", "learning-curves", "learning-rates", "norms", "weights"}
    assert {path.name for path in (folder / "out").iterdir()} == {f"digits-fc-{name}.png" for name in names}
    assert sorted(found["pictures"]) == sorted(str(path.relative_to(folder)) for path in (folder / "out").iterdir())
    assert all(path.read_bytes().startswith(PNG) for path in (folder / "out").iterdir())
    assert "exists by now. Use --force to replace it" in refusal("figures", "r.jsonl", "-o", "out")
    assert record("figures", "r.jsonl", "-o", "out", "--force") == found


def test_figures_by_batch_size(folder):
    results = Results(Path("r.jsonl"))
    for entry in [*made("bn", batch=16), *made("bn", batch=64), *made("enorm", batch=16)]:
        results.append(entry)
    record("figures", "r.jsonl", "-o", "out")
    assert (folder / "out" / "digits-fc-accuracy-batch.png").read_bytes().startswith(PNG)


def test_figures_need_results():
    assert "there is no file" in refusal("figures", "r.jsonl")
    results = Results(None)
    results.append(result(Run(held_out=True)))
    assert experiments(results.by_run.values()) == []


# ------------------------------------------------------------------------------------------- results put together


def made(method, depth=1, batch=256, seeds=2, accuracy=0.5, **options):
    runs = [Run(method=method, depth=depth, batch=batch, epochs=3, seed=seed, **options) for seed in range(seeds)]
    return [result(run, accuracy + 0.1 * run.seed) for run in runs]


def test_series_are_grouped_by_all_but_the_seed():
    entries = [*made("bn"), *made("enorm", c=1.2), *made("enorm", c=1.0), *made("bn", depth=3), *made("bn", batch=16)]
    (experiment,) = experiments(entries)
    assert (experiment.depths, experiment.batches) == ([1, 3], [16, 256])
    assert [series.label for series in experiment.at(1, 256)] == ["BN", "ENorm c=1.2", "ENorm"]
    assert all(series.accuracies.tolist() == pytest.approx([50, 60]) for series in experiment.series)
    assert experiment.at(1, 256)[0].curve("accuracy").shape == (2, 3)


def test_other_networks_and_pixels_are_other_experiments():
    entries = [*made("bn"), *made("bn", network="conv"), *made("bn", width=64), result(Run(epochs=3), digest="1" * 16)]
    assert [e.name for e in experiments(entries)] == ["digits-fc", "digits-conv", "digits-fc-2", "digits-fc-3"]


def test_the_last_learning_rate_counts():
    (experiment,) = experiments([*made("bn", lr=0.1, accuracy=0.2), *made("bn", lr=0.5, accuracy=0.4)])
    (series,) = experiment.series
    assert (series.run.lr, len(series.results)) == (0.5, 2)


def test_searches_belong_to_their_series():
    search = [
        result(Run(method="bn", epochs=1, lr=lr, held_out=True), accuracy, diverged=accuracy is None)
        for lr, accuracy in ((0.1, 0.3), (0.2, 0.4), (0.5, None))
    ]
    (experiment,) = experiments([*search, *made("bn", lr=0.2), *made("gn")])
    assert experiment.series[0].tried == {0.1: 0.3, 0.2: 0.4, 0.5: None}
    assert experiment.series[1].tried == {}


def test_curves_of_diverged_runs_go_on_at_chance():
    short = result(Run(epochs=3, seed=1), 0.1, diverged=True)
    short.curves.accuracy[:] = [0.4, 0.1]
    short.curves.loss[:] = [2.0, math.nan]
    (experiment,) = experiments([result(Run(epochs=3), 0.5), short])
    assert experiment.series[0].curve("accuracy").tolist() == [[50, 50, 50], [40, 10, 10]]
    loss = experiment.series[0].curve("loss")
    assert loss[1, 0] == 2
    assert all(map(math.isnan, loss[1, 1:]))


def test_every_picture_of_awkward_results():
    """One seed, one method, everything diverged, nothing measured: still a picture."""
    lost = result(TINY, 0.1, diverged=True)
    lost.curves.loss[:] = [math.nan]
    lost.curves.accuracy[:] = [0.1]
    for entries in ([lost], [result(TINY)], [*made("bn", seeds=1), *made("gn", batch=16, seeds=1)]):
        (experiment,) = experiments(entries)
        drawn = pictures(experiment)
        assert {"learning-curves", "norms"} <= drawn.keys()
        assert all(content.startswith(PNG) for content in drawn.values())


def test_an_asymmetry_by_depth_is_one_variant():
    """What `enorm:c=0` in a sweep stands for differs between depths."""
    cs = {depth: asymmetry(depth) for depth in (1, 15)}
    assert len({*cs.values()}) == 2
    runs = [entry for depth, c in cs.items() for entry in made("enorm", depth, c=c, momentum=0.9)]
    plain = [entry for depth in cs for entry in made("enorm", depth, c=1.2)]
    (experiment,) = experiments([*runs, *plain])
    assert sorted(s.label for s in experiment.at(15, 256)) == ["ENorm c=1.2", "ENorm momentum=0.9, c by depth"]
    assert len({(s.label, s.variant) for s in experiment.series}) == 2


def test_learning_rates_are_those_of_the_longest_search():
    """Accuracies after few epochs do not compare with those after many."""
    searches = [
        result(Run(method="bn", epochs=epochs, lr=lr, held_out=True), accuracy)
        for epochs, lr, accuracy in [(20, 0.1, 0.5), (20, 0.2, 0.6), (3, 0.5, 0.4)]
    ]
    (experiment,) = experiments([*searches, *made("bn")])
    assert experiment.series[0].tried == {0.1: 0.5, 0.2: 0.6}
