"""Tests in the forms datasets have them, as three kinds of plain data that the sandbox can run.

`Calls` (function, arguments, expected value) need one process and are compared in the parent. `Streams` are one script
run per input. `TestCode` is all that must be executed to be graded. Assert lines whose two sides are literals,
which is nearly all of MBPP and most of HumanEval, become `Calls`.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .wire import dumps, encode, pack


class TestsError(ValueError):
    """A row's tests cannot grade a program: the gold is unusable."""

    __test__ = False  # not a test class, whatever pytest thinks of the name


@dataclass(frozen=True)
class Call:
    """`function(*args, **kwargs)` must give `want`."""

    function: str
    args: Sequence[Any]
    want: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True  # types compared too; else as Python's == does


@dataclass(frozen=True)
class Calls:
    """Calls made in order in one process."""

    calls: tuple[Call, ...]

    @cached_property
    def requests(self) -> list[bytes]:
        """The calls as messages to a program; the same for all completions of a row."""
        return [_request(call) for call in self.calls]


def _request(call: Call) -> bytes:
    kwargs = {name: encode(value) for name, value in call.kwargs.items()}
    return pack(dumps({"do": "call", "on": call.function, "args": encode(list(call.args)), "kwargs": kwargs}))


@dataclass(frozen=True)
class Streams:
    """Runs of a script: what it reads, what it must print."""

    cases: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TestCode:
    """Test code that the grader executes; see rewards.sandbox.inside.grader.grade."""

    __test__ = False

    entry: str | None
    tests: tuple[str, ...] = ()
    check: str = ""
    setup: str = ""
    helpers: str = ""
    open: bool = True


Tests = Calls | Streams | TestCode


def entry_of(tests: Tests) -> str | None:
    """Return the name a program must define to pass, where the tests show one: the first function they call."""
    if isinstance(tests, Calls):
        return tests.calls[0].function
    if isinstance(tests, Streams) or tests.entry:
        return None if isinstance(tests, Streams) else tests.entry
    for node in ast.walk(ast.parse(tests.tests[0])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id):
            return node.func.id
    return None


def from_cases(cases: Any, entry_point: str | None) -> Tests:
    """Read `{"args", "want"}` calls of an entry point, or `{"stdin", "stdout"}` pairs; a JSON string of them will do.

    Keys that are None are absent: tables fill them in.

    Raises:
        TestsError: no tests, mixed forms, calls without an entry point, or values that cannot be compared.
    """
    if isinstance(cases, str):
        try:
            cases = json.loads(cases)
        except ValueError as error:
            raise TestsError(f"tests are not JSON: {error}") from None
    if isinstance(cases, Mapping) or not isinstance(cases, Sequence) or not cases:
        raise TestsError("tests must be a list with at least one test")
    if all(isinstance(case, str) for case in cases):
        return from_asserts(cases, "", entry_point)
    if not all(isinstance(case, Mapping) for case in cases):
        raise TestsError("every test must be an object")
    if all(case.get("stdin") is not None for case in cases):
        return Streams(tuple(_stream(case) for case in cases))
    if not all(case.get("args") is not None and "want" in case for case in cases):
        raise TestsError('every test must have "args" and "want", or every test "stdin" and "stdout"')
    if not entry_point:
        raise TestsError('tests with "args" need entry_point, the name of the function to call')
    return Calls(tuple(_call(case, entry_point) for case in cases))


def _stream(case: Mapping[str, Any]) -> tuple[str, str]:
    want = case.get("stdout") if case.get("stdout") is not None else case.get("want")
    if not isinstance(case["stdin"], str) or not isinstance(want, str):
        raise TestsError('"stdin" and "stdout" must be text')
    return case["stdin"], want


def _call(case: Mapping[str, Any], entry_point: str) -> Call:
    args, kwargs = case["args"], case.get("kwargs") or {}
    if not isinstance(args, Sequence) or isinstance(args, str) or not isinstance(kwargs, Mapping):
        raise TestsError('"args" must be a list and "kwargs" an object')
    for value in (args, kwargs, case["want"]):
        require_plain(value)
    return Call(entry_point, args, case["want"], kwargs)


def require_plain(value: Any) -> None:
    """Refuse values that no encoding can carry.

    Raises:
        TestsError: names the type.
    """
    try:
        text = json.dumps(encode(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TestsError(f"a value of a test cannot be compared: {error}") from None
    if '{"!":' in text:
        raise TestsError(f"a value of a test has a type that cannot be compared: {text[:100]}")


def from_asserts(tests: Sequence[str], setup: str, entry_point: str | None) -> Tests:
    """Read MBPP's form: assert statements, and code to run before them."""
    tests = [test for test in tests if isinstance(test, str) and test.strip()]
    if not tests:
        raise TestsError("test_list has no tests")
    try:
        statements = [node for test in tests for node in ast.parse(test).body]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TestsError(f"test_list is not Python: {error}") from None
    calls = [_call_of(node, None) for node in statements]
    if not setup.strip() and len(statements) == len(tests) and all(calls):
        return Calls(tuple(call for call in calls if call))
    return TestCode(entry_point, tests=tuple(tests), setup=setup)


def from_check(test: str, entry_point: str, prompt_code: str | None) -> Tests:
    """Read HumanEval's form: a script that defines `check(candidate)`.

    Args:
        prompt_code: the trusted code of the prompt; three of HumanEval's tests use helpers that only it defines.
            Without any, those names are taken from the program, which could then cheat.
    """
    if not entry_point:
        raise TestsError("test needs entry_point, the name of the function to check")
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TestsError(f"test is not Python: {error}") from None
    calls = list(_calls_of_check(tree, entry_point))
    if calls and all(calls):
        return Calls(tuple(call for call in calls if call))
    return TestCode(entry_point, check=test, helpers=prompt_code or "", open=prompt_code is None)


def _calls_of_check(tree: ast.Module, entry_point: str) -> Iterable[Call | None]:
    """Yield a call for every assert, and None for anything that must be executed."""
    check = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    rest = [node for node in tree.body if node not in check]
    if len(check) != 1 or len(check[0].args.args) != 1 or not all(isinstance(node, ast.Assign) for node in rest):
        yield None
        return
    for node in check[0].body:
        if not (isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and node.test.value is True):
            yield _call_of(node, {check[0].args.args[0].arg: entry_point, entry_point: entry_point})


def _call_of(node: ast.stmt, alias: Mapping[str, str] | None) -> Call | None:
    """Read `assert f(literals) == literal`; None for any other statement."""
    if not (isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1):
        return None
    call, want = node.test.left, node.test.comparators[0]
    if not (isinstance(node.test.ops[0], ast.Eq) and isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return None
    name = call.func.id if alias is None else alias.get(call.func.id)
    if name is None or any(keyword.arg is None for keyword in call.keywords):
        return None
    try:
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        value = ast.literal_eval(want)
        for each in (args, kwargs, value):
            require_plain(each)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return Call(name, args, value, kwargs, strict=False)
