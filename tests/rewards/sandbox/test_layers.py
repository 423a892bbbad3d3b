"""Layers are found by trying them, missing ones are named, and without enough of them nothing runs."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from rewards import sandbox
from rewards.sandbox import Call, Calls, IsolationError, SandboxError, run_tests
from rewards.sandbox.inside.cleanup import empty_directory, make_own_root, within_quota
from rewards.sandbox.kernel.landlock import build_ruleset
from rewards.sandbox.kernel.library import library_files
from rewards.sandbox.pool import Pool
from rewards.sandbox.session import Channel, GoneError, Session

_ADD = Calls((Call("add", [1, 2], 3),))
_RIGHT = "def add(a, b): return a + b"
_ALL = ["process", "rlimits", "uid", "landlock", "seccomp", "namespaces", "bubblewrap"]


def test_every_layer_is_listed_with_its_reason() -> None:
    found = sandbox.layers()
    assert [layer.name for layer in found] == _ALL
    assert all(layer.why for layer in found)


@pytest.mark.parametrize(
    ("without", "files", "network"),
    [
        ("namespaces,bubblewrap", True, True),  # Landlock and seccomp are the portable core
        ("namespaces,bubblewrap,seccomp", False, False),  # Landlock alone: datagrams, modes of files
        ("namespaces,bubblewrap,landlock", False, True),  # seccomp alone: files
        ("namespaces,bubblewrap,landlock,seccomp", False, False),
        ("landlock,seccomp", True, True),  # an own file system and network
    ],
)
def test_what_is_isolated_follows_from_the_layers(
    without: str, files: bool, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "")
    available = {layer.name for layer in sandbox.layers() if layer.available}
    if not {"landlock", "seccomp", "namespaces"} <= available:
        pytest.skip(f"this machine has only {sorted(available)}")
    monkeypatch.setenv(sandbox.WITHOUT, without)
    found = sandbox.isolation()
    assert (found.files, found.network) == (files, network)
    assert not set(without.split(",")) & set(found.layers)
    assert found.weak is not (files and network)


@pytest.mark.parametrize(
    ("without", "reach"),
    [
        ("namespaces,bubblewrap,landlock", "files"),
        ("namespaces,bubblewrap,seccomp", "files and network"),
        ("namespaces,bubblewrap,landlock,seccomp,rlimits", "files and network"),
    ],
)
def test_weak_isolation_is_refused_with_what_is_missing(
    without: str, reach: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, without)
    with pytest.raises(IsolationError) as caught:
        run_tests([_RIGHT], _ADD)
    message = str(caught.value)
    assert f"reach this machine's {reach}." in message
    assert all(f"{name}: left out by" in message for name in without.split(","))
    assert "allow_weak_isolation: true" in message


def test_refusal_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "namespaces,bubblewrap,landlock,seccomp")
    with pytest.raises(IsolationError):
        run_tests([f"open({str(tmp_path / 'ran')!r}, 'w').close()"], _ADD)
    assert not (tmp_path / "ran").exists()


_BREEDING = """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        while True:
            try:
                if os.fork() == 0: time.sleep(60)
            except OSError: time.sleep(0.001)
