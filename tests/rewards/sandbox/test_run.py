"""Programs are run the same way wherever the trainer calls from, and leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import sandbox
from rewards.sandbox import Call, Calls, Outcome, Streams, run_tests
from rewards.sandbox.pool import Worker, pool_for
from tests.conftest import ROOT

_ADD = Calls((Call("add", [1, 2], 3), Call("add", [-5, 7], 2), Call("add", [10, 32], 42)))
_RIGHT = "def add(a, b): return a + b"
_WRONG = "def add(a, b): return 0"


@pytest.fixture(
    params=[
        pytest.param("", id="all-layers"),
        pytest.param("namespaces,bubblewrap", id="landlock-seccomp", marks=pytest.mark.slow),
    ]
)
def stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run under all layers, and under those an unprivileged container allows."""
    monkeypatch.setenv(sandbox.WITHOUT, request.param)
    if sandbox.isolation().weak:
        pytest.skip(f"not possible here: {[layer for layer in sandbox.layers() if not layer.available]}")
    return str(request.param)


def run_one(program: str, tests: sandbox.Tests = _ADD, timeout_s: float = 60.0) -> Outcome:
    """Run one program."""
    return run_tests([program], tests, timeout_s=timeout_s)[0]


def value_of(program: str) -> str:
    """Return, as text, what a program's `f()` returned; fails if it raised."""
    outcome = run_one(textwrap.dedent(program), Calls((Call("f", [], None),)))
    assert outcome.error is None, outcome.error
    return outcome.output[0]


def test_right_program_passes_and_wrong_one_fails(stack: str) -> None:
    right, wrong = run_tests([_RIGHT, _WRONG], _ADD, timeout_s=60.0)
    assert (right.passed, right.compiled, right.ran) == ((True, True, True), True, True)
    assert (wrong.passed, wrong.compiled, wrong.ran) == ((False, False, False), True, True)


def test_outcomes_come_in_the_order_of_the_programs(stack: str) -> None:
    programs = [f"def add(a, b): return {n}" for n in (3, 0, 2, 0, 42)]
    assert [o.passed.index(True) if any(o.passed) else None for o in run_tests(programs, _ADD, timeout_s=60.0)] == [
        0,
        None,
        1,
        None,
        2,
    ]


def test_outcome_tells_how_far_a_program_came() -> None:
    table = [  # program, compiled, ran, error
        ("def add(a, b) return", False, False, "SyntaxError"),
        ("import nothing_of_that_name", True, False, "ModuleNotFoundError"),
        ("x = 1", True, False, "the program does not define 'add'"),
        ("def add(a): return a", True, False, "TypeError"),
        ("import os; os._exit(0)", True, False, "its process ended"),
        ("raise SystemExit(0)", True, False, "SystemExit"),
    ]
    outcomes = run_tests([program for program, *_ in table], _ADD, timeout_s=60.0)
    for (program, compiled, ran, error), outcome in zip(table, outcomes, strict=True):
        assert (outcome.fraction, outcome.compiled, outcome.ran) == (0.0, compiled, ran), program
        assert error in str(outcome.error)


def test_tests_before_a_crash_still_count() -> None:
    # The second of three calls ends the process: the first one is passed, the third cannot be.
    outcome = run_one("import os\ndef add(a, b):\n    if a < 0: os._exit(0)\n    return a + b")
    assert outcome.passed == (True, False, False)


def test_hanging_program_costs_its_own_limit_only(stack: str) -> None:
    hanging = "def add(a, b):\n    while True: pass"
    outcomes = [*run_tests([hanging] * 2, _ADD, timeout_s=0.3), *run_tests([_RIGHT] * 2, _ADD, timeout_s=60.0)]
    assert [(o.timed_out, o.fraction) for o in outcomes] == [(True, 0.0)] * 2 + [(False, 1.0)] * 2


def test_arguments_are_fresh_for_every_call() -> None:
    tests = Calls((Call("f", [[1, 2]], [2]), Call("f", [[1, 2]], [2])))
    assert run_one("def f(xs):\n    xs.pop(0)\n    return xs", tests).fraction == 1.0


def test_keyword_arguments_are_passed() -> None:
    tests = Calls((Call("f", [1], 11, {"b": 10}),))
    assert run_one("def f(a, *, b): return a + b", tests).fraction == 1.0


