"""What hostile programs are let loose on: a machine full of canaries, and the check that nothing happened to it.

Run as a script it plays all programs and prints what went wrong as JSON: that is how a test does it as another user.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from rewards import sandbox
from rewards.sandbox.forms import from_cases

HERE = Path(__file__).resolve().parent
SECRET = "token-that-no-program-may-see"
HANG_S = 0.5  # the limit of programs that are known to hang
QUICK_S = 30.0  # for the others, on a busy machine
_ADD = [{"args": [1, 2], "want": 3}, {"args": [-5, 7], "want": 2}, {"args": [10, 32], "want": 42}]
_HANGING = {
    "infinite_loop", "infinite_loop_import", "sleep_forever", "swallow_timeout", "infinite_output", "infinite_stderr",
    "int_pow_bomb", "regex_bomb", "deep_recursion", "fork_bomb",
}  # fmt: skip
_SHARED_LIMITS = {"control_ok": (1.0, 1.0), "control_partial": (1 / 3, 1 / 3), "memo_hardcode_public": (0.0, 1 / 3)}
_PLACES = ("/tmp", "/dev/shm", "/var/tmp", "/run", "/run/lock", "/", ".")
_DROPPED_NAMES = ("grpo-attack", "climbed", "fill.bin", "daemon", "made")

_MACROS = {
    "@WRONG@": "def add(a, b): return 0",
    "@DENIED@": "def add(a, b): return results",
    "@FRAME@": """
import json, os
def frame(message):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    data = len(text).to_bytes(4, 'big') + text
    while data:
        data = data[os.write(3, data):]
""",
    "@SYSCALL@": """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
results = []
def syscall(*args):
    r = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    results.append([args[0], r])
    return r
