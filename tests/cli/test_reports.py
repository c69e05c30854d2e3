"""Reports and the demonstration: valid, self-contained, and the numbers in them are the record's."""

import base64
import html.parser
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import cli_models
import numpy as np
import pytest
import torch
from cli_tools import APP
from PIL import Image
from typer.testing import CliRunner

import equinorm
from equinorm.balancing.options import BalanceOptions
from equinorm.cli import demo, loading
from equinorm.cli.verified_balance import drawn, pictures, verified_balance
from equinorm.reporting.pictures import _shrunk
from equinorm.reporting.words import numbers


def balanced(model, x, power_of_two=False, **options):
    loaded, options = loading.Loaded("net", model.eval(), (x,)), BalanceOptions(**options, compile=None)
    return verified_balance(loaded, equinorm.symmetries(loaded.model, (x,)), options, power_of_two=power_of_two)


@pytest.fixture(scope="module")
def demonstration():
    return demo.demonstrate(epochs=2)


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its images, and the cells of its tables; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def images(self):
        assert all(reference.startswith("data:image/png;base64,") for reference in self.references)
        return [picture(base64.b64decode(reference.partition(",")[2])) for reference in self.references]


def picture(data):
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    image = Image.open(io.BytesIO(data))
    image.verify()
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.std() > 5  # something is drawn
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges)  # and nothing is cut off
    return pixels


def is_self_contained(text):
    return not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", re.sub(r"base64,[^\"]*", "", text))


def test_page_shows_the_record():
    record, pictures = balanced(cli_models.convolutional(), torch.randn(2, 3, 12, 12))
    text = drawn(Path("r.html"), record, pictures).decode()
    assert is_self_contained(text)
    page = Page(text)
    assert len(page.images()) == 3
    header, *rows, total = page.rows
    assert header == ["tensor", "before", "after"]
    assert [row[0] for row in rows] == [energy.name for energy in record.energies]
    for column, key in ((1, "before"), (2, "after")):
        shown = [float(row[column].replace(",", "")) for row in (*rows, total)]
        assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=5e-5 * len(shown))  # every number is rounded to 1e-4
        assert shown[-1] == pytest.approx(getattr(record, f"energy_{key}"), abs=1e-4)
    assert f"{record.norm_before:,.4f} → {record.norm_after:,.4f}" in page.text


@pytest.mark.parametrize(
    ("factory", "options", "pictures"),
    [
        ("mlp", {"p": float("inf")}, 3),
        ("mlp", {"p": 0.5, "c": 1.5}, 3),
        ("mlp", {"cycles": 0}, 2),
        ("gelu", {}, 1),
        ("narrow", {}, 3),
    ],
)
def test_both_formats_of_every_kind_of_result(factory, options, pictures):
    record, weights = balanced(getattr(cli_models, factory)(), torch.randn(2, 8), **options)
    assert len(weights) <= 5
    picture(drawn(Path("r.png"), record, weights))
    assert len(Page(drawn(Path("r.html"), record, weights).decode()).images()) == pictures


def test_names_are_escaped():
    record, weights = balanced(cli_models.mlp(), torch.randn(2, 8))
    record = replace(record, model="<script src='https://x.y/z.js'></script>")
    text = drawn(Path("r.html"), record, weights).decode()
    assert "<script" not in text


def test_pictures_hold_magnitudes_before_and_after():
    model, original = cli_models.convolutional(), cli_models.convolutional()
    _, weights = balanced(model, torch.randn(2, 3, 12, 12))
    assert [weight.name for weight in weights] == ["0.weight", "3.weight", "7.weight"]
    for weight, index in zip(weights, (0, 3, 7), strict=True):
        for shown, source in ((weight.before, original), (weight.after, model)):
            value = source[index].weight.detach().double()
            expected = value.abs() if value.dim() == 2 else value.pow(2).mean((2, 3)).sqrt()
            assert torch.allclose(shown, expected, rtol=1e-12, atol=0)


