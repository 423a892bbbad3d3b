"""Kill training runs at named moments and at random times, resume them, and compare with runs that nobody disturbed.

    python bench/kill_soak.py --kills 60 --seed 0 --markdown

Every run is killed once or more (SIGKILL), resumed until it ends, and must then equal the undisturbed run of the same
configuration bit for bit: adapter, metrics lines (without `step_time`), completions, merged weights. Runs are forked
from a process that has imported everything; no GPU, no network.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from killing import CONFIGURATIONS, MOMENTS, Server, outcome, train


def has_ended(run: Path) -> bool:
    """Say whether a run was finished, reported or not, when it was killed."""
    record = run / "run.json"
    return record.is_file() and bool(json.loads(record.read_text()).get("finished_at"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", type=float, default=0.4, help="share of kills at a random time, not at a moment")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/measurements")
    arguments = parser.parse_args()
    begun = time.monotonic()
    draw = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    runs = 0
    with Server() as server, tempfile.TemporaryDirectory() as scratch:
        references, seconds = {}, {}
        for configuration in CONFIGURATIONS:
            run = Path(scratch) / configuration / "run"
            run.parent.mkdir()
            started = time.monotonic()
            if server.run(train(run, configuration), run.with_name("log")):
                sys.exit(f"the undisturbed run failed:\n{run.with_name('log').read_text()}")
            seconds[configuration] = time.monotonic() - started
            references[configuration] = outcome(run)
        moments = list(MOMENTS)
        draw.shuffle(moments)
        while sum(counts.values()) < arguments.kills and not failures:
            configuration = draw.choice(list(CONFIGURATIONS))
            run = Path(scratch) / "killed" / "run"
            run.parent.mkdir()
            log, story = run.with_name("log"), []
            for _ in range(draw.choice((1, 1, 2, 3))):
                if draw.random() < arguments.timed:
                    after_s = draw.uniform(0.1, seconds[configuration])
                    status = server.run(train(run, configuration), log, after_s=after_s)
                    story.append(f"after {after_s:.2f} s")
                    counts["at a random time"] += status == -9
                else:
                    moments.append(moments.pop(0))  # each in turn
                    moment, call = moments[-1], draw.choice((1, 1, 2, 3, 5, 8))
                    status = server.run(train(run, configuration), log, moment, call)
                    story.append(f"{moment}, call {call}")
                    counts[moment] += status == -9
                if status == 0 or has_ended(run):  # killed while it said good-bye: nothing is left to do
                    status = 0
                    break
            status = status and server.run(train(run, configuration), log)
            found = outcome(run) if status == 0 else {}
            different = [key for key, value in references[configuration].items() if found.get(key) != value]
            runs += 1
            print(f"{sum(counts.values())} kills, {runs} runs: {configuration}: {', '.join(story)}", file=sys.stderr)
            if status or different:
                failures.append(f"{configuration}: {story}: status {status}, different: {different}\n{log.read_text()}")
            shutil.rmtree(run.parent)
    killed = sum(counts.values())
    if arguments.markdown:
        print("| killed | times |\n|---|---|")
        for moment, count in sorted(counts.items()):
            print(f"| {moment} | {count} |")
    print(
        f"{killed} kills in {runs} runs of {len(CONFIGURATIONS)} configurations, {len(failures)} that ended otherwise "
        f"than undisturbed ones, {time.monotonic() - begun:.0f} s, seed {arguments.seed}"
    )
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
