"""One program against its tests: what is sent to it and how its answers score, compared here or in the grader."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .forms import Calls, Streams, TestCode, Tests
from .pool import Worker
from .session import Channel, GoneError, Session, packed
from .wire import CodecError, matches

_AT_ONCE_BYTES = 64 << 10  # sent without waiting for answers; the socket holds more
_GATHER_S = 0.001  # of answers to requests that were sent at once
_SHOWN_CHARACTERS = 2000
_OUTPUT_BYTES = 1 << 20  # more output than this, and than twice what is wanted, is wrong whatever it says
_GRADER_GRACE_S = 1.0  # for the grader to finish when the program's time is over


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    passed: tuple[bool, ...] = ()  # by test, in order; an assert script counts each of its asserts
    compiled: bool = False  # the source is Python
    ran: bool = False  # it loaded, and every test ran to its end: a value, or exit code 0
    timed_out: bool = False
    unusable: str | None = None  # why the tests can grade no program
    error: str | None = None  # the first thing that went wrong
    output: tuple[str, ...] = field(default=(), repr=False)  # what came back, shortened, for people to read

    @property
    def fraction(self) -> float:
        """Share of the tests that passed."""
        return sum(self.passed) / len(self.passed) if self.passed else 0.0


def run_program(worker: Worker, program: str, tests: Tests, timeout_s: float) -> Outcome:
    """Run a program against its tests on a worker.

    Args:
        timeout_s: wall-clock seconds for the program and all its tests together.

    Raises:
        SandboxError: the sandbox failed; no verdict.
    """
    try:
        first = packed({"program": program, "keep": isinstance(tests, TestCode)})
    except CodecError as error:
        return Outcome(passed=(False,), error=f"the program is too long: {error}")
    try:
        if isinstance(tests, Streams):
            return _run_streams(worker, first, tests, timeout_s)
        with Session(worker, timeout_s) as session:
            channel = session.start("calls")
            if isinstance(tests, Calls):
                return _run_calls(channel, first, tests)
            return _run_code(session, channel, first, tests)
    except CodecError as error:
        return Outcome(unusable=f"the tests are too large to be sent: {error}")


def _run_calls(channel: Channel, first: bytes, tests: Calls) -> Outcome:
    """Ask for every call's value and compare it here."""
    requests = tests.requests
    outcome = Outcome(passed=(False,) * len(requests))
    passed: list[bool] = []
    replies: list[str] = []
    errors: list[str] = []
    at_once = len(first) + sum(map(len, requests)) <= _AT_ONCE_BYTES
    try:
        channel.send(b"".join([first, *requests]) if at_once else first)
        channel.gather_s = _GATHER_S if at_once else 0.0
        outcome = _load(channel, outcome)
        if outcome.error:
            return outcome
        for call, request in zip(tests.calls, requests, strict=True):
            if not at_once:
                channel.send(request)
            reply = channel.receive_object()
            replies.append(_shorten(reply))
            if "value" in reply:
                passed.append(matches(call.want, reply["value"], strict=call.strict))
            else:
                passed.append(False)
                errors.append(_error_text(reply))
        outcome = replace(outcome, ran=not errors)
    except TimeoutError:
        outcome = replace(outcome, timed_out=True)
        errors.append("out of time")
    except GoneError as error:
        errors.append(str(error))
    missing = (False,) * (len(requests) - len(passed))
    return replace(outcome, passed=(*passed, *missing), error=next(iter(errors), None), output=tuple(replies))


def _load(channel: Channel, outcome: Outcome) -> Outcome:
    """Wait until the program is loaded; the first message comes before any of its code has run."""
    reply = channel.receive_object()
    if reply.get("compiled") is not True:
        return replace(outcome, error=_error_text(reply))
    outcome = replace(outcome, compiled=True)
    try:
        reply = channel.receive_object()
    except TimeoutError:
        return replace(outcome, timed_out=True, error="out of time while loading")
    except GoneError as error:
        return replace(outcome, error=str(error))
    return outcome if reply.get("loaded") is True else replace(outcome, error=_error_text(reply))


