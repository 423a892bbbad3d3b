"""Run the command line in processes forked from one that has imported everything: a second or two instead of ten.

`Server` starts that process and asks it for commands; with pytest-xdist all workers share one. This file is also the
server (`command_server.py serve DESCRIPTOR`) and a program that takes grpo-lite's arguments and runs them in the server
(`command_server.py run SOCKET ...`). Only the standard library is imported before the server starts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SOCKET = "GRPO_LITE_TEST_SERVER"  # environment variable: the socket of the server that all workers share
LONGEST_MESSAGE = 1 << 17


class Command:
    """A command that runs in a forked process."""

    def __init__(self, connection: socket.socket, stdout: IO[str] | None = None) -> None:
        self.connection = connection
        self.stdout = stdout
        self.pid = int(json.loads(connection.recv(LONGEST_MESSAGE))["pid"])
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, -9 after SIGKILL; a command that takes longer is killed."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                reply = self.connection.recv(LONGEST_MESSAGE)
            except TimeoutError:
                self.kill()
                raise
            self.returncode = int(json.loads(reply)["status"])
            self.connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return the rest of the output, and an empty string as `subprocess.Popen` would."""
        assert self.stdout is not None
        self.wait(timeout)
        with self.stdout as stdout:
            return stdout.read(), ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """The process that forks; started here unless the path of a running server's socket is given."""

    def __init__(self, path: str | None = None) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        if path is None:
            self.folder = tempfile.mkdtemp(prefix="server-")
            path = f"{self.folder}/socket"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(path)
            listener.listen(64)  # requests wait here until everything is imported
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.command_server", "serve", str(listener.fileno())],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=_environment(),
                pass_fds=[listener.fileno()],
            )  # fmt: skip
            listener.close()
        self.path = path

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the process if it was started here."""
        if self.process is not None:
            self.process.communicate(timeout=60)  # closes its standard input, which ends it
            self.process = None
            Path(self.path).unlink(missing_ok=True)
            Path(self.folder).rmdir()

    def start(
        self,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        stdout: IO[str] | None = None,
        cwd: str | Path = ROOT,
        environment: Mapping[str, str] | None = None,
        **moment: Any,
    ) -> Command:
        """Start a command.

        Args:
            descriptors: its standard input, output and error.
            stdout: the end from which the caller reads the output, for `Command.stdout`.
            environment: replaces this process's.
            moment: `moment`, `call`, `signal`: where and by what it is killed, see `tests.killing.kill_at`.
        """
        job = {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "environment": _environment(environment)}
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self.path)
        socket.send_fds(connection, [json.dumps(job | moment).encode()], list(descriptors))
        return Command(connection, stdout)

    def run(
        self, arguments: Sequence[str], log: Path, moment: str | None = None, call: int = 1,
        after_s: float | None = None, stop: int = signal.SIGKILL,
    ) -> int:  # fmt: skip
        """Return the exit status of a command whose output goes into `log`.

        Args:
            moment, call: where `stop` is sent to it: the nth call of the moment's function.
            after_s: when it is killed, in seconds.
        """
        with log.open("ab") as output, open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), output.fileno(), output.fileno()]
            command = self.start(arguments, descriptors, moment=moment, call=call, signal=stop)
        if after_s is not None:
            time.sleep(after_s)
            command.kill()
        return command.wait()


@functools.cache
def shared() -> Server:
    """Return this process's server, or the one that the workers of pytest-xdist share."""
    server = Server(os.environ.get(SOCKET))
    atexit.register(server.close)
    return server


def program(path: Path) -> None:
    """Write an executable that takes grpo-lite's arguments, as the console script does, and runs them in the server."""
    client = f'{sys.executable} -I -S "{Path(__file__).resolve()}" run "{shared().path}"'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
    path.chmod(0o755)


def _environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    found = dict(os.environ if environment is None else environment)
    paths = [str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _serve(listener: socket.socket) -> None:
    """Answer requests until standard input is closed."""
    _import_everything()
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    connections: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a process -> its id, who asked for it
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                return
            if key.fd == listener.fileno():
                connection, _ = listener.accept()
                message, descriptors, *_ = socket.recv_fds(connection, LONGEST_MESSAGE, 3)
                pid = os.fork()
                if pid == 0:
                    _be_the_command(json.loads(message), descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                process = os.pidfd_open(pid)
                connections[process] = (pid, connection)
                selector.register(process, selectors.EVENT_READ)
                _send(connection, {"pid": pid})
            else:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, connection = connections.pop(key.fd)
                _, status = os.waitpid(pid, 0)
                _send(connection, {"status": os.waitstatus_to_exitcode(status)})
                connection.close()


def _send(connection: socket.socket, reply: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a test that has ended does not listen
        connection.send(json.dumps(reply).encode())


def _import_everything() -> None:
    import gc
    import importlib
    import logging
    import pkgutil

    logging.disable(logging.WARNING)  # what upstream says on import
    upstream = ["bitsandbytes", "datasets", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    rooms = ("session", "trainer", "engine", "evaluation", "export", "report")
    ours = [
        f"grpo_lite.{room}.{module.name}"
        for room in rooms
        for module in pkgutil.iter_modules([str(ROOT / "grpo_lite" / room)])
    ]
    for name in (*upstream, *ours, "grpo_lite.train", "tests.killing"):
        with contextlib.suppress(ImportError):  # the command says what is missing
            importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    logging.disable(logging.NOTSET)
    gc.collect()
    gc.freeze()  # a fork then shares these objects' pages


def _be_the_command(job: dict[str, Any], descriptors: list[int]) -> None:
    """Be the forked process: run the command on the descriptors of who asked for it."""
    status = 1
    try:
        for descriptor, standard in zip(descriptors, (0, 1, 2), strict=True):
            os.dup2(descriptor, standard)
        os.closerange(3, max(descriptors) + 1)
        os.environ.clear()
        os.environ.update(job["environment"])
        time.tzset()
        os.chdir(job["cwd"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["grpo-lite", *job["arguments"]]
        _reopen_streams()
        from grpo_lite.cli import main

        if job.get("moment"):
            from tests.killing import kill_at

            kill_at(job["moment"], job["call"], job["signal"])
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # a tracker writes its last metrics here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reopen_streams() -> None:
    """Make text streams for the new descriptors."""
    for name, mode, errors in (("stdin", "r", None), ("stdout", "w", None), ("stderr", "w", "backslashreplace")):
        stream = open(("stdin", "stdout", "stderr").index(name), mode, buffering=1, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(path: str, arguments: list[str]) -> int:
    """Be the program: hand over our descriptors, folder and environment, and pass signals on."""
    command = Server(path).start(arguments, [0, 1, 2], cwd=os.getcwd())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: command.send_signal(number))
    return command.wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        sys.exit(_run(sys.argv[2], sys.argv[3:]))
