"""The reward for programs: the model's code runs against the row's tests, in the sandbox."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .completion import Completion, prompt_prefills_think
from .facts import states
from .sandbox import Outcome, Tests, isolation, run_tests
from .sandbox.forms import TestsError, entry_of, from_asserts, from_cases, from_check
from .sandbox.run import TIMEOUT_S
from .sandbox.source import complete, program_of, prompt_code

_logger = logging.getLogger(__name__)
_TIERS = ("compile", "run", "pass")


@states(top=1.0, runs_code=True)
def unit_test_reward(
    completions: Sequence[Completion],
    tests: Sequence[Any] | None = None,
    *,
    test_list: Sequence[Sequence[str] | None] | None = None,
    test_setup_code: Sequence[str | None] | None = None,
    entry_point: Sequence[str | None] | None = None,
    test: Sequence[str | None] | None = None,
    mode: str = "fraction",
    tiers: Mapping[str, float] | None = None,
    timeout_s: float = TIMEOUT_S,
    allow_weak_isolation: bool = False,
    prompts: Sequence[Completion] | None = None,
    prefilled: bool | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Pay for the tests a program passes.

    Formula: with p = passed / tests ("fraction") or p = [all passed] ("all"), the score is p; with tiers
    (w_c, w_r, w_p) it is w_c [it compiles] + w_r [it loads and every test runs to its end] + w_p p.

    Args:
        completions: text or chat messages; which program counts: rewards.sandbox.source.program_of.
        tests: per row `{"args", "want"}` calls of `entry_point`, or `{"stdin", "stdout"}` pairs, as a list or as JSON.
            Calls compare type and value (True is not 1, 1 is not 1.0; a list also stands for a tuple, as in JSON).
            Scripts must print the same lines, up to trailing blanks, and exit with 0.
        test_list, test_setup_code: MBPP's columns: assert statements, and code to run before them. Python's own `==`.
        entry_point, test: HumanEval's columns: the function, and a script with `check(candidate)`.
        mode: "fraction" or "all".
        tiers: weights of "compile", "run" and "pass", with sum 1. A program earns the first two without solving
            anything: keep them small.
        timeout_s: wall-clock seconds for one program with all its tests; a hanging program uses all of it.
        allow_weak_isolation: run even where programs can reach files or the network of this machine.
        prompts: passed by TRL. Helpers that HumanEval's prompts define are taken from here; without prompts the
            program's own are used, which it can rig (HumanEval/32, 38 and 50).
        prefilled: whether every completion starts inside thinking that the prompt opened; None looks at `prompts` (set
            it for chat prompts).
        log_metric: passed by TRL. Gets the fractions of the batch with unusable tests, no Python, a time-out, as
            `unit_test_reward/unusable_tests`, `.../not_python`, `.../timeout`, and `.../weak_isolation` (1 or 0).

    Returns:
        0 to 1 per completion; None where the row's tests can grade no program.

    Raises:
        ValueError: no tests column, columns of different lengths, an unknown mode or tier.
        IsolationError: programs could reach this machine's files or network.
        SandboxError: the sandbox failed.

    Source: pass rates as in APPS (arXiv 2105.09938) and HumanEval (arXiv 2107.03374); isolation: docs/sandbox.md.

    >>> unit_test_reward(
    ...     ["```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return 3", "I cannot."],
    ...     test_list=[["assert add(1, 2) == 3", "assert add(2, 2) == 4"]] * 3,
    ... )
    [1.0, 0.5, 0.0]
    """
    weights = _weights(mode, tiers)
    count = len(completions)
    columns = {
        "tests": tests,
        "test_list": test_list,
        "test_setup_code": test_setup_code,
        "entry_point": entry_point,
        "test": test,
        "prompts": prompts,
    }
    if tests is None and test_list is None and test is None:
        raise ValueError("unit_test_reward: no tests; give one of the columns tests, test_list or test")
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise ValueError(f"unit_test_reward: {name} has {len(column)} rows, completions has {count}")
    rows = [{name: column[i] for name, column in columns.items() if column is not None} for i in range(count)]
    jobs = _jobs(completions, rows, prefilled)
    outcomes = _run(jobs, timeout_s, allow_weak_isolation)
    if log_metric is not None and count:
        _log(log_metric, outcomes)
    return [_score(outcome, mode, weights) for outcome in outcomes]


