"""Random networks for as long as asked, or once more.

    python tests/support/fuzz.py --minutes 60 --output benchmarks/results/fuzz.jsonl
    python tests/support/fuzz.py --seed 17   # the networks of one seed again; --smallest looks for a smaller one

Every seed draws a hundred networks. What discovery finds in each is tried with numbers (`network_checks`). With --rewrites each
is looked at once more, written in another way, which must give the same group: a difference is counted as missed. Returns 1 if
a network is unsound or an error was met.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from random_networks.checks import UnsoundError, check
from random_networks.networks import Network, arguments, networks

import equinorm

EACH = 100
"""Networks of one seed."""


def looked_at(network: Network, rewrites: bool) -> tuple[set[str], str]:
    """What could be said of a network, and what is wrong with it."""
    try:
        seen = check(network)
        if rewrites and "ill-conditioned" not in seen and network.is_rewritable:
            args = arguments(network, seed=1)
            one, other = (equinorm.symmetries(each, args) for each in (network, network.rewrite()))
            if one.num_free != other.num_free:
                return {*seen, "missed"}, f"{one}\nand written in another way:\n{other}"
    except UnsoundError as error:
        return {"unsound"}, str(error)
    except (equinorm.ExportError, equinorm.RescaleError) as error:  # a gain c + w may lose its precision
        return {"refused"}, str(error)
    except Exception:
        return {"failed"}, traceback.format_exc(limit=-3)
    return seen, ""


def run(seed: int, smallest: bool, rewrites: bool, deadline: float = float("inf")) -> tuple[Counter[str], list[str]]:
    """Networks of one seed: counts, and those that are unsound, failed or missed something."""
    seen: Counter[str] = Counter()
    faults: list[str] = []
    phases = [Phase.generate, Phase.shrink] if smallest else [Phase.generate]

    @hypothesis.seed(seed)
    @settings(max_examples=EACH, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(networks())
    def look(network: Network) -> None:
        if time.monotonic() > deadline:
            return
        found, fault = looked_at(network, rewrites)
        seen["networks"] += 1
        seen.update(found)
        if fault:
            kind = next(kind for kind in ("unsound", "failed", "refused", "missed") if kind in found)
            faults.append(f"{kind}: network {seen['networks']} of seed {seed}\n{network!r}\n{fault}")
            assert not smallest or kind in ("refused", "missed"), faults[-1]

    look()
    return seen, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--smallest", action="store_true", help="with --seed: shrink a network that fails")
    parser.add_argument("--rewrites", action="store_true", help="also find each network's group when written in another way")
    parser.add_argument("--output", type=Path, help="file to which a line of JSON with counts and versions is added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, commit = time.monotonic(), head()
    deadline = started + 60 * options.minutes if options.seed is None else float("inf")
    total: Counter[str] = Counter()
    faults: list[str] = []
    seed = first = options.first if options.seed is None else options.seed
    while time.monotonic() < deadline:
        seen, found = run(seed, options.smallest, options.rewrites, deadline)
        total += seen
        faults += found
        print("\n\n".join([*found, f"seed {seed}: {dict(total)}"]), flush=True)  # noqa: T201  # a script of its own
        seed += 1
        if options.seed is not None:
            break
    if options.output:
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "seeds": [first, seed - 1],
            "networks_of_a_seed": EACH,
            **{
                name: total[name]
                for name in ("networks", "free", "exact", "cast", "ill-conditioned", "refused", "missed", "failed", "unsound")
            },
            "seconds": round(time.monotonic() - started),
            "commit": commit,
            "versions": versions(),
        }
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return int(bool(total["unsound"] or total["failed"]))


def head() -> str | None:
    """The commit that is checked out; None where this is no clone."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def versions() -> dict[str, Any]:
    return {
        "equinorm": equinorm.__version__,
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


if __name__ == "__main__":
    sys.exit(main())