def test_run_of_layers_that_changed_most():
    model = cli_models.narrow()
    symmetries = equinorm.symmetries(model, (torch.randn(2, 8),))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with torch.no_grad():
        model[40].weight.mul_(100)
    names = [weight.name for weight in pictures(symmetries, before)]
    assert len(names) == 5
    assert "40.weight" in names


def test_large_matrices_keep_their_rms():
    matrix = torch.rand(768, 384, dtype=torch.float64)
    shrunk = _shrunk(matrix)
    assert shrunk.shape == (192, 192)
    assert np.sqrt((shrunk**2).mean()) == pytest.approx(float(matrix.square().mean().sqrt()), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0, 1.5, 12345.678], ["0", "1.5000", "12,345.6780"]),
        ([1e-5, 1.0], ["1.0000e-05", "1.0000e+00"]),
        ([2e7], ["2.0000e+07"]),
    ],
)
def test_columns_of_numbers_share_a_format(values, shown):
    assert numbers(values) == shown


def test_demonstration_keeps_every_prediction(demonstration):
    record, _ = demonstration
    assert record.images == 1797
    assert record.predictions_unchanged == 1797
    assert [stage.name for stage in record.stages] == ["trained", "unbalanced", "balanced"]
    trained, unbalanced, balanced = record.stages
    assert trained.accuracy == unbalanced.accuracy == balanced.accuracy > 0.7  # two epochs already beat chance by far
    assert balanced.norm < trained.norm < unbalanced.norm / 10
    assert balanced.residual <= 1e-5 < unbalanced.residual
    assert balanced.norm == pytest.approx(record.balancing.norm_after, rel=1e-6)
    assert record.outputs_equal == record.outputs == 17970
    assert record.deviation_power_of_two == 0
    assert 0 < record.balancing.deviation <= 1e-5


def test_eight_bits_lose_the_unbalanced_network_and_keep_the_equalized_one(demonstration):
    record, _ = demonstration
    assert record.integers.accuracy_before < 0.5
    assert record.integers.accuracy_after > record.stages[0].accuracy - 0.02
    assert record.stages[0].accuracy > 0.7


def test_demo_command(tmp_path, monkeypatch, demonstration):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demonstrate", lambda say: demonstration)
    for _ in range(2):  # the default report is replaced
        result = CliRunner().invoke(APP, ["demo"])
        assert result.exit_code == 0, result.stderr
    assert "1,797 of 1,797 unchanged" in result.stdout
    assert re.search(r"^report +equinorm-demo.html$", result.stdout, re.M)
    assert is_self_contained(Path("equinorm-demo.html").read_text(encoding="utf-8"))
    assert CliRunner().invoke(APP, ["demo", "--report", "equinorm-demo.html", "--json"]).exit_code == 0
    arguments = ["demo", "--report", "own.png", "--json"]
    assert json.loads(CliRunner().invoke(APP, arguments).stdout)["report"] == "own.png"
    picture(Path("own.png").read_bytes())
    refused = CliRunner().invoke(APP, arguments)
    assert refused.exit_code == 2
    assert "--force" in json.loads(refused.stdout)["error"]["message"]


def test_demo_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    result = CliRunner().invoke(APP, ["demo"])
    assert result.exit_code == 2
    assert "pip install scikit-learn" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_report_of_the_balance_command(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    arguments = [
        "balance",
        "cli_models:mlp",
        "--input",
        "2x8",
        "-o",
        "out.safetensors",
        "--report",
        f"report.{suffix}",
        "--json",
    ]
    result = CliRunner().invoke(APP, arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["report"] == f"report.{suffix}"
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", f"report.{suffix}"}
    content = Path(f"report.{suffix}").read_bytes()
    if suffix == "png":
        picture(content)
    else:
        assert len(Page(content.decode()).images()) == 3
