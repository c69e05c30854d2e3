"""The picture of what equalizing does to integers: a badly spread network for digits, rounded to 8 bits as it is and equalized.

    python benchmarks/quantize_digits.py [docs/images/quantize-digits.png]

Needs scikit-learn and matplotlib. The network is that of `equinorm demo`, its neurons rescaled by 10^U(−1.5, 1.5): in float
nothing changes. Each tensor has one step, weights and activations; training images calibrate, test images count.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import equinorm
from equinorm.cli import demo

DECADES, SHOWN = 1.5, 12
RIGHT, WRONG, QUIET = "#1b7f4b", "#c0392b", "#7f8c8d"


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images" / "quantize-digits.png")
    images, labels, held_out = demo._digits(0)
    torch.manual_seed(0)
    model = demo._network()
    demo._train(model, images[~held_out], labels[~held_out], 20)
    spread = equinorm.symmetries(model.eval(), (images,))
    spread.rescale_((2 * torch.rand(spread.num_free, dtype=torch.float64) - 1) * DECADES * math.log(10))
    tests, truth = images[held_out], labels[held_out]
    with torch.no_grad():
        plain = model(tests).argmax(1)
    result = equinorm.equalize(model, (images,), calibration=[(images[~held_out],)], scheme="w8a8-tensor")
    with torch.no_grad():
        before, after = (outputs.argmax(1) for outputs in result.simulated(tests))
    found = {"float": plain, "8 bits": before, "8 bits, after equinorm.equalize": after}
    accuracy = {name: float((answers == truth).double().mean()) for name, answers in found.items()}
    for name, value in accuracy.items():
        print(f"{name}: {value:.1%} of {len(truth)} test images right")
    figure = plt.figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.1, 1])
    axes = left.subplots(3, SHOWN)
    for row, (name, answers) in enumerate(found.items()):
        for column in range(SHOWN):
            place = axes[row, column]
            place.imshow(tests[column].reshape(8, 8), cmap="gray_r")
            place.set(xticks=[], yticks=[])
            colour = RIGHT if answers[column] == truth[column] else WRONG
            place.set_xlabel(str(int(answers[column])), color=colour, fontsize=12, fontweight="bold")
            for edge in place.spines.values():
                edge.set_edgecolor(QUIET)
        first, said = axes[row, 0], f"{name}: {accuracy[name]:.0%} right"
        title = first.text(0, 1.12, said, transform=first.transAxes, fontsize=11)
        title.set_in_layout(False)  # so that it does not widen its column
    place = right.subplots()
    largest = (network.get_parameter("2.weight").detach().abs().amax(1) for network in (model, result.model))
    for values, colour, name in zip(largest, (WRONG, RIGHT), ("as it was", "equalized"), strict=True):
        place.semilogy(values.sort().values / values.max(), color=colour, label=name, linewidth=2)
    place.axhline(1 / 254, color=QUIET, linestyle=":", label="half a step of 8 bits")
    place.set(xlabel="neurons of the second layer, sorted", title="largest weight / largest of the layer")
    place.legend(frameon=False, loc="lower right")
    place.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
