"""Fuzz recipes, overrides, data, rows, adapters, checkpoints and completions for a given time.

    python bench/fuzz.py --minutes 60

Prints how many inputs were tried by kind. For an input that ends in anything but a result or a clear error it prints
hypothesis' smallest such input, skips that kind from then on, and exits with status 1. No GPU, no network.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzzing import TARGETS


def counting(function: Callable[..., None], name: str, counts: collections.Counter[str]) -> Callable[..., None]:
    """Return the target, counting its calls."""

    def counted(**values: Any) -> None:
        counts[name] += 1
        function(**values)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    counts: collections.Counter[str] = collections.Counter()
    broken: set[str] = set()
    draw, end = random.Random(arguments.seed), time.monotonic() + arguments.minutes * 60
    while time.monotonic() < end and len(broken) < len(TARGETS):
        for name, (function, strategies) in TARGETS.items():
            test = seed(draw.randrange(2**32))(given(**strategies)(counting(function, name, counts)))
            limits = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            if name in broken:
                continue
            try:
                limits(test)()
            except Exception:
                traceback.print_exc()
                broken.add(name)
            if time.monotonic() >= end:
                break
    print("| input | tried |\n|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    outcome = f"ended badly: {', '.join(sorted(broken))}" if broken else "none ended badly"
    print(f"{sum(counts.values())} inputs in {arguments.minutes:g} minutes, seed {arguments.seed}: {outcome}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
