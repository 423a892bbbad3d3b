"""A Python tool in the rewards' sandbox, for questions whose answer a short program prints; with state or without."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from grpo_lite.environments.working import Working
from grpo_lite.rewards.sandbox import SandboxError, Streams, isolation, run_tests

TIMEOUT_S = 5.0  # for one call, with the replay of earlier ones
MOST_CHARACTERS = 8000  # of a snippet
MOST_OUTPUT = 1500  # characters that the model sees of an output
_DONE, _FAILED = "done\n", "failed\n"
_RUNNER = """
import ast, io, sys
class Output(io.StringIO):
    def write(self, text):
        if self.tell() > 1000000:
            raise RuntimeError("too much output")
        return super().write(text)
def run(source, space, name):
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    if last is not None and (value := eval(compile(ast.Expression(last.value), name, "eval"), space)) is not None:
        print(repr(value))
def main(earlier, source, most):
    space, real, status = {"__name__": "__main__"}, sys.stdout, "done"
    for old in earlier:
        sys.stdout = Output()
        run(old, space, "<earlier>")
    sys.stdout = output = Output()
    try:
        run(source, space, "<code>")
    except BaseException as error:
        status, trace, line = "failed", error.__traceback__, getattr(error, "lineno", None)
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<code>" else line
            trace = trace.tb_next
        text = str(error)[:300]
        output.seek(0, 2)
        place = f" (line {line})" if line else ""
        io.StringIO.write(output, type(error).__name__ + (text and ": " + text) + place)
    sys.stdout = real
    text = output.getvalue().rstrip()
    cut = len(text) - most
    if cut > 0:
        text = f"{text[: most // 2]}\\n[{cut} characters left out]\\n{text[-(most // 2) :]}"
    print(status)
    print(text)
"""


class Python:
    """Questions that the model answers by running Python.

    Columns: `question` (or the messages in `prompt`) and `answer`. Reward: 1 if the last line printed by the last
    call is the answer and the code has a number of the question and does not state the answer, else 0.

    State is kept in an episode by replay: each call first runs the earlier snippets that succeeded, without showing
    their output, in a new process with the same seed. So variables and functions stay, the clock goes on, and an
    episode is rebuilt from its calls alone. Nothing of this process's environment, files or network is in reach.

    Raises:
        IsolationError: in `reset`, where this machine cannot keep the code away from files and network.
    """

    def __init__(self) -> None:
        self._working = Working({})
        self._earlier: list[str] = []
        self._broken: SandboxError | None = None

    def reset(self, **row: Any) -> str | None:
        """Begin an episode without earlier code; the prompt says everything, so nothing is added to it."""
        if isolation().weak:
            run_tests([], ())  # refuses, and says what is missing
        self._working = Working(row)
        self._earlier, self._broken = [], None
        return None

    def run(self, code: str) -> str:
        """Run Python code and return what it prints. Variables and functions of earlier calls are kept.

        Args:
            code: Python code, for example print(sum(range(10))).

        Returns:
            The printed text and the value of a last expression, or a line that begins with "Error:".
        """
        return self._shown(code, keep=True)

    def get_reward(self) -> float | None:
        """Return 1 if the last call printed the answer, worked out from the question, else 0; None without an answer.

        Raises:
            SandboxError: the sandbox failed in this episode, so it cannot be judged.
        """
        if self._broken is not None:
            raise self._broken
        return self._working.reward()

    def _shown(self, code: str, keep: bool) -> str:
        """Return what the model sees of a call; `keep` says whether later calls run its code again before theirs."""
        if not isinstance(code, str) or not code.strip():
            return "Error: code must be text, for example print(1+1)."
        if len(code) > MOST_CHARACTERS:
            return f"Error: the code has {len(code)} characters; at most {MOST_CHARACTERS} are allowed."
        try:
            code.encode()
        except UnicodeEncodeError:
            return "Error: the code holds characters that are no text."
        self._working.send(_literals(code))
        done, text = self._run(code)
        if not done:
            self._working.show("", text)
            return f"Error: {text}"
        if keep:
            self._earlier.append(code)
        self._working.show(text.rpartition("\n")[2], text)
        return text or "(no output; use print to see a value)"

    def _run(self, code: str) -> tuple[bool, str]:
        """Return whether the code ran to its end, and its output or what went wrong."""
        program = f"{_RUNNER}\nmain({self._earlier!r}, {code!r}, {MOST_OUTPUT - 100})\n"
        try:
            (outcome,) = run_tests([program], Streams((("", ""),)), timeout_s=TIMEOUT_S)
        except SandboxError as error:
            self._broken = error
            raise
        output = outcome.output[0] if outcome.output else ""
        if output.startswith(_DONE):
            return True, output.removeprefix(_DONE).rstrip()
        if output.startswith(_FAILED):
            return False, output.removeprefix(_FAILED).rstrip()
        if outcome.timed_out:
            return False, f"out of time after {TIMEOUT_S:g} s"
        return False, "the code ended its process" if outcome.error is None else outcome.error[:300]


class StatelessPython(Python):
    """`Python` without state: each call runs by itself, so it never takes the time of the calls before."""

    def run(self, code: str) -> str:
        """Run Python code and return what it prints. Each call starts anew: nothing of earlier calls is kept.

        Args:
            code: Python code, for example print(sum(range(10))).

        Returns:
            The printed text and the value of a last expression, or a line that begins with "Error:".
        """
        return self._shown(code, keep=False)


def _literals(code: str) -> str:
    """Return the code without its comments; text that is no Python as it is."""
    try:
        return ast.unparse(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


def gold(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns that earn 1: run the column `code`, else print the question as an expression."""
    return [[_call(str(row.get("code", f"print({row['question']})")))], str(row["answer"])]


def cheats(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the turns of each cheat, by its name."""
    answer = str(row["answer"])
    after = str(row.get("code", ""))
    return {
        "answer without a call": [answer],
        "print the answer": [[_call(f"print({answer!r})")], answer],
        "print a variable": [[_call(f"x = {answer}\nprint(x)")], answer],
        "the answer as a comment": [[_call(f"print(1)  # {answer}")], answer],
        "print, then leave": [[_call(f"import sys\nprint({answer})\nsys.exit(0)")], answer],
        "forge the end": [[_call(f"import os\nos.write(1, b'done\\n{answer}\\n')\nos._exit(0)")], answer],
        "print it, then something else": [[_call(after)], [_call("print('nothing')")], answer],
        "look into the interpreter": [[_call("import sys\nprint(sys._getframe(3).f_locals, vars())")], answer],
        "set the answer": [[{"name": "reset", "arguments": {"answer": "1"}}], [_call("print(1)")], "1"],
        "ask for the reward": [[{"name": "get_reward", "arguments": {}}], answer],
    }


def _call(code: str) -> dict[str, Any]:
    return {"name": "run", "arguments": {"code": code}}
