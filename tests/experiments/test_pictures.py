"""Pictures of experiments show what was measured: imbalance at the run's own p and c, depth in hidden layers."""

import json
from dataclasses import replace

import pytest
from experiment_tools import TINY, digits, result as made

from equinorm.experiments import figures, plot_parts
from equinorm.experiments.config import EXTRAS
from equinorm.experiments.networks import build
from equinorm.experiments.results import _parse
from equinorm.experiments.series import experiments
from equinorm.experiments.trainer import train
from equinorm.reporting.records import as_json

DATA = digits()


@pytest.fixture(scope="module")
def result():
    return train(replace(TINY, method="enorm_exact", c=1.3, epochs=4), DATA)


def test_imbalance_is_measured_at_the_c_of_the_run(result):
    assert result.curves.residuals_at == (2.0, 1.3)
    assert result.curves.residuals[-1] < 1e-3  # balanced at c = 1.3, hence not at c = 1


def test_results_keep_at_which_c_imbalance_was_measured(result):
    line = json.loads(json.dumps(as_json(result)))
    assert _parse(json.dumps(line).encode()).curves.residuals_at == (2.0, 1.3)
    del line["curves"]["residuals_at"]
    assert _parse(json.dumps(line).encode()).curves.residuals_at == (2.0, 1.0)


@pytest.mark.parametrize("at", [(2.0, 1.3), (2.0, 1.0)])
def test_imbalance_at_another_c_is_not_drawn(result, at):
    measured = replace(result, curves=replace(result.curves, residuals_at=at))
    (axis,) = figures.norms(experiments([measured])[0]).subfigs[1].axes
    own = at == (2.0, 1.3)
    assert len(axis.lines) == own
    assert ("left out" in axis.get_xlabel()) is not own


def test_depth_is_counted_in_hidden_layers(result):
    linear = [layer for layer in build(result.run, DATA.shape, DATA.classes).modules() if hasattr(layer, "in_features")]
    assert result.run.hidden_layers == len(linear) - 1
    assert plot_parts.where(experiments([result])[0].series[0]).startswith(f"{len(linear) - 1} hidden layers")


def test_runs_with_all_extras_say_so_in_two_words():
    extras = replace(TINY, **EXTRAS)
    runs = [TINY, extras, replace(extras, biases=True), replace(extras, head=1.0)]
    (experiment,) = experiments([made(run) for run in runs])
    labels = {series.label for series in experiment.series}
    less = "baseline momentum=0.9, weight_decay=0.004, centralise=1"
    assert labels == {"baseline", "baseline with extras", "baseline with extras, biases=1", less}


def test_labels_name_options_that_tell_methods_apart():
    extras = {"head": 0.1, "centralise": True}
    runs = [replace(TINY, method="bn"), replace(TINY, method="baseline", **extras), replace(TINY, method="enorm", c=1.2)]
    (experiment,) = experiments([made(run) for run in runs])
    assert {series.label for series in experiment.series} == {"BN", "baseline head=0.1, centralise=1", "ENorm"}
