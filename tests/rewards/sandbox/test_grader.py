"""Test code is executed apart from the program, which answers questions and decides nothing."""

from __future__ import annotations

from rewards.sandbox import Outcome, TestCode, run_tests

_CHECK = "def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-6\n    assert candidate(3) == 9\n"
_SQUARE = "def square(x): return x * x"


def graded(program: str, tests: TestCode, timeout_s: float = 60.0) -> Outcome:
    """Run one program against test code."""
    return run_tests([program], tests, timeout_s=timeout_s)[0]


def check(script: str, program: str = _SQUARE, **fields: object) -> Outcome:
    """Run one program against a check script."""
    return graded(program, TestCode("square", check=script, **fields))  # type: ignore[arg-type]


def asserts(tests: list[str], program: str, setup: str = "") -> Outcome:
    """Run one program against assert statements."""
    return graded(program, TestCode(None, tests=tuple(tests), setup=setup))


def test_every_assert_of_a_check_counts() -> None:
    assert check(_CHECK).passed == (True, True)
    assert check(_CHECK, "def square(x): return 4").passed == (True, False)


def test_assert_in_a_loop_holds_if_it_held_each_time() -> None:
    script = (
        "def check(candidate):\n    for x in range(5):\n        assert candidate(x) == x * x\n    assert candidate(9)"
    )
    assert check(script).passed == (True, True)
    assert check(script, "def square(x): return x * x if x != 3 else 0").passed == (False, True)


def test_exception_in_an_assert_fails_that_one_only() -> None:
    program = "def square(x):\n    if x == 2: raise ValueError(x)\n    return x * x"
    assert check(_CHECK, program).passed == (False, True)


def test_asserts_not_reached_do_not_hold() -> None:
    script = (
        "def check(candidate):\n    assert candidate(1) == 1\n    y = candidate(2) + 'x'\n    assert candidate(3) == 9"
    )
    # The script itself stops after the first assert: a third entry says that it did not end.
    assert check(script).passed == (True, False, False)


def test_asserts_that_test_nothing_do_not_count() -> None:
    script = "def check(candidate):\n    assert True, 'always'\n    assert 1 == 1\n    assert candidate(3) == 9"
    assert check(script, "def square(x): return 0").passed == (False,)


def test_assert_comparing_the_program_with_itself_does_not_count() -> None:
    # As HumanEval/33 does: tuple(candidate([1, 2, 3])) == tuple(sort_third([1, 2, 3]))
    script = "def check(candidate):\n    assert abs(candidate(3)) == abs(square(3))\n    assert candidate(3) == 9"
    assert check(script, "def square(x): return 1").passed == (False,)


def test_failing_constant_assert_means_do_not_come_here() -> None:
    script = "def check(candidate):\n    try:\n        candidate(-1)\n        assert False\n" + (
        "    except ValueError:\n        pass"
    )
    assert check(script, "def square(x): raise ValueError").fraction == 1.0
    assert check(script).fraction == 0.0


def test_builtin_exceptions_cross_over_and_others_become_one() -> None:
    script = (
        "def check(candidate):\n    try:\n        candidate(1)\n    except ZeroDivisionError as e:\n"
        "        text = str(e)\n    assert text == 'division by zero'"
    )
    assert check(script, "def square(x): return x / 0").passed == (True,)
    assert check(script, "class E(Exception): pass\ndef square(x): raise E").passed == (False, False)


def test_types_may_be_passed_and_returned() -> None:
    assert asserts(
        ["assert f((1, 'a'), int) == [1]"], "def f(xs, t): return [x for x in xs if type(x) is t]"
    ).passed == (True,)


def test_name_of_a_standard_module_is_the_graders_own() -> None:
    # MBPP/596 uses sys without importing it; a program's own `sys` must not be asked for the expected value.
    tests = ["assert f(('A', 1)) == sys.getsizeof(('A', 1))"]
    assert asserts(tests, "import sys\ndef f(t): return sys.getsizeof(t)").fraction == 1.0
    assert asserts(tests, "class sys:\n    getsizeof = staticmethod(lambda t: 0)\ndef f(t): return 0").fraction == 0.0


def test_objects_of_the_programs_own_classes_stay_there_and_work() -> None:
    # MBPP/601, 367 and 927 build the program's own objects in the tests.
    program = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(ps): return sum(p.a * p.b for p in ps)"
    )
    assert asserts(["assert f([Pair(1, 2), Pair(3, 4)]) == 14"], program).fraction == 1.0
    tree = "class Node:\n    def __init__(self, d): self.data, self.left = d, None\n" + (
        "def depth(n): return 1 + depth(n.left) if n else 0"
    )
    assert asserts(["assert depth(root) == 2"], tree, setup="root = Node(1)\nroot.left = Node(2)").fraction == 1.0


