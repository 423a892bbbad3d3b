"""One program is taken from a completion, wherever the model put it."""

from __future__ import annotations

from typing import Any

from rewards.sandbox.source import complete, defines, fenced_blocks, program_of, prompt_code

_ADD = "def add(a, b):\n    return a + b"


def test_program_is_found() -> None:
    table: list[tuple[Any, str]] = [
        (_ADD, _ADD),
        (f"```python\n{_ADD}\n```", _ADD),
        (f"```py\n{_ADD}\n```", _ADD),
        (f"```Python\n{_ADD}\n```", _ADD),
        (f"```\n{_ADD}\n```", _ADD),
        (f"~~~python\n{_ADD}\n~~~", _ADD),
        (f"```python title=x\n{_ADD}\n```", _ADD),
        (f"Sure!\n\n```python\n{_ADD}\n```\nDone.", _ADD),
        (f"<think>```python\nadd = 1\n```</think>```python\n{_ADD}\n```", _ADD),
        (f"<think>hm</think>\n<answer>\n```python\n{_ADD}\n```\n</answer>", _ADD),
        (f"```python\nx = 1\n```\n<answer>```python\n{_ADD}\n```</answer>\n```python\ny = 2\n```", _ADD),
        (f"```python\n{_ADD}\n```\nUse:\n```python\nprint(add(1, 2))\n```", _ADD),
        (f"```python\n{_ADD}\n```\nOutput:\n```\n3\n```", _ADD),
        (f"```python\ndef add(a, b): return 0\n```\nNo, rather:\n```python\n{_ADD}\n```", _ADD),
        (f"```bash\npip install x\n```\n```python\n{_ADD}\n```", _ADD),
        (f"```python\n{_ADD}", _ADD),  # cut off before the fence closes
        ("1. First:\n   ```python\n   def add(a, b):\n       return a + b\n   ```", _ADD),
        (f"```python\r\n{_ADD}\r\n```".replace("\n", "\r\n").replace("\r\r", "\r"), _ADD),
        (f"Here is the function.\n{_ADD}", _ADD),
        ([{"role": "assistant", "content": f"```python\n{_ADD}\n```"}], _ADD),
        ("    return a + b", "    return a + b"),  # a continuation keeps its indentation
        ("", ""),
        (None, ""),
    ]  # fmt: skip
    assert [row for row in table if program_of(row[0], "add") != row[1]] == []


def test_bare_program_is_taken_whole_whatever_it_begins_with() -> None:
    for program in (
        "a, b = map(int, input().split())\nc = a + b\nprint(c)",
        "while True:\n    pass\nx = 1",
        "try:\n    n = int(input())\nexcept ValueError:\n    n = 0\nprint(n)",
        "for i in range(3):\n    x = i\nprint(x)",
        "if True:\n    x = 1\nprint(x)",
        "print(input())\nx = 1",
        "# comment\nx = 1",
        '"""Docstring of several words."""\nx = 1',
        "'docstring'\nx = 1",
        "x += 1\ny = 2",
        "lambda x: x\ny = 2",
        "assert True\nx = 1",
        "raise ValueError\nx = 1",
        "del x\ny = 1",
        "@decorator\ndef f(): pass",
        "global_call()\nx = 1",
        "[print(i) for i in range(3)]\nx = 1",
        "match x:\n    case 1: y = 2",
        "async def f(): pass\nx = 1",
        "x: int = 3\ny = 2",
        "with open(0) as f:\n    x = f.read()\nprint(x)",
        "yes = no = 1\nx = 2",
        "n\nx = 1",
    ):
        assert program_of(program) == program
        assert program_of(f"\n{program}\n") == f"\n{program}\n"


def test_prose_in_front_of_bare_code_is_dropped() -> None:
    for prose in (
        "Here is the function.", "Sure!", "Solution:", "The answer is below:", "I'd do this", "1. Add them", "- add",
        "**Code**", "This solves it, I think.\n\nIt adds",
    ):  # fmt: skip
        assert program_of(f"{prose}\n\n{_ADD}", "add") == _ADD
        assert program_of(f"{prose}\nn = int(input())\nprint(n)") == "n = int(input())\nprint(n)", prose