except OSError: pass
def add(a, b): return a + b
"""


def test_portable_layers_alone_run_programs_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    # What macOS and old kernels have. The daemon is either forbidden (limit on processes) or killed at the end.
    monkeypatch.setenv(sandbox.WITHOUT, "namespaces,bubblewrap,landlock,seccomp")
    programs = [_RIGHT, "def add(a, b): return 0", _BREEDING, "def add(a, b):\n    while True: pass"]
    outcomes = run_tests(programs, _ADD, timeout_s=3.0, allow_weak_isolation=True)
    assert [outcome.fraction for outcome in outcomes] == [1.0, 0.0, 1.0, 0.0]
    from rewards.sandbox.pool import pool_for

    for worker in pool_for(sandbox.isolation().layers, ()).workers:
        assert Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text() == ""
    sandbox.close_all()


def test_processes_end_with_their_program_inside_namespaces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.WITHOUT, "landlock,seccomp,bubblewrap")
    if "namespaces" not in sandbox.isolation().layers:
        pytest.skip("no namespaces here")
    assert [o.fraction for o in run_tests([_BREEDING] * 4, _ADD, timeout_s=30.0)] == [1.0] * 4
    from rewards.sandbox.pool import pool_for

    for worker in pool_for(sandbox.isolation().layers, ()).workers:
        pid = worker.process.pid
        (init,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert Path(f"/proc/{init}/task/{init}/children").read_text() == ""
    sandbox.close_all()


def test_layer_that_fails_after_probing_stops_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rules that no child can apply: better no verdict than an unconfined program.
    from rewards.sandbox.pool import Pool

    monkeypatch.setenv(sandbox.WITHOUT, "")
    if "landlock" not in sandbox.isolation().layers:
        pytest.skip("no Landlock here")
    broken = Pool(["landlock", "seccomp", "rlimits", "uid"] if sys.platform == "linux" else [])
    monkeypatch.setattr("rewards.sandbox.run._pool", lambda allow: broken)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc")  # where no directory can be made
    with pytest.raises(SandboxError, match="cannot put on its layers"):
        run_tests([_RIGHT], _ADD)


@pytest.mark.parametrize(
    ("interpreter", "message"),
    [("/nowhere/python", "cannot start the interpreter '/nowhere/python'"), ("/bin/false", "exit code 1")],
)
def test_interpreter_that_does_not_start_is_named(
    interpreter: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.isolation()
    sandbox.close_all()
    monkeypatch.setattr(sys, "executable", interpreter)
    with pytest.raises(SandboxError, match=message):
        run_tests([_RIGHT], _ADD)


def test_landlock_rules_cover_the_library_but_no_packages() -> None:
    files = library_files()
    assert not [path for path in files.readable if path.endswith(("site-packages", "dist-packages"))]
    assert any(path.endswith("/json") for path in files.readable)
    assert all(not path.startswith(("/home", "/etc/passwd", "/proc")) for path in files.binds)


def test_landlock_rule_set_leaves_out_what_does_not_exist() -> None:
    try:
        rules = build_ruleset(library_files(), ("/dev/null", "/dev/of-no-machine"), None)
    except OSError as error:
        pytest.skip(f"no Landlock here: {error}")
    assert rules.descriptor > 2
    os.close(rules.descriptor)


def test_directory_nested_beyond_any_path_is_emptied(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1500):  # a path of 6,000 characters, and more levels than Python recurses
            os.mkdir("deep")
            os.chdir("deep")
        Path("f").write_text("x")
    finally:
        os.chdir(here)
    empty_directory(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_closed_linked_and_oddly_named_entries_are_removed_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    inside = tmp_path / "inside"
    (inside / "a" / "b").mkdir(parents=True)
    (inside / "a" / "b" / "\n\udcff").write_text("x")
    (inside / "link").symlink_to(outside)
    (inside / "a" / "loop").symlink_to(inside)
    os.link(outside / "kept", inside / "a" / "hard")
    (inside / "a" / "b").chmod(0)
    (inside / "a").chmod(0)
    empty_directory(str(inside))
    assert list(inside.iterdir()) == []
    assert (outside / "kept").read_text() == "x"


def test_quota_counts_bytes_and_entries(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * 100_000)
    assert within_quota(str(tmp_path), 1_000_000, 2)
    assert not within_quota(str(tmp_path), 50_000, 2)
    assert not within_quota(str(tmp_path), 1_000_000, 1)


def test_a_layer_that_fails_in_a_child_gives_no_verdict() -> None:
    pool = Pool(sandbox.isolation().layers)
    with pool.borrow() as worker:
        session = Session(worker, 5.0)
        ours, theirs = socket.socketpair()
        session.timeout_s = 1e30  # more than a limit of processor time can say
        session._spawn("calls", [theirs])
        with pytest.raises(GoneError, match="its process ended"):
            Channel(ours, time.monotonic() + 5.0).receive()
        with pytest.raises(SandboxError, match="a layer of the sandbox failed: OverflowError"):
            session.end()
        ours.close()
        with Session(worker, 5.0) as after:  # the worker is as good as before
            assert isinstance(after.start("calls"), Channel)
    pool.close()


def test_messages_that_arrive_together_are_told_apart() -> None:
    pool = Pool(sandbox.isolation().layers)
    with pool.borrow() as worker:
        for _ in range(20):
            with Session(worker, 5.0) as session:
                session.start("calls")
                session.start("grader")
                assert [end.kind for end in session.end()] == ["calls", "grader"]
    pool.close()


def test_directories_of_killed_workers_are_removed_at_the_next_start(tmp_path: Path) -> None:
    left, lives, young, other = (tmp_path / f"grpo-lite-sandbox-{name}" for name in ("1-a", "2-b", "3-c", "x"))
    for directory in (left, lives, young):
        (directory / "work" / "deep").mkdir(parents=True)
        (directory / "work" / "file").write_text("x", encoding="utf-8")
    other.symlink_to(lives)
    for directory in (left, lives):
        os.utime(directory, (0, 0))
    held = os.open(lives, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    own = Path(make_own_root(str(tmp_path), 100))
    assert sorted(tmp_path.iterdir()) == sorted([lives, young, other, own])
    os.close(held)
    os.utime(own, (0, 0))
    make_own_root(str(tmp_path), 100)
    assert own.is_dir(), "one that a living process holds stays"
    assert not lives.exists(), "one that is let go of does not"