def test_object_can_be_used_like_a_container() -> None:
    program = "class Stack:\n    def __init__(self): self.xs = []\n    def push(self, x): self.xs.append(x)\n" + (
        "    def __len__(self): return len(self.xs)\n    def __getitem__(self, i): return self.xs[i]\n"
        "    def __iter__(self): return iter(self.xs)\n    def __contains__(self, x): return x in self.xs"
    )
    script = [
        "s = Stack()\ns.push(1)\ns.push(5)\nassert len(s) == 2 and s[1] == 5 and list(s) == [1, 5]",
        "assert 5 in s and s.xs == [1, 5]",
    ]
    assert asserts(script, program).fraction == 1.0


def test_forged_answer_earns_nothing_from_test_code() -> None:
    programs = [
        "class A:\n    def __eq__(s, o): return True\n    def __bool__(s): return True\ndef square(x): return A()",
        "class A:\n    def __abs__(s): return s\n    def __sub__(s, o): return s\n    def __lt__(s, o): return True\n"
        "    def __eq__(s, o): return True\ndef square(x): return A()",
        "class A(float):\n    def __sub__(s, o): return 0.0\n    def __eq__(s, o): return True\n    __hash__ = None\n"
        "def square(x): return A(1)",
        "from unittest.mock import MagicMock\nsquare = MagicMock()",
        "import builtins\nbuiltins.abs = lambda x: 0\ndef square(x): return None",
        "def check(candidate): pass\ndef square(x): return 0",
        "import sys\nsys.exit(0)",
        "import os\ndef square(x): os._exit(0)",
        "import os, json\ndef say(m):\n    t = json.dumps(m).encode()\n    os.write(3, len(t).to_bytes(4, 'big') + t)\n"
        "say({'loaded': True})\nfor _ in range(9): say({'verdict': [True, True]})\nos._exit(0)",
        "import os, json\ndef say(m):\n    t = json.dumps(m).encode()\n    os.write(3, len(t).to_bytes(4, 'big') + t)\n"
        "say({'loaded': True})\nfor _ in range(9): say({'gone': None, 'value': 4, 'unusable': 'x'})\nos._exit(0)",
        "def square(x): raise AssertionError",
        "def square(x): raise SystemExit",
        "def square(x): return float('nan')",
        "def square(x): return (y for y in [x * x])",
        "",
    ]  # fmt: skip
    outcomes = run_tests(programs, TestCode("square", check=_CHECK), timeout_s=60.0)
    assert [(one.unusable, one.fraction) for one in outcomes] == [(None, 0.0)] * len(programs)


_ALWAYS = "class A:\n    __eq__ = __contains__ = __le__ = __ge__ = __lt__ = __gt__ = lambda s, o: True\n"
_CLAIMS = "    __hash__ = lambda s: 4\n    __str__ = lambda s: '4'\n    __round__ = __int__ = __index__ = lambda s: 4\n"
_ANYTHING = f"{_ALWAYS}{_CLAIMS}    __class__ = int\n    __iter__ = lambda s: iter([s])\ndef square(x): return A()"
_OBJECT = f"{_ALWAYS}{_CLAIMS}    __iter__ = lambda s: iter([s])\ndef square(x): return A()"
_ENDS = "def square(x): raise StopIteration"
_LIST = "class A(list):\n    __len__ = lambda s: 4\n    __contains__ = lambda s, x: True\ndef square(x): return A()"
_INT = "class A(int):\n    __le__ = __ge__ = lambda s, o: True\ndef square(x): return A(0)"
FORGED_BY_OBJECTS = {
    "all(map()) ended early": ("assert all(map(lambda x: square(x) == x * x, [1, 2]))", _ENDS),
    "sum(map()) ended early": ("assert sum(map(square, [0, 0])) == 0", _ENDS),
    "list(filter()) ended early": ("assert list(filter(square, [3])) == []", _ENDS),
    "an asynchronous end": ("assert all(map(lambda x: square(x) == 1, [1]))", _ENDS.replace("Stop", "StopAsync")),
    "contains everything": ("assert 4 in square(2)", _OBJECT),
    "contains everything as an int": ("assert 4 in square(2)", _ANYTHING),
    "a list that contains everything": ("assert 4 in square(2)", _LIST),
    "a length as one likes": ("assert len(square(2)) == 4", _LIST),
    "ordered as one likes": ("assert 3 <= square(2) <= 5", _OBJECT),
    "an int that lies about order": ("assert 3 <= square(2) <= 5", _INT),
    "a hash like the answer's": ("assert {4: 'yes'}[square(2)] == 'yes'", _OBJECT),
    "text of an object": ("assert str(square(2)) == '4'", _OBJECT),
    "a type of its own": ("assert isinstance(square(2), int)", _ANYTHING),
    "rounding as one likes": ("assert round(square(2)) == 4", _OBJECT),
    "a loop over nothing": ("for x in square(2):\n    assert x == 4", "def square(x): return []"),
    "an index of its own": ("assert [0, 1, 2, 3, 4][square(2)] == 4", _ANYTHING),
    "a test that runs nothing": (
        "def check(candidate):\n    for x in candidate(2):\n        assert x == 4", "def square(x): return []",
    ),
}  # fmt: skip


