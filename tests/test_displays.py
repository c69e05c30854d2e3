"""What results show of themselves: a screen in a terminal, a table in a notebook, everything on request."""

import math
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import equinorm

BATCH = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

VOID = {"br", "hr", "img", "meta"}


def deep(layers: int) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = [m for i in range(layers) for m in (nn.Linear(8, 8), nn.GELU() if i % 3 == 2 else nn.ReLU())]
    return nn.Sequential(*blocks, nn.Linear(8, 4)).double()


class Reader(HTMLParser):
    """Cells by row; fails on tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.tags = [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert tag not in VOID
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def rows(result) -> list[list[str]]:
    reader = Reader(result._repr_html_())
    assert reader.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    return reader.rows


@pytest.mark.parametrize("layers", [2, 12, 60])
def test_symmetries_fit_a_screen_and_details_hold_everything(layers):
    symmetries = equinorm.symmetries(deep(layers), (BATCH,))
    text, details = str(symmetries), symmetries.details()
    assert len(text.splitlines()) <= 30
    assert text.splitlines()[0] == details.splitlines()[0]
    assert (text == details) == (layers == 2)
    moving = [scaling.name for scaling in symmetries.scalings if scaling.factors]
    assert all(f"  {name} [" in details for name in moving)
    assert all(f"{pin.tensor}[{pin.axis}]: {pin.channels} channels by {pin.reason}" in details for pin in symmetries.pins)
    assert len(details.splitlines()) == 2 + len(moving) + len(symmetries.pins)
    assert repr(symmetries) == f"Symmetries(num_free={symmetries.num_free})"


def test_summary_adds_up_pins_by_reason_and_says_how_to_see_all():
    symmetries = equinorm.symmetries(deep(60), (BATCH,))
    lines = str(symmetries).splitlines()
    assert lines[1] == "  8 classes from 0.weight[0]"
    assert f"  … and {len(symmetries.families) - 8} more families" in lines
    by_gelu = [pin for pin in symmetries.pins if pin.reason.operation == "aten.gelu"]
    first = f"{by_gelu[0].tensor}[{by_gelu[0].axis}] at {by_gelu[0].reason.source}"
    reason = f"{by_gelu[0].reason.operation} ({by_gelu[0].reason.detail})"
    assert f"  160 channels on 20 axes by {reason}, as {first}" in lines
    assert "  4 channels on 1 axis by model output, as 120.weight[0]" in lines
    assert lines[-1] == "symmetries.details() shows every tensor and every pin."


def test_summary_keeps_casts():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(30))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x).bfloat16().float())
            return x

    symmetries = equinorm.symmetries(Cast(), (BATCH.float(),))
    lines = str(symmetries).splitlines()
    assert len(lines) <= 30
    assert lines[lines.index("powers of two only:") + 1].startswith("  232 classes pass a cast to bfloat16")
    assert any("powers of two only" in row for row in rows(symmetries))


@pytest.mark.parametrize("layers", [2, 12, 60])
def test_notebooks_show_a_short_table_of_symmetries(layers):
    symmetries = equinorm.symmetries(deep(layers), (BATCH,))
    shown = rows(symmetries)
    assert ["free scale classes", f"{symmetries.num_free:,} in {len(symmetries.families)} families"] in shown
    assert len(shown) <= 14  # two of them headers
    assert ["model output", "4", "1"] in shown
    hidden = [row[0] for row in shown if row[0].startswith("… and ")]
    listed = [row for row in shown if row[0].endswith(".weight[0]")]
    if hidden:
        assert hidden == [f"… and {len(symmetries.families) - len(listed)} more families"]
    else:
        assert len(listed) == len(symmetries.families)


def test_notebooks_show_a_short_table_of_a_balance():
    balance = equinorm.symmetries(deep(12), (BATCH,)).balance(c=1.5)
    shown = rows(balance)
    assert ["ℓ2 norm", f"{balance.norm_before:.6g} → {balance.norm_after:.6g}"] in shown
    assert ["asymmetry c", "1.5"] in shown
    listed = [row for row in shown if row[0].endswith(".weight")]
    energies = {energy.name: energy for energy in balance.energies}
    assert listed == [[n, f"{energies[n].before:.6g}", f"{energies[n].after:.6g}"] for n, *_ in listed]
    assert shown[-1] == [f"… and {len(energies) - len(listed)} more tensors"]
    assert len(shown) <= 13
    maximum = equinorm.symmetries(deep(2), (BATCH,)).balance(p=math.inf)
    assert rows(maximum)[0][0] == "ℓ∞ norm"
    still = equinorm.symmetries(nn.Linear(8, 4).double(), (BATCH,)).balance()
    assert rows(still) == [["result", still.reason]]


def test_notebooks_show_a_short_table_of_an_equivalence():
    net = deep(15)
    other = deep(15)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    found = equinorm.equivalence(net, other, (BATCH,))
    html = found._repr_html_()
    assert "<strong>Not equivalent</strong>" in html
    shown, columns = rows(found), ["tensor", "difference", "entries", "most"]
    assert columns in shown
    assert shown[-1][0] == f"… and {len(found.different) - (len(shown) - shown.index(columns) - 2)} more tensors"
    assert len(shown) <= 13
    same = equinorm.equivalence(net, equinorm.balance(net, (BATCH,)), (BATCH,))
    assert "<strong>Rescaling-equivalent</strong>" in same._repr_html_()
    assert "tensor" not in [row[0] for row in rows(same)]


def test_names_are_escaped():
    class Evil(nn.Sequential):
        pass

    Evil.__name__ = "<script>alert(1)</script>"
    net = Evil(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    net.add_module("<b>&", nn.ReLU())
    net.add_module("<i>'\"", nn.Linear(4, 4).double())
    symmetries = equinorm.symmetries(net, (BATCH,))
    for result in (symmetries, symmetries.balance()):
        html = result._repr_html_()
        assert "<script" not in html
        assert "<b>" not in html
        assert "<i>" not in html
        assert "&lt;script&gt;" in html
        rows(result)