def _run_code(session: Session, program: Channel, first: bytes, tests: TestCode) -> Outcome:
    """Let the grader run the tests, and carry its questions to the program."""
    outcome = Outcome(passed=(False,))
    gone, ran = "", True
    try:
        program.send(first)
        outcome = _load(program, outcome)
        gone = outcome.error or ""
    except TimeoutError:
        outcome, gone = replace(outcome, timed_out=True), "out of time"
    except GoneError as error:
        gone = str(error)
    grader = session.start("grader")
    grader.deadline = max(program.deadline, grader.deadline - session.timeout_s) + _GRADER_GRACE_S
    try:
        grader.send(packed(_spec(tests)))
        while "do" in (question := grader.receive_object()):
            if not gone:
                try:
                    program.send(packed(question))
                    answer = program.receive()
                    ran = ran and not answer.startswith(b'{"error"')
                    grader.send(len(answer).to_bytes(4, "big") + answer)
                    continue
                except TimeoutError:
                    outcome, gone = replace(outcome, timed_out=True), "out of time"
                except GoneError as error:
                    gone = str(error)
            grader.send(packed({"gone": gone}))
    except TimeoutError:
        return replace(outcome, timed_out=True, error="out of time in the tests")
    except GoneError:
        return replace(outcome, error="the tests' process ended")
    if "unusable" in question:
        return replace(outcome, unusable=str(question["unusable"]))
    passed = tuple(one is True for one in question["verdict"])
    return replace(outcome, passed=passed, ran=ran and not gone, error=gone or None)


def _spec(tests: TestCode) -> dict[str, Any]:
    """Return the grader's instructions."""
    names = ("entry", "tests", "check", "setup", "helpers", "open")
    return {name: getattr(tests, name) for name in names}


def _run_streams(worker: Worker, first: bytes, tests: Streams, timeout_s: float) -> Outcome:
    """Run the script once per input, each time in a new process and an empty directory; the time is shared."""
    outcome = Outcome(ran=True)
    left_s = timeout_s
    for stdin, want in tests.cases:
        if outcome.timed_out or left_s <= 0 or (outcome.passed and not outcome.compiled):
            outcome = replace(outcome, passed=(*outcome.passed, False), ran=False)
            continue
        one, used_s = _run_stream(worker, first, stdin, want, left_s)
        left_s -= used_s
        outcome = Outcome(
            passed=(*outcome.passed, *one.passed),
            compiled=one.compiled,
            ran=outcome.ran and one.ran,
            timed_out=one.timed_out,
            error=outcome.error or one.error,
            output=(*outcome.output, *one.output),
        )
    return outcome


def _run_stream(worker: Worker, first: bytes, stdin: str, want: str, timeout_s: float) -> tuple[Outcome, float]:
    """Run the script on one input; return the outcome and the seconds used."""
    outcome = Outcome(passed=(False,))
    with Session(worker, timeout_s) as session:
        channel, output = session.start_program(stdin.encode("utf-8", "surrogateescape"))
        try:
            channel.send(first)
            reply = channel.receive_object()
            if reply.get("compiled") is not True:
                return replace(outcome, error=_error_text(reply)), output.used_s()
            outcome = replace(outcome, compiled=True)
            while output.receive_some():
                if len(output.buffer) > max(_OUTPUT_BYTES, 2 * len(want)):
                    return replace(outcome, error="too much output", output=(_text(output),)), output.used_s()
            ends = session.end(output.left_s())
        except TimeoutError:
            return replace(outcome, timed_out=True, error="out of time", output=(_text(output),)), output.used_s()
        except GoneError as error:
            return replace(outcome, error=str(error)), output.used_s()
        if output.left_s() <= 0:
            return replace(outcome, timed_out=True, error="out of time", output=(_text(output),)), output.used_s()
        code = ends[0].code
        right = code == 0 and _lines(output.buffer.decode("utf-8", "replace")) == _lines(want)
        why = None if code == 0 else f"exit code {code}" + (f": {ends[0].stopped}" if ends[0].stopped else "")
        return replace(outcome, passed=(right,), ran=code == 0, error=why, output=(_text(output),)), output.used_s()


def _lines(text: str) -> list[str]:
    """Return the lines without trailing blanks, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _text(output: Channel) -> str:
    return output.buffer[:_SHOWN_CHARACTERS].decode("utf-8", "replace")


def _shorten(reply: dict[str, Any]) -> str:
    text = repr(reply.get("value", reply))
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _error_text(reply: dict[str, Any]) -> str:
    """Return what a program says went wrong; only for people to read."""
    error = reply.get("error")
    parts = error if isinstance(error, list) else ["it sent no answer"]
    return ": ".join(str(part)[:200] for part in parts[:2] if part)
