"""The grader: runs a dataset's own test code in a sandboxed process, with the program's functions in another one.

Test code such as `assert abs(candidate(1.33) - 0.33) < 1e-6` must be executed, but not where the program could read or
patch it. Here every name that belongs to the program is a `Remote`: a call goes to the program's process, and its
result comes back as plain data. What the program keeps for itself (an instance of its own class) stays remote and
equals nothing.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..wire import decode, encode

Ask = Callable[[dict[str, Any]], dict[str, Any]]

_RECORD = "_grader_record"
_ENDINGS = (StopIteration, StopAsyncIteration)


class ProgramGoneError(BaseException):
    """The program's process has ended or run out of time; not an Exception, so that no test takes it for an answer."""


class RemoteError(Exception):
    """The program raised an exception that is not a builtin one."""


class UnusableError(BaseException):
    """The tests cannot grade any program; the message says why. Not an Exception: no handler in a test may eat it."""


def grade(spec: dict[str, Any], ask: Ask) -> list[bool]:
    """Run the tests and tell which hold, in order.

    Args:
        spec: `tests` (a list of test scripts) or `check` (a script with asserts, and perhaps a function `check`);
            `entry`, the name of the tested function, or None; `helpers` and `setup`, trusted code to run first; `open`,
            whether names that no trusted code defines may be the program's (else only the entry is).
        ask: sends a request to the program's process and returns its reply.

    Raises:
        UnusableError: the tests name what nobody defines, are not Python, or fail before they ask anything.
        ProgramGoneError: the program's process ended during the setup.
    """
    asked = 0

    def counted(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return ask(request)

    entry = spec["entry"]
    try:
        helpers = _without(ast.parse(spec["helpers"]), entry)
        trees = [ast.parse(text) for text in (spec["setup"], *spec["tests"], spec["check"])]
    except SyntaxError as error:
        raise UnusableError(f"the tests are not Python: {error}") from None
    space = _namespace([helpers, *trees], entry, spec["open"], counted)
    try:
        _execute(helpers, space)
        _execute(trees[0], space)
    except Exception as error:
        if asked:
            return [False]
        raise UnusableError(f"the setup fails by itself: {type(error).__name__}: {error}") from None
    if spec["tests"]:
        held = [*_each_holds([tree for tree in trees[1:-1] if not _is_trivial(tree)], space)]
    else:
        held = _check_holds(trees[-1], space, entry)
    if all(held) and not asked:
        raise UnusableError("the tests never ask the program anything")
    return held


def _each_holds(tests: list[ast.Module], space: dict[str, Any]) -> Iterator[bool]:
    """Run one script after the other; a script holds if it ends without an exception and reached one of its asserts."""
    gone = False
    reached: list[bool] = []
    space[_RECORD] = lambda: reached.append(True)
    for tree in tests:
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        reached.clear()
        try:
            if not gone:
                _execute(ast.fix_missing_locations(_NoteAsserts().visit(tree)), space)
            yield not gone and (bool(reached) or not asserts)
        except ProgramGoneError:
            gone = True
            yield False
        except Exception:
            yield False


def _check_holds(tree: ast.Module, space: dict[str, Any], entry: str | None) -> list[bool]:
    """Run a script, and its function `check` if it has one, recording every assert instead of stopping at the first.

    An assert in a loop holds if it held each time. If the script stops early, the asserts not reached do not hold.
    """
    transformer = _RecordAsserts(entry)
    tree = ast.fix_missing_locations(transformer.visit(tree))
    held: dict[int, bool] = {}
    space[_RECORD] = lambda number, ok: held.__setitem__(number, ok and held.get(number, True))
    try:
        _execute(tree, space)
        if callable(space.get("check")):
            if entry is None:
                raise UnusableError("the test defines check(candidate), but the row names no entry_point")
            space["check"](space[entry])
    except (Exception, ProgramGoneError):
        return [*(held.get(number, False) for number in range(transformer.count)), False]
    return list(held.values()) or [transformer.count == 0]  # asserts of which none was reached do not hold


class _NoteAsserts(ast.NodeTransformer):
    """Notes that an assert was reached."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [*ast.parse(f"{_RECORD}()").body, node]


class _RecordAsserts(ast.NodeTransformer):
    """Turns `assert test` into a recorded outcome, unless it tests nothing."""

    def __init__(self, entry: str | None) -> None:
        self.entry = entry
        self.count = 0

    def visit_Assert(self, node: ast.Assert) -> Any:
        if _is_trivial(node.test) or self._compares_with_itself(node.test):
            return node if isinstance(node.test, ast.Constant) else ast.Pass()
        number, self.count = self.count, self.count + 1
        holds, fails = (ast.parse(f"{_RECORD}({number}, {text})").body for text in ("_grader_ok", "False"))
        attempt = ast.parse("_grader_ok = bool(0)").body
        attempt[0].value.args[0] = node.test  # type: ignore[attr-defined]
        handler = ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=fails)
        return ast.Try(body=attempt, handlers=[handler], orelse=holds, finalbody=[])

    def _compares_with_itself(self, test: ast.expr) -> bool:
        """Tell `f(x) == f(x)`: HumanEval/33 asks the program for the expected value too."""
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
            return False
        left, right = (ast.dump(side).replace(f"id='{self.entry}'", "id='candidate'") for side in _sides(test))
        return left == right


def _sides(test: ast.Compare) -> tuple[ast.expr, ast.expr]:
    return test.left, test.comparators[0]


def _is_trivial(tree: ast.AST) -> bool:
    """Tell code that names nothing (`assert True`), and so cannot depend on the program."""
    return not any(isinstance(node, ast.Name) for node in ast.walk(tree))


def _execute(tree: ast.Module, space: dict[str, Any]) -> None:
    exec(compile(tree, "<tests>", "exec"), space)


def _without(tree: ast.Module, entry: str | None) -> ast.Module:
    """Drop the tested function's own stub from the prompt's code, and what runs rather than defines."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign)
    body: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, kinds) and getattr(node, "name", None) != entry
    ]
    return ast.Module(body=body, type_ignores=[])