def test_values_of_every_plain_type_come_back() -> None:
    values = [None, True, 2**200, -1.5, "é", b"\0", [1], (1,), {1}, {"a": (1,)}, 1j, frozenset({2}), range(3)]
    tests = Calls(tuple(Call("same", [value], value) for value in values))
    assert run_one("def same(x): return x", tests).passed == (True,) * len(values)


def test_arguments_larger_than_a_socket_holds_are_delivered() -> None:
    big = list(range(100_000))
    tests = Calls((Call("f", [big], big), Call("f", [big[::-1]], big[::-1])))
    assert run_one("def f(xs): return xs", tests).passed == (True, True)


def test_script_is_judged_by_what_it_prints(stack: str) -> None:
    tests = Streams((("3\n", "1\n2\n3\n"), ("2\n", "1\n2\n")))
    count = "n = int(input())\nfor i in range(1, n + 1): print(i)"
    programs = [count, count.replace("n + 1", "n"), "print(1); print(2)"]
    assert [o.passed for o in run_tests(programs, tests, timeout_s=60.0)] == [
        (True, True),
        (False, False),
        (False, True),
    ]


def test_output_policy() -> None:
    table = [  # program, passes
        ("print('a'); print('b')", True),
        ("print('a  '); print('b'); print(); print()", True),  # blanks at the ends of lines and of the output
        ("print('a'); print('b'); print('c')", False),
        ("print('a')", False),  # a prefix is not the output
        ("print(' a'); print('b')", False),
        ("print('a b')", False),
        ("import sys; sys.stdout.write('a\\nb')", True),
        ("import os; os.write(1, b'a\\nb\\n')", True),
        ("print('a'); print('b'); raise SystemExit", True),
        ("print('a'); print('b'); exit(0)", True),
        ("print('a'); print('b'); exit(3)", False),
        ("print('a'); print('b'); raise ValueError", False),
        ("print('a'); print('b', flush=True); import os; os._exit(1)", False),
        ("print('a'); print('b', flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False),
        ("import atexit; atexit.register(print, 'b'); print('a')", True),
        ("import threading\ndef main(): print('a'); print('b')\nthreading.Thread(target=main).start()", True),
        ("if __name__ == '__main__':\n    print('a')\n    print('b')", True),
        ("import sys\nprint('a', file=sys.stderr)", False),
        ("print('a'); print('b'); open('left behind', 'w').write('x')", True),
        ("import sys\nfor line in sys.stdin: pass\nprint('a'); print('b')", True),
        ("print(open(0).read() or 'a\\nb')", True),
    ]
    outcomes = run_tests([program for program, _ in table], Streams((("", "a\nb\n"),)), timeout_s=60.0)
    assert [row for row, outcome in zip(table, outcomes, strict=True) if outcome.passed != (row[1],)] == []


def test_script_starts_in_an_empty_directory_each_time() -> None:
    tests = Streams((("", "[]\n"), ("", "[]\n")))
    assert run_one("import os\nprint(os.listdir('.'))\nopen('x', 'w').close()", tests).passed == (True, True)


def test_time_of_a_script_is_shared_by_its_inputs() -> None:
    outcome = run_one("import time\ntime.sleep(1e9)", Streams((("", ""),) * 50), timeout_s=0.3)
    assert (outcome.fraction, outcome.timed_out, len(outcome.passed)) == (0.0, True, 50)


def test_input_of_a_megabyte_reaches_a_script() -> None:
    text = "x" * 1_000_000
    assert run_one("print(len(input()))", Streams(((text, "1000000\n"),))).fraction == 1.0


def test_environment_directory_and_descriptors_are_empty(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = """
        import os
        def f():
            open_ = []
            for descriptor in range(1024):
                try:
                    os.fstat(descriptor)
                except OSError:
                    continue
                open_.append(descriptor)
            return [dict(os.environ), os.listdir("."), open_]
    """
    assert value_of(program) == "[{'d': []}, [], [0, 1, 2, 3]]"  # standard streams on /dev/null, and the channel


def test_files_below_the_own_directory_work_and_are_gone_afterwards(stack: str) -> None:
    program = """
        import os, pathlib, tempfile
        def f():
            pathlib.Path("a/b").mkdir(parents=True)
            pathlib.Path("a/b/c").write_text("x")
            os.rename("a/b/c", "a/d")
            with tempfile.TemporaryDirectory() as name:
                pathlib.Path(name, "e").write_text("y")
            return [pathlib.Path("a/d").read_text(), sorted(os.listdir("a"))]
    """
    assert value_of(program) == "['x', ['b', 'd']]"
    assert value_of("import os\ndef f(): return os.listdir('.')") == "[]"


_LIBRARY = """
    abc argparse array ast asyncio base64 bisect calendar cmath codecs collections contextlib copy csv ctypes
    dataclasses datetime decimal difflib enum fractions functools gc hashlib heapq hmac html io itertools json keyword
    locale logging math numbers operator pathlib pickle pprint queue random re secrets shutil sqlite3 statistics string
    struct subprocess sys tempfile textwrap threading time timeit traceback types typing unicodedata unittest
    urllib.parse uuid warnings weakref xml.etree.ElementTree zlib zoneinfo
"""


def test_standard_library_can_be_imported(stack: str) -> None:
    names = [name for name in _LIBRARY.split() if _importable(name)]
    program = f"import importlib\ndef f(): return [importlib.import_module(n).__name__ for n in {names}]"
    assert value_of(program) == repr(names)


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:  # this interpreter was built without it
        return False
    return True


def test_site_packages_cannot_be_read(stack: str) -> None:
    program = """
        import os
        def f():
            found = []
            for kind in ("site-packages", "dist-packages"):
                for place, _, files in os.walk(os.path.join(os.path.dirname(os.__file__), kind)):
                    for name in files[:3]:
                        try:
                            open(os.path.join(place, name)).close()
                            found.append(name)
                        except OSError:
                            pass
            return found
    """
    assert value_of(program) == "[]"


def test_threads_and_an_event_loop_work(stack: str) -> None:
    program = """
        import asyncio, threading
        from concurrent.futures import ThreadPoolExecutor
        async def two(): return sum(await asyncio.gather(asyncio.sleep(0, 1), asyncio.to_thread(int, "1")))
        def f():
            with ThreadPoolExecutor(4) as pool:
                return [asyncio.run(two()), sum(pool.map(abs, range(-9, 0)))]
    """
    assert value_of(program) == "[2, 45]"


def test_the_same_program_gives_the_same_value_in_every_worker(stack: str) -> None:
    program = "import random\ndef f(): return [list({'a', 'b', 'c', 'd', 'e', 'f'}), random.random(), hash('x')]"
    values = {value_of(program)}
    sandbox.close_all()  # new workers
    values |= {o.output[0] for o in run_tests([program] * 8, Calls((Call("f", [], None),)), timeout_s=60.0)}
    assert len(values) == 1


def test_program_finds_no_trace_of_an_earlier_one(stack: str) -> None:
    marker = "MARKER-7f3a"
    run_tests([f"SECRET = '{marker}' * 3\n{_RIGHT}  # {marker}"] * 8, _ADD, timeout_s=60.0)
    # Looks for the marker in the memory around its own objects, page by page through a pipe (an unmapped page is an
    # error there, not a crash), without ever holding it: "-7f3" with "REKRAM" backwards in front.
    program = """
        import ctypes, os, re
        def f():
            write, (reader, writer), pages = ctypes.CDLL(None).write, os.pipe(), []
            for page in sorted({id(o) // 4096 + n for o in (object(), "x" * 50, [], f) for n in range(-512, 512)}):
                if write(writer, ctypes.c_void_p(page * 4096), 4096) == 4096:
                    pages.append(os.read(reader, 4096))
            data = b"".join(pages)
            places = [match.start() for match in re.finditer(b"-7f3", data)]
            return [len(data) > 1000000, sum(data[n - 6 : n][::-1] == b"REKRAM" for n in places)]
    """
    assert value_of(program) == "[True, 0]"
    assert value_of(f"X = '{marker}' * 3\n" + textwrap.dedent(program)) != "[True, 0]"  # it does find its own


@pytest.mark.parametrize("threads", [1, 4])
def test_results_are_the_same_off_the_main_thread_and_from_several(threads: int) -> None:
    def run_all() -> list[float]:
        return [outcome.fraction for outcome in run_tests([_RIGHT, _WRONG] * 4, _ADD, timeout_s=60.0)]

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(lambda _: run_all(), range(threads))) == [[1.0, 0.0] * 4] * threads


def _in_process(results: multiprocessing.Queue[list[float]]) -> None:
    results.put([outcome.fraction for outcome in run_tests([_RIGHT, _WRONG], _ADD, timeout_s=60.0)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_worker_processes_also_forked_after_first_use(method: str) -> None:
    run_one(_RIGHT)  # this process's workers are running and inherited by a fork
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_in_process, args=(results,), daemon=True)
    process.start()
    assert results.get(timeout=120) == [1.0, 0.0]
    process.join(timeout=60)
    assert process.exitcode == 0
    assert run_one(_RIGHT).fraction == 1.0  # the child did not take our workers down


def test_works_without_a_main_guard_and_leaves_no_process_when_the_trainer_is_killed() -> None:
    script = f"""
from rewards.sandbox import Call, Calls, run_tests
from rewards.sandbox.pool import _pools
import os
print(run_tests(["{_RIGHT}"], Calls((Call("add", [1, 2], 3),)), timeout_s=60.0)[0].fraction)
for pool in _pools.values():
    for worker in pool.workers:
        print(worker.process.pid, worker.directory or "-", flush=True)
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=ROOT, timeout=120)
    fraction, *workers = run.stdout.split("\n")[:-1]
    assert (fraction, run.returncode) == ("1.0", -signal.SIGKILL), run.stderr
    for line in workers:
        pid, directory = line.split()
        _wait_until(lambda pid=pid: not _is_alive(int(pid)))  # type: ignore[misc]
        assert directory == "-" or not os.path.exists(directory)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition: object) -> None:
    pause = threading.Event()
    for _ in range(600):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen within 30 s")


def test_worker_is_not_a_fork_of_the_trainer(stack: str) -> None:
    # What a fork would carry along, a CUDA context as well as this variable's value, an exec leaves behind.
    token = "in-the-trainers-memory-only"
    run_one(_RIGHT)
    found = sandbox.isolation()
    pool = pool_for(found.layers, ())
    for worker in pool.workers:
        command = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{worker.process.pid}/environ").read_bytes()
        assert b"-S" in command
        assert environment in (b"", b"PYTHONHASHSEED=0\0")
        assert token.encode() not in b" ".join(command)


def test_lost_worker_is_replaced_and_the_program_run_again(stack: str) -> None:
    run_tests([_RIGHT] * 4, _ADD, timeout_s=60.0)
    for worker in list(pool_for(sandbox.isolation().layers, ()).workers):
        worker.process.kill()
    assert [o.fraction for o in run_tests([_RIGHT] * 4, _ADD, timeout_s=60.0)] == [1.0] * 4


def test_program_that_takes_its_worker_down_scores_nothing_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: Worker, *args: object, **kwargs: object) -> None:
        self.process.kill()
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    real = Worker.tell
    monkeypatch.setattr(Worker, "tell", die)
    outcome = run_one(_RIGHT)
    assert outcome.fraction == 0.0
    assert "two workers were lost" in str(outcome.error)
    monkeypatch.undo()
    assert run_one(_RIGHT).fraction == 1.0


def test_many_programs_leave_no_process_file_descriptor_or_memory(stack: str) -> None:
    programs = [
        _RIGHT,
        "import os\nopen('x', 'w').write('y' * 10000)\nos.makedirs('a/b')" + "\n" + _RIGHT,
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n" + _RIGHT,
        "import os; os._exit(1)",
        "x = bytearray(10 ** 7)\n" + _RIGHT,
    ]
    run_tests(programs * 10, _ADD, timeout_s=60.0)
    workers = list(pool_for(sandbox.isolation().layers, ()).workers)
    before = [_resources(worker) for worker in workers], _own_descriptors(), _sandbox_files()
    run_tests(programs * 60, _ADD, timeout_s=60.0)
    after = [_resources(worker) for worker in workers], _own_descriptors(), _sandbox_files()
    for (tasks, descriptors, resident), (tasks_after, descriptors_after, resident_after) in zip(
        before[0], after[0], strict=True
    ):
        assert (tasks_after, descriptors_after) == (tasks, descriptors)
        assert resident_after - resident < 2 << 20  # bytes over 300 programs; a leak of 10 kB each would be 3 MB
    assert after[1:] == before[1:]


def _resources(worker: Worker) -> tuple[int, int, int]:
    """Return how many processes a worker consists of, its descriptors and its resident bytes."""
    pids = [worker.process.pid]
    for pid in pids:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        pids += [int(child) for child in children]
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    pages = [int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in pids]
    return len(pids), descriptors, sum(pages) * os.sysconf("SC_PAGE_SIZE")


def _own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _sandbox_files() -> list[list[str]]:
    """Return what lies in the sandbox's directories; another run's are not ours to look into."""
    mine = [worker.directory for worker in pool_for(sandbox.isolation().layers, ()).workers if worker.directory]
    assert all(directory.startswith(tempfile.gettempdir()) for directory in mine)
    return [os.listdir(directory) for directory in mine]
