"""Barriers of linear interpolation: train pairs of networks, then measure what lies between them.

    cd benchmarks
    python -m barriers train --data FOLDER --weights FOLDER [--networks MLP "ResNet-20 ×1"]
    python -m barriers measure --data FOLDER --weights FOLDER [--output results/barriers.jsonl]

The data folder holds cifar-10-batches-py, in CIFAR-10's official layout. Training goes on where it stopped.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from barriers.measuring import TRAINED, records
from barriers.networks import SETTINGS
from barriers.training import images, train
from common import options_of, report


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("command", choices=["train", "measure"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--trained", nargs="*", default=[*TRAINED], choices=[*TRAINED], help="which pairs")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set, to measure on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = images(options.data)
    for name in options.networks:
        for kind in options.trained:
            if options.command == "train":
                for seed, enorm in enumerate(TRAINED[kind]):
                    train(name, seed, enorm, data, options.weights)
            else:
                report(records(name, kind, data, options.weights, options.images), options.output)


if __name__ == "__main__":
    main()