""",
}
_GENERATED = {
    "deep_parentheses": "(" * 100_000 + ")" * 100_000,
    "long_unary_chain": "x = " + "-" * 300_000 + "1\n@WRONG@",
    "long_expression": "x = " + "+".join(["1"] * 100_000) + "\n@WRONG@",
    "null_bytes": "x = 1\0\n@WRONG@",
    "lone_surrogates": "x = '\ud800'\n@WRONG@",
    "program_of_five_megabytes": "#" * 5_000_000 + "\n@WRONG@",
    "empty_program": "",
    "only_a_comment": "# def add(a, b): return a + b",
}


class Case(NamedTuple):
    """A hostile program and what would be a success of it."""

    name: str
    code: str
    tests: sandbox.Tests
    least: float
    most: float
    hangs: bool


def own_cases() -> list[Case]:
    """Return the programs of sandbox_attacks.txt and some that are too long to be written down."""
    tests = from_cases(_ADD, "add")
    cases = [Case(name, code, tests, 0.0, 0.0, False) for name, code in _GENERATED.items()]
    text = (HERE / "sandbox_attacks.txt").read_text(encoding="utf-8")
    for part in text.split("\n=== ")[1:]:
        head, _, code = part.partition("\n")
        name, _, rest = head.partition(": ")
        words = rest.split(", ")
        most = next((float(Fraction(word)) for word in words if word[0].isdigit()), 0.0)
        cases.append(Case(name, code, tests, 0.0, most, "hangs" in words))
    return cases


def shared_cases(file: Path) -> list[Case]:
    """Return the programs laid beside the repository; their expectations are prose, read by their first words."""
    cases = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        expected = row["expected"]
        least, most = _SHARED_LIMITS.get(row["name"], (0.0, 0.0))
        if expected.startswith("score 1, "):
            least = most = 1.0
        elif expected.startswith(("any score", "score 1 or 0")):
            most = 1.0
        tests = from_cases(row["tests"], row["entry"])
        cases.append(Case(row["name"], row["code"], tests, least, most, row["name"] in _HANGING))
    return cases


class World:
    """Files, sockets and a process that a program must not touch."""

    def __init__(self) -> None:
        self.canary = tempfile.mkdtemp(prefix="canary-")
        os.chmod(self.canary, 0o777)
        for name in ("secret.txt", ".bashrc"):
            path = os.path.join(self.canary, name)
            Path(path).write_text(f"{SECRET}\n", encoding="utf-8")
            os.chmod(path, 0o666)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix.bind(os.path.join(self.canary, "socket"))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0grpo-lite-test-{self.port}")
        self.abstract.listen()
        for sock in (self.tcp, self.udp, self.unix, self.abstract):
            sock.setblocking(False)
        self.victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        self.before = self.state()

    def close(self) -> None:
        """Take everything down."""
        for sock in (self.tcp, self.udp, self.unix, self.abstract):
            sock.close()
        self.victim.kill()
        self.victim.communicate()
        if os.path.isdir(self.canary):
            os.chmod(self.canary, 0o700)
            shutil.rmtree(self.canary)

    def state(self) -> dict[str, object]:
        """Return everything a program might have changed."""
        if not os.path.isdir(self.canary):
            return {"files": "all gone"}
        mode = os.stat(self.canary).st_mode
        os.chmod(self.canary, 0o777)
        files = {}
        for name in sorted(os.listdir(self.canary)):
            info = os.lstat(path := os.path.join(self.canary, name))
            text = Path(path).read_text(encoding="utf-8") if stat.S_ISREG(info.st_mode) else ""
            files[name] = (info.st_mode, info.st_uid, info.st_mtime_ns, info.st_nlink, text)
        return {
            "files": files,
            "mode": mode,
            "victim": self._victim(),
            "dropped": [name for place in _PLACES for name in _DROPPED_NAMES if os.path.exists(f"{place}/{name}")],
        }

    def _victim(self) -> object:
        """Return what a program might have done to another process: end or stop it, change its priority or limits."""
        if self.victim.poll() is not None:
            return f"ended with {self.victim.returncode}"
        with open(f"/proc/{self.victim.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0] in "Tt", fields[16], Path(f"/proc/{self.victim.pid}/limits").read_text(encoding="ascii")

    def heard(self) -> list[str]:
        """Return which sockets a program has reached."""
        reached = []
        for name, action in (
            ("tcp", self.tcp.accept),
            ("abstract", self.abstract.accept),
            ("udp", lambda: self.udp.recv(100)),
            ("unix", lambda: self.unix.recv(100)),
        ):
            with suppress(BlockingIOError):
                action()
                reached.append(name)
        return reached

    def fill_in(self, code: str) -> str:
        """Return a program with the places of this world in it."""
        for mark, text in _MACROS.items():
            code = code.replace(mark, text)
        values = {"@CANARY@": self.canary, "@PORT@": str(self.port), "@PID@": str(self.victim.pid)}
        return re.sub("|".join(values), lambda found: values[found[0]], code)


@contextmanager
def new_world() -> Iterator[World]:
    """Lend a world."""
    world = World()
    try:
        yield world
    finally:
        world.close()


def play(cases: list[Case], world: World) -> dict[str, sandbox.Outcome]:
    """Run the programs and return their outcomes by name."""
    outcomes: dict[str, sandbox.Outcome] = {}
    for hangs, timeout_s in ((False, QUICK_S), (True, HANG_S)):
        group = [case for case in cases if case.hangs == hangs]
        programs = [world.fill_in(case.code) for case in group]
        results = sandbox.run_tests(programs, [case.tests for case in group], timeout_s=timeout_s)
        outcomes |= {case.name: outcome for case, outcome in zip(group, results, strict=True)}
    return outcomes


def problems_of(case: Case, outcome: sandbox.Outcome) -> list[str]:
    """Return what is wrong with one outcome."""
    problems = []
    if not case.least <= outcome.fraction <= case.most:
        problems.append(f"{case.name}: score {outcome.fraction}, expected {case.least} to {case.most}")
    if outcome.unusable is not None:
        problems.append(f"{case.name}: it made its tests unusable: {outcome.unusable}")
    if SECRET in repr(outcome.output) or SECRET.encode().hex() in repr(outcome.output):
        problems.append(f"{case.name}: it saw the secret")
    if "@DENIED@" in case.code and not outcome.error:
        succeeded = [note for note in ast.literal_eval(outcome.output[0]) if note[1] != -1]
        if succeeded:
            problems.append(f"{case.name}: system calls succeeded: {succeeded}")
    return problems


def problems_of_world(world: World) -> list[str]:
    """Return what has happened to the world."""
    after = world.state()
    changed = [f"{key}: {world.before[key]} -> {after[key]}" for key in after if after[key] != world.before[key]]
    return changed + [f"a program reached the {name} socket" for name in world.heard()]


def main() -> None:
    """Play everything and print the problems."""
    os.environ["SECRET_TOKEN"] = SECRET
    cases = own_cases() + [case for path in sys.argv[1:] for case in shared_cases(Path(path))]
    with new_world() as world:
        outcomes = play(cases, world)
        found = [problem for case in cases for problem in problems_of(case, outcomes[case.name])]
        found += problems_of_world(world)
    sandbox.close_all()
    print(json.dumps({"uid": os.getuid(), "layers": sandbox.isolation().layers, "problems": found}))


if __name__ == "__main__":
    main()