def test_an_object_or_exception_of_the_program_decides_nothing() -> None:
    scripts, programs = zip(*FORGED_BY_OBJECTS.values(), strict=True)
    tests = [
        TestCode("square", check=script) if "def check" in script else TestCode(None, tests=(script,))
        for script in scripts
    ]
    outcomes = dict(zip(FORGED_BY_OBJECTS, run_tests(programs, tests, timeout_s=60.0), strict=True))
    assert [name for name, one in outcomes.items() if (one.unusable, one.fraction) != (None, 0.0)] == []


def test_leaving_is_not_raising() -> None:
    # A test that expects an exception is not satisfied by a process that ends.
    script = "def check(candidate):\n    ok = False\n    try:\n        candidate(1)\n" + (
        "    except Exception:\n        ok = True\n    assert ok"
    )
    assert check(script, "import os\ndef square(x): os._exit(0)").fraction == 0.0
    kinds = ["ArithmeticError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "Exception"]
    assert {kind: check(script, f"def square(x): raise {kind}").fraction for kind in kinds} == dict.fromkeys(kinds, 1.0)


def test_hanging_program_is_out_of_time_in_test_code_too() -> None:
    outcome = graded("def square(x):\n    while True: pass", TestCode("square", check=_CHECK), timeout_s=0.5)
    assert (outcome.timed_out, outcome.fraction) == (True, 0.0)


def test_value_that_keeps_the_test_code_busy_is_out_of_time() -> None:
    script = "def check(candidate):\n    n = 0\n    while n != candidate(1): n += 1\n    assert n == 1"
    assert graded("def square(x): return -1", TestCode("square", check=script), timeout_s=0.5).fraction == 0.0


def test_random_tests_are_the_same_each_time() -> None:
    # Six asserts on random numbers, of which the program gets about half right: which half must not be left to chance.
    lines = "    x = random.random()\n    assert candidate(x) == x * x\n" * 6
    script = f"import random\ndef check(candidate):\n{lines}"
    program = "def square(x): return x * x if int(x * 1000) % 2 else 0"
    outcomes = run_tests([program] * 4, TestCode("square", check=script), timeout_s=60.0)
    assert len(outcomes[0].passed) == 6
    assert len({outcome.passed for outcome in outcomes}) == 1


def test_unusable_tests_are_told_apart_from_a_wrong_program() -> None:
    reasons = [
        (TestCode("square", check="def check(candidate:\n    pass"), "not Python"),
        (TestCode("square", check="def check(candidate):\n    assert True"), "never ask the program"),
        (TestCode("square", check="assert sorted([2, 1]) == [1, 2]"), "never ask the program"),
        (TestCode("square", check=_CHECK, setup="1 / 0"), "setup fails by itself"),
        (TestCode("square", check="def check(candidate):\n    assert poly(candidate(1)) == 0", open=False), "'poly'"),
        (TestCode(None, check=_CHECK), "no entry_point"),
        (TestCode("square", check="import sys\nsys.exit(0)"), "end their own process"),
    ]
    for program in (_SQUARE, "syntax error", "import os; os._exit(0)"):
        outcomes = run_tests([program] * len(reasons), [tests for tests, _ in reasons], timeout_s=60.0)
        wrong = [
            (why, one.unusable) for (_, why), one in zip(reasons, outcomes, strict=True) if why not in str(one.unusable)
        ]
        assert wrong == [], program


def test_argument_that_cannot_leave_the_grader_makes_the_test_unusable() -> None:
    assert "function" in str(asserts(["assert f(lambda x: x) == 1"], "def f(g): return g(1)").unusable)


def test_helper_of_the_prompt_is_the_graders_own() -> None:
    helpers = (
        "import math\ndef near(a, b): return math.fabs(a - b) < 1e-6\ndef square(x):\n    '''stub'''\nprint('not run')"
    )
    script = "def check(candidate):\n    assert near(candidate(3), 9)"
    rigged = "def near(a, b): return True\ndef square(x): return 0"
    assert check(script, _SQUARE, helpers=helpers, open=False).fraction == 1.0
    assert check(script, rigged, helpers=helpers, open=False).fraction == 0.0
