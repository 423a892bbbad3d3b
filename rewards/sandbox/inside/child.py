"""One sandboxed process: it confines itself, then serves as the program under test or as the grader. It never returns.

Runs in a fresh fork of the worker. Nothing here is trusted by the parent once the program's first line has run.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import io
import os
import sys
import threading
import types
from typing import Any, NamedTuple, NoReturn

from ..kernel import landlock, limits, linux, seccomp
from ..wire import CodecError, decode, encode, read_message, write_message
from .grader import ProgramGoneError, UnusableError, grade

CHANNEL, SETUP = 3, 4  # descriptors in the child
HIGH, ABOVE_ALL = 32, 512  # where the worker keeps its own, out of the way
_LOAD_FAILED = 1
_NOTHING = compile("", "", "exec").co_code


class Confinement(NamedTuple):
    """What a child puts on before it runs anything."""

    uid: int | None  # become this user (the worker is root)
    limited: bool  # by resource limits
    tasks: int | None  # limit on processes and threads
    ruleset: landlock.Ruleset | None
    filter: seccomp.Filter | None
    directory: str  # where the program starts


def run(kind: str, confinement: Confinement, descriptors: list[int], setup: int, timeout_s: float) -> NoReturn:
    """Confine this process, report on `setup`, and serve.

    Args:
        kind: "calls" (load the program, answer requests), "program" (run it as a script) or "grader" (run tests).
        descriptors: the channel to the parent, then standard input and output for a script.
        setup: written to if a layer fails, and closed before anything untrusted runs.
    """
    try:
        setup = _arrange(descriptors, setup)
        confine(confinement, timeout_s)
    except BaseException as error:
        os.write(setup, f"{type(error).__name__}: {error}".encode()[:500])
        os._exit(_LOAD_FAILED)
    os.close(setup)
    try:
        _SERVE[kind]()
    finally:
        os._exit(_LOAD_FAILED)


def _arrange(descriptors: list[int], setup: int) -> int:
    """Put the descriptors in their places (0, 1 and 2 stay /dev/null unless given); return where `setup` is now."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH) for descriptor in (*descriptors, setup)]
    for source, target in zip(high, (*(CHANNEL, 0, 1)[: len(descriptors)], SETUP), strict=True):
        os.dup2(source, target, inheritable=target < CHANNEL)
    return SETUP


def confine(confinement: Confinement, timeout_s: float) -> None:
    """Put on every layer; the order is forced by what each one forbids."""
    os.setsid()
    os.chdir(confinement.directory)
    os.umask(0o077)
    if confinement.limited:
        limits.set_own_limits(timeout_s, confinement.tasks)
    if confinement.uid is not None:
        limits.become(confinement.uid)
    if linux.LINUX:
        linux.drop_capabilities()
        linux.prctl(linux.PR_SET_PDEATHSIG, 9)  # a change of user clears both of these
        linux.prctl(linux.PR_SET_DUMPABLE, 0)  # no core for a crash handler, no tracing by the same user
    if confinement.ruleset is not None:
        confinement.ruleset.restrict_self()
    os.closerange(SETUP + 1, ABOVE_ALL)
    if confinement.filter is not None:
        confinement.filter.restrict_self()


def _serve_calls() -> None:
    """Load the program, then answer requests until the parent hangs up."""
    first = read_message(CHANNEL)
    module = _fresh("solution")
    try:
        code = _compiled(first["program"])
        write_message(CHANNEL, {"compiled": True})
        exec(code, module.__dict__)
        write_message(CHANNEL, {"loaded": True})
    except BaseException as error:
        write_message(CHANNEL, _failure(error))
        os._exit(_LOAD_FAILED)
    objects: list[Any] = []
    while request := read_message(CHANNEL):
        try:
            reply = {"value": _answer(request, module.__dict__, objects, first["keep"])}
        except BaseException as error:
            reply = _failure(error)
        try:
            write_message(CHANNEL, reply)
        except CodecError as error:  # the value is too large to be sent
            write_message(CHANNEL, _failure(error))
    os._exit(0)


def _compiled(program: str) -> types.CodeType:
    """Compile a program; one without any statement is none."""
    code = compile(program, "<program>", "exec", dont_inherit=True)
    if code.co_code == _NOTHING:
        raise SyntaxError("the program is empty")
    return code


def _answer(request: dict[str, Any], space: dict[str, Any], objects: list[Any], keep: bool) -> Any:
    """Do what a request asks for and encode the result."""

    def store(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def restore(number: int | str, _: str) -> Any:
        if isinstance(number, int):
            return objects[number]
        if number not in space:
            raise NameError(f"the program does not define {number!r}")
        return space[number]

    target = restore(request["on"], "")
    if request["do"] == "get":
        value = getattr(target, request["name"])
    elif request["do"] == "set":
        setattr(target, request["name"], decode(request["value"], restore))
        value = None
    else:
        keywords = {name: decode(item, restore) for name, item in request["kwargs"].items()}
        value = target(*decode(request["args"], restore), **keywords)
    return encode(value, store if keep else None)


def _failure(error: BaseException) -> dict[str, Any]:
    try:
        message = str(error)[:200]
    except BaseException:
        message = ""
    return {"error": [type(error).__name__, message]}


def _serve_program() -> None:
    """Run the program as a script on its standard streams and leave with its exit code."""
    program = read_message(CHANNEL)["program"]
    module = _fresh("__main__")
    try:
        code = _compiled(program)
    except BaseException as error:
        write_message(CHANNEL, _failure(error))
        os._exit(_LOAD_FAILED)
    write_message(CHANNEL, {"compiled": True})
    os.close(CHANNEL)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "surrogateescape")
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout)
    atexit._clear()
    status = 0
    try:
        exec(code, module.__dict__)
    except SystemExit as leave:
        status = 0 if leave.code is None else leave.code & 0xFF if isinstance(leave.code, int) else 1
    except BaseException:
        status = 1
    try:
        for thread in threading.enumerate():  # a common idiom runs main() in a thread with a larger stack
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    os._exit(status)


def _serve_grader() -> None:
    """Run the tests, asking the parent for what only the program's process can answer."""
    spec = read_message(CHANNEL)
    _fresh("tests")

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        write_message(CHANNEL, request)
        reply: dict[str, Any] | None = read_message(CHANNEL)
        return reply if reply is not None else {"gone": "the parent hung up"}

    try:
        message: dict[str, Any] = {"verdict": grade(spec, ask)}
    except UnusableError as error:
        message = {"unusable": str(error)[:500]}
    except ProgramGoneError:
        message = {"verdict": [False]}
    except BaseException as error:
        message = {"unusable": f"the tests end their own process: {type(error).__name__}: {error}"[:500]}
    write_message(CHANNEL, message)
    os._exit(0)


_SERVE = {"calls": _serve_calls, "program": _serve_program, "grader": _serve_grader}


def _fresh(name: str) -> types.ModuleType:
    """Return an empty module under a name, in an interpreter that looks newly started."""
    sys.argv = ["program.py"]
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module
