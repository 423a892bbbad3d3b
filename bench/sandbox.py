"""Throughput, endurance and resistance of the code sandbox on this machine.

    python bench/sandbox.py speed   [--programs N]      programs per second, by stack of layers
    python bench/sandbox.py soak    [--programs N]      what N programs in a row leave behind
    python bench/sandbox.py attacks [--cases FILE]      hostile programs one at a time, by stack of layers

Prints Markdown tables for docs/measurements/sandbox.md. `attacks` also runs the programs under weak isolation, where
they do harm: they fill files of 8 MB in /tmp and /dev/shm and kill processes of the same user. Run it only on a
disposable machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import processor  # noqa: E402
from rewards import sandbox  # noqa: E402
from rewards.sandbox import Call, Calls, run_tests  # noqa: E402
from rewards.sandbox.pool import Worker, pool_for  # noqa: E402

STACKS = {
    "rlimits": "landlock,seccomp,namespaces,bubblewrap",
    "rlimits, seccomp": "landlock,namespaces,bubblewrap",
    "rlimits, Landlock": "seccomp,namespaces,bubblewrap",
    "rlimits, Landlock, seccomp": "namespaces,bubblewrap",
    "all, through bubblewrap": "namespaces",
    "all": "",
}
PROGRAM = """
from collections import Counter

def most_common(words, k):
    counts = Counter(words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return [(word, counts[word]) for word in ranked[:k]]
"""
WORDS = ["fox", "dog", "the", "fox", "the", "lazy", "dog", "quick", "the", "brown", "jumps", "over", "while"]


def main() -> None:
    """Print the machine, then what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "soak", "attacks"])
    parser.add_argument("--programs", type=int, default=0)
    parser.add_argument("--cases", type=Path, default=ROOT.parent / "shared" / "cases" / "sandbox_hostile.jsonl")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(
        f"Machine: {processor()}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"user {os.getuid()}; load {os.getloadavg()[0]:.1f} before the run.\n"
    )
    if arguments.what == "speed":
        print_speed(arguments.programs or 2000)
    elif arguments.what == "soak":
        print_soak(arguments.programs or 10_000)
    else:
        print_attacks(arguments.cases)


def _tests() -> Calls:
    """Return ten calls."""
    calls = []
    for k in range(10):
        ranked = sorted(set(WORDS), key=lambda word: (-WORDS.count(word), word))
        calls.append(Call("most_common", [WORDS, k], [(word, WORDS.count(word)) for word in ranked[:k]]))
    return Calls(tuple(calls))


def print_speed(programs: int) -> None:
    """Print programs a second under the stacks that isolate, and the processor time each takes."""
    print("| layers | programs/s | CPU ms a program: trainer | worker and program |\n|---|---|---|---|")
    for name, without in STACKS.items():
        os.environ[sandbox.WITHOUT] = without
        if sandbox.isolation().weak:
            continue
        run_tests([PROGRAM] * 50, _tests())
        before, start = os.times(), time.perf_counter()
        outcomes = run_tests([PROGRAM] * programs, _tests())
        elapsed, middle = time.perf_counter() - start, os.times()
        assert all(outcome.fraction == 1.0 for outcome in outcomes)
        sandbox.close_all()  # only now their processor time is known
        after = os.times()
        trainer = (middle.user + middle.system - before.user - before.system) / programs * 1000
        children = (after.children_user + after.children_system) - (before.children_user + before.children_system)
        print(f"| {name} | {programs / elapsed:.0f} | {trainer:.2f} | {children / programs * 1000:.2f} |")
    print(f"\n{programs} programs with 10 tests each, one more at a time than there are cores, start apart.")


def print_soak(programs: int) -> None:
    """Print what a worker holds before and after many programs, well-behaved and not."""
    right, tests = PROGRAM, _tests()
    mix = [
        *[right] * 5,
        "open('x', 'w').write('y' * 100000)\nimport os\nos.makedirs('a/b/c')\n" + right,
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n" + right,
        "import os\ntry:\n    while True: os.fork()\nexcept OSError: pass\n" + right,
        "import os; os._exit(1)",
        "x = bytearray(10 ** 8)\n" + right,
    ]
    print("| layers | programs | seconds | processes | descriptors | worker RSS, MB | trainer's RSS, MB | files left |")
    print("|---|---|---|---|---|---|---|---|")
    for name, without in STACKS.items():
        os.environ[sandbox.WITHOUT] = without
        if sandbox.isolation().weak or "bubblewrap" in name:
            continue
        run_tests((mix * 20)[:200], tests)
        before, start = _holdings(), time.perf_counter()
        for _ in range(programs // 100):
            run_tests(mix * 10, tests)
        after, elapsed = _holdings(), time.perf_counter() - start
        cells = [f"{was} → {now}" for was, now in zip(before, after, strict=True)]
        print(f"| {name} | {programs} | {elapsed:.0f} | {' | '.join(cells)} |")
        sandbox.close_all()


def _holdings() -> tuple[int, int, float, float, int]:
    """Return the workers' processes, descriptors and memory, this process's memory, and the files lying about."""
    workers: list[Worker] = list(pool_for(sandbox.isolation().layers, ()).workers)
    pids = [worker.process.pid for worker in workers]
    for pid in pids:
        pids += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in [*pids, os.getpid()])
    files = sum(len(files) for worker in workers if worker.directory for _, _, files in os.walk(worker.directory))
    return len(pids), descriptors, sum(map(_resident_mb, pids)), _resident_mb(os.getpid()), files


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def print_attacks(cases_file: Path) -> None:
    """Print how many hostile programs got what they wanted."""
    from tests.rewards.sandbox.sandbox_world import (
        HANG_S,
        SECRET,
        new_world,
        own_cases,
        problems_of,
        problems_of_world,
        shared_cases,
    )

    os.environ["SECRET_TOKEN"] = SECRET
    cases = own_cases() + (shared_cases(cases_file) if cases_file.exists() else [])
    print("| layers | programs | scored too much | harmed or reached something | which |\n|---|---|---|---|---|")
    for name, without in STACKS.items():
        os.environ[sandbox.WITHOUT] = without
        forged, harmed = [], []
        for case in cases:
            timeout_s = HANG_S if case.hangs else 10.0
            with new_world() as world:
                program = world.fill_in(case.code)
                (outcome,) = run_tests([program], case.tests, timeout_s=timeout_s, allow_weak_isolation=True)
                problems = problems_of(case, outcome)
                if problems_of_world(world) or any("saw the secret" in problem for problem in problems):
                    harmed.append(case.name)
            if any(": score" in problem for problem in problems):
                forged.append(case.name)
            for place in ("/tmp", "/dev/shm", "/var/tmp", "/run"):
                for dropped in ("grpo-attack", "fill.bin"):
                    Path(place, dropped).unlink(missing_ok=True)
        sandbox.close_all()
        print(f"| {name} | {len(cases)} | {len(forged)} | {len(harmed)} | {', '.join([*forged, *harmed]) or '-'} |")


if __name__ == "__main__":
    main()