def _namespace(trees: list[ast.Module], entry: str | None, may_be_program: bool, ask: Ask) -> dict[str, Any]:
    """Return the globals of the tests, with a Remote for every name that belongs to the program."""
    bound: set[str] = set(dir(builtins))
    loaded: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    if entry:
        space[entry] = Remote(ask, entry)
    for name in sorted(loaded - bound - {entry}):
        if name in sys.stdlib_module_names:
            space[name] = importlib.import_module(name)
        elif may_be_program:
            space[name] = Remote(ask, name)
        else:
            raise UnusableError(f"the tests use {name!r}, which neither they nor the prompt define")
    return space


class Remote:
    """A function, class or object of the program, used from the grader by name or by number."""

    def __init__(self, ask: Ask, on: str | int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_on", on)

    def _request(self, do: str, **fields: Any) -> Any:
        reply = self._ask({"do": do, "on": self._on, **fields})
        if "gone" in reply:
            raise ProgramGoneError(reply["gone"])
        if "error" in reply:
            name, message = reply["error"]
            kind = getattr(builtins, str(name), None)
            # StopIteration would end a map or filter in a test early, and nothing at all is true of nothing.
            is_builtin = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _ENDINGS)
            raise kind(str(message)) if is_builtin else RemoteError(f"{name}: {message}")  # type: ignore[misc]
        return decode(reply["value"], lambda number, _: Remote(self._ask, number))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._request("call", args=_pass(args), kwargs={name: _pass(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        return self._request("get", name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._request("set", name=name, value=_pass(value))

    def __eq__(self, other: object) -> bool:
        return False  # the program would decide, and it would say yes

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program has no truth value outside of it")

    def __len__(self) -> int:
        return int(self.__getattr__("__len__")())

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__getattr__("__setitem__")(key, value)

    def __contains__(self, item: Any) -> bool:
        return any(item == one for one in self)  # the program's own __contains__ could say yes to everything

    def __iter__(self) -> Iterator[Any]:
        yield from self.__getattr__("__iter__")()


def _pass(value: Any) -> Any:
    """Encode an argument for the program; its own objects go back as their numbers."""
    if isinstance(value, tuple):
        return {"t": [_pass(item) for item in value]}
    if isinstance(value, list):
        return [_pass(item) for item in value]
    if isinstance(value, Remote):
        return {"h": [object.__getattribute__(value, "_on"), ""]}
    encoded = encode(value)
    if isinstance(encoded, dict) and "!" in encoded:
        raise UnusableError(f"the tests pass a {encoded['!']} to the program, which cannot leave their process")
    return encoded
