"""Kill training runs at named moments and at random times, resume them, and compare with undisturbed runs.

    python bench/kill_soak.py --kills 60 --seed 0 --markdown

Every run is killed once or more (SIGKILL), resumed until it ends, and must then equal the undisturbed run of the same
configuration bit for bit: adapter, metrics lines (without `step_time`), completions, findings, merged weights. Its
report must exist. Some kills hit the exports (NF4, GGUF) of a merged run, which must then equal those of an undisturbed
export. Runs are forked from a process that has imported everything; no GPU, no network.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.command_server import Server
from tests.finished_run import make_run
from tests.killing import CONFIGURATIONS, EXPORT_MOMENTS, MOMENTS, export, exported, outcome, train

EXPORT = "exports"


def has_ended(run: Path) -> bool:
    """Say whether a run was finished and reported when it was killed."""
    record = run / "run.json"
    ended = record.is_file() and bool(json.loads(record.read_text()).get("finished_at"))
    return ended and (run / "report.html").is_file()


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
        merged = make_run(Path(scratch) / "merged", hidden_size=64, intermediate_size=128, head_dim=16).path
        started = time.monotonic()
        shutil.copytree(merged, run := Path(scratch) / EXPORT / "run")
        if server.run(export(run), run.with_name("log")):
            sys.exit(f"the undisturbed export failed:\n{run.with_name('log').read_text()}")
        seconds[EXPORT], references[EXPORT] = time.monotonic() - started, exported(run)
        moments = {EXPORT: list(EXPORT_MOMENTS), "": list(MOMENTS)}
        for names in moments.values():
            draw.shuffle(names)
        while sum(counts.values()) < arguments.kills and not failures:
            configuration = draw.choice([*CONFIGURATIONS, EXPORT])
            run = Path(scratch) / "killed" / "run"
            run.parent.mkdir()
            log, story = run.with_name("log"), []
            command = train(run, configuration) if configuration != EXPORT else export(run)
            if configuration == EXPORT:
                shutil.copytree(merged, run)
            names = moments.get(configuration, moments[""])
            for _ in range(draw.choice((1, 1, 2, 3))):
                if draw.random() < arguments.timed:
                    after_s = draw.uniform(0.1, seconds[configuration])
                    status = server.run(command, log, after_s=after_s)
                    story.append(f"after {after_s:.2f} s")
                    counts["export: at a random time" if configuration == EXPORT else "at a random time"] += (
                        status == -9
                    )
                else:
                    names.append(names.pop(0))  # each in turn
                    moment, call = names[-1], draw.choice((1, 1, 2, 3, 5, 8))
                    status = server.run(command, log, moment, call)
                    story.append(f"{moment}, call {call}")
                    counts[moment] += status == -9
                if status == 0 or (configuration != EXPORT and has_ended(run)):  # killed while it said good-bye
                    status = 0
                    break
            status = status and server.run(command, log)
            found = {} if status else exported(run) if configuration == EXPORT else outcome(run)
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
    missed = [name for name in (*MOMENTS, *EXPORT_MOMENTS) if not counts[name]]
    print(f"never killed at: {', '.join(missed) or 'nothing, every moment had its kill'}")
    print(
        f"{killed} kills in {runs} runs of {len(CONFIGURATIONS)} configurations and of exports, {len(failures)} that "
        f"ended otherwise than undisturbed ones, {time.monotonic() - begun:.0f} s, seed {arguments.seed}"
    )
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