def test_hostile_completion_is_read_in_linear_time() -> None:
    # 300,000 characters on a line: anything quadratic would take minutes and meet the test's time limit.
    for unit in (" ", "a", "* ", "**a ", "a ", ":", "for :", ":#", "=", "`", "``` ", "a,", "<answer>", "\n", "- "):
        text = unit * (300_000 // len(unit))
        for completion in (text, f"Words here\n{text}", f"for {text}", f"```{text}", f"```python\n{text}\n```"):
            assert isinstance(program_of(completion, "add"), str)


def test_without_a_known_entry_the_last_python_block_counts() -> None:
    text = "```python\nprint(1)\n```\n```python\nprint(2)\n```\n```text\n2\n```"
    assert program_of(text) == "print(2)"


def test_thinking_that_the_prompt_opened_is_no_program() -> None:
    text = f"```python\nadd = 1\n```</think>```python\n{_ADD}\n```"
    assert program_of(text, "add", prefilled=True) == _ADD
    assert program_of(f"```python\n{_ADD}\n```", "add", prefilled=True) == ""


def test_several_programs_are_not_joined() -> None:
    text = "```python\ndef add(a, b): return 1\n```\n```python\ndef add(a, b): return 2\n```"
    assert program_of(text, "add") == "def add(a, b): return 2"


def test_fence_inside_a_string_of_the_other_kind_does_not_close_the_block() -> None:
    assert fenced_blocks("~~~python\ns = '''\n```\n'''\n~~~")[0].code == "s = '''\n```\n'''"


def test_form_feed_does_not_break_a_line() -> None:
    assert program_of("```python\nx = 'a\x0cb\u2028c'\n```") == "x = 'a\x0cb\u2028c'"


def test_definition_is_recognised_by_its_line() -> None:
    expected = {
        "def add(): pass": True,
        "async def add(): pass": True,
        "class add: pass": True,
        "add = lambda a, b: a + b": True,
        "x = 1\ndef add(): pass": True,
        "    def add(): pass": False,
        "def adder(): pass": False,
        "add == 1": False,
        "# def add(): pass": False,
    }
    assert {code: defines(code, "add") for code in expected} == expected


_STUB = 'from typing import List\n\ndef helper(x):\n    return x\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n'


def test_code_of_a_prompt_is_found() -> None:
    prompts: dict[str, Any] = {
        "raw": _STUB,
        "prose before": f"Complete this function.\n\n{_STUB}",
        "fenced": f"```python\n{_STUB}```",
        "fenced in prose": f"Write it:\n```python\n{_STUB}```\nReply with code only.",
        "prose after": f"{_STUB}\nPlease complete it.",
        "chat": [
            {"role": "system", "content": "You code."},
            {"role": "user", "content": f"Go:\n```python\n{_STUB}```"},
        ],
    }
    assert [name for name, prompt in prompts.items() if prompt_code(prompt, "add").strip() != _STUB.strip()] == []


def test_prompt_without_the_entry_gives_no_code() -> None:
    for prompt in ("Add two numbers.", "def other(): pass", "def add(a, b)", ""):
        assert prompt_code(prompt, "add") == "", prompt


def test_continuation_is_put_after_the_stub_and_a_program_after_its_helpers() -> None:
    assert complete("    return a + b", _STUB, "add") == _STUB + "    return a + b"
    space: dict[str, object] = {}
    exec(complete("def add(a: List, b): return helper(a) + b", _STUB, "add"), space)
    assert space["add"](1, 2) == 3  # type: ignore[operator]


def test_program_with_a_future_import_stays_first() -> None:
    program = "from __future__ import annotations\ndef add(a, b): return a + b"
    assert complete(program, _STUB, "add") == program