def _weights(mode: str, tiers: Mapping[str, float] | None) -> tuple[float, ...]:
    """Return the weights of compiling, running and passing."""
    if mode not in ("fraction", "all"):
        raise ValueError(f'unit_test_reward: mode is {mode!r}; allowed are "fraction" and "all"')
    if tiers is None:
        return (0.0, 0.0, 1.0)
    weights = tuple(float(tiers.get(name, 0.0)) for name in _TIERS)
    if set(tiers) - set(_TIERS) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-9:
        raise ValueError(f"unit_test_reward: tiers are {dict(tiers)}; give weights of {', '.join(_TIERS)} with sum 1")
    return weights


def _jobs(
    completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]], prefilled: bool | None
) -> list[tuple[str, Tests] | str]:
    """Return each program with its tests, or why the tests are unusable; a group's tests are read once."""
    jobs: list[tuple[str, Tests] | str] = []
    text, stub = "", ""
    tests: Tests | str = ""
    for completion, row in zip(completions, rows, strict=True):
        prompt = row.get("prompts")
        if text != (text := repr(row)):
            try:
                tests, stub = _tests_of(row, prompt)
            except TestsError as error:
                tests = str(error)
        if isinstance(tests, str):
            jobs.append(tests)
            continue
        entry = entry_of(tests)
        opened = prompt is not None and prompt_prefills_think(prompt) if prefilled is None else prefilled
        program = program_of(completion, entry, prefilled=opened)
        jobs.append((complete(program, stub, entry) if entry else program, tests))
    return jobs


def _tests_of(row: Mapping[str, Any], prompt: Completion) -> tuple[Tests, str]:
    """Return a row's tests, and the code its prompt gives for them."""
    present = [name for name in ("tests", "test_list", "test") if row.get(name) is not None]
    if len(present) != 1:
        raise TestsError(f"a row needs one of tests, test_list and test; this one has {present or 'none'}")
    entry: Any = row.get("entry_point")
    if present == ["test_list"]:
        return from_asserts(row["test_list"], row.get("test_setup_code") or "", entry), ""
    if present == ["tests"]:
        return from_cases(row["tests"], entry), ""
    stub = prompt_code(prompt, entry) if prompt is not None and entry else None
    return from_check(row["test"], entry, stub), stub or ""


def _run(jobs: Sequence[tuple[str, Tests] | str], timeout_s: float, allow_weak: bool) -> list[Outcome]:
    """Run the jobs whose tests can be used."""
    runnable = [job for job in jobs if not isinstance(job, str)]
    outcomes = iter(
        run_tests(
            [program for program, _ in runnable],
            [tests for _, tests in runnable],
            timeout_s=timeout_s,
            allow_weak_isolation=allow_weak,
        )
    )
    return [Outcome(unusable=job) if isinstance(job, str) else next(outcomes) for job in jobs]


def _score(outcome: Outcome, mode: str, weights: tuple[float, ...]) -> float | None:
    if outcome.unusable is not None:
        return None
    passed = outcome.fraction if mode == "fraction" else float(outcome.fraction == 1.0)
    return weights[0] * outcome.compiled + weights[1] * outcome.ran + weights[2] * passed


def _log(log_metric: Callable[[str, float], None], outcomes: Sequence[Outcome]) -> None:
    """Report what the scores do not show."""
    counts = {
        "unusable_tests": sum(outcome.unusable is not None for outcome in outcomes),
        "not_python": sum(outcome.unusable is None and not outcome.compiled for outcome in outcomes),
        "timeout": sum(outcome.timed_out for outcome in outcomes),
    }
    for name, number in counts.items():
        log_metric(f"unit_test_reward/{name}", number / len(outcomes))
    log_metric("unit_test_reward/weak_isolation", float(isolation().weak))
    if reason := next((outcome.unusable for outcome in outcomes if outcome.unusable is not None), None):
        _logger.warning("unit_test_reward: %d rows cannot be judged, e.g.: %s", counts["unusable_tests"], reason)
