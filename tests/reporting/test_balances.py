"""What a `Balance` draws, writes and gives as plain data."""

import base64
import importlib.util
import json
import math
import re
import subprocess
import sys

import matplotlib
import pytest
import torch
from torch import nn

import equinorm

matplotlib.use("agg")
from matplotlib import pyplot

BATCH = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PNG = b"\x89PNG\r\n\x1a\n"


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()


@pytest.fixture(autouse=True)
def close():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("options", [{}, {"p": 1, "c": 2.0}, {"p": math.inf}, {"method": "cyclic", "cycles": 3}, {"cycles": 0}])
def test_plot_shows_energies_and_residuals(options):
    balance = equinorm.symmetries(network(), (BATCH,)).balance(**options)
    left, right = balance.plot()
    widths = [bar.get_width() for bar in left.patches]
    assert widths == [e.before for e in balance.energies] + [e.after for e in balance.energies]
    assert [label.get_text() for label in left.get_yticklabels()] == [e.name for e in balance.energies]
    (line,) = [line for line in right.lines if len(line.get_xdata()) == len(balance.residuals)]
    shown = [value if value > 0 else None for value in balance.residuals]
    assert [None if math.isnan(value) else value for value in line.get_ydata()] == shown
    left.figure.canvas.draw()


def test_plot_draws_in_axes_that_are_given_and_leaves_settings_alone():
    before = dict(matplotlib.rcParams)
    figure, axes = pyplot.subplots(2, 1)
    balance = equinorm.symmetries(network(), (BATCH,)).balance()
    assert balance.plot(axes) is axes
    assert figure.axes == list(axes)
    assert all(axis.has_data() for axis in axes)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(equinorm.EquinormError, match="axes must be two of matplotlib's, not Axes"):
        balance.plot(axes[0])


def test_plot_says_why_nothing_moves():
    balance = equinorm.symmetries(nn.Linear(8, 4).double(), (BATCH,)).balance()
    left, _ = balance.plot()
    assert balance.reason in [text.get_text() for text in left.texts]
    left.figure.canvas.draw()


def images(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]


def test_report_is_one_page_with_facts_energies_and_weights(tmp_path):
    net = network()
    balance = equinorm.symmetries(net, (BATCH,)).balance()
    path = tmp_path / "x.html"
    balance.report(path)
    text = path.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert len(images(text)) == 3  # weights, energies, convergence
    assert all(image.startswith(PNG) for image in images(text))
    assert all(f"<td>{energy.name}</td>" in text for energy in balance.energies)
    assert "ℓ2 norm" in text
    assert "http" not in text
    balance.apply_()
    balance.report(str(path))  # again, over the old one
    assert len(images(path.read_text("utf-8"))) == 2  # the weights that were read are gone
    balance.report(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert {file.name for file in tmp_path.iterdir()} == {"x.html", "x.png"}


def test_report_pictures_the_weights_that_apply_writes(monkeypatch, tmp_path):
    from equinorm.reporting import pictures

    net = network()
    net.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda path, record, weights: drawn.extend(weights) or b"")
    balance = equinorm.symmetries(net, (BATCH,)).balance()
    balance.report(tmp_path / "x.html")
    before = {w.name: w.before for w in drawn}
    assert all(torch.equal(before[name], net.get_parameter(name).detach().abs()) for name in before)
    balance.apply_()
    for weight in drawn:
        torch.testing.assert_close(weight.after, net.get_parameter(weight.name).detach().double().abs(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.pdf", "must end in .html or .png"), ("absent/x.html", "there is no folder"), ("folder.html", "it is a folder")],
)
def test_report_refuses_and_writes_nothing(tmp_path, name, said):
    (tmp_path / "folder.html").mkdir()
    balance = equinorm.symmetries(network(), (BATCH,)).balance()
    with pytest.raises(equinorm.EquinormError, match=said):
        balance.report(tmp_path / name)
    assert [file.name for file in tmp_path.rglob("*")] == ["folder.html"]


@pytest.mark.parametrize("p", [2, 1.5, math.inf])
def test_dict_is_json_and_holds_the_record(p):
    balance = equinorm.symmetries(network(), (BATCH,)).balance(p=p)
    record = balance.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["p"] == ("inf" if math.isinf(p) else p)
    assert record["residuals"] == list(balance.residuals)
    assert record["log_scales"] == balance.log_scales.tolist()
    first = balance.energies[0]
    assert record["energies"][0] == {"name": "0.weight", "before": first.before, "after": first.after}
    assert (record["cycles"], record["converged"], record["reason"]) == (balance.cycles, True, balance.reason)
    assert record["dead"] == []


WITHOUT = """
import sys
for package in sys.argv[1].split(","):
    sys.modules[package] = None
import torch, equinorm
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
balance = equinorm.balance_(net, torch.randn(2, 8))
print(balance, balance._repr_html_(), balance.to_dict())
assert not [name for name in sys.modules if name.startswith(("equinorm.reporting", "equinorm.cli"))]
for draw in (balance.plot, lambda: balance.report("x.html")):
    try:
        draw()
    except equinorm.EquinormError as error:
        print(error)
"""


def test_matplotlib_is_needed_only_to_draw(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "matplotlib,rich,typer,safetensors"], capture_output=True, text=True, cwd=tmp_path
    )
    said = "pictures need matplotlib, which is not installed: pip install 'equinorm[cli]'."
    assert done.stdout.splitlines()[-2:] == [said, said], done.stderr
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "json_only"), [("rich", False), ("typer", True), ("matplotlib", False), ("safetensors", False)]
)
def test_the_command_names_the_extra(package, json_only):
    assert importlib.util.find_spec(package) is not None
    code = f"import sys; sys.modules[{package!r}] = None; import equinorm_command; equinorm_command.main()"
    arguments = ["--json"] if json_only else []
    done = subprocess.run([sys.executable, "-c", code, "inspect", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    text = json.loads(done.stdout)["error"]["message"] if json_only else done.stderr
    assert text.strip().endswith("Run pip install 'equinorm[cli]'.")
    assert f"needs {package}" in text
    assert "Traceback" not in done.stderr
