"""From a completion to the program it commits to, and from a prompt to the code it gives.

Only plain text handling: a program is never parsed in the trainer's process, where hostile source could exhaust it.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from typing import NamedTuple

from ..completion import Completion, completion_text, visible_text

_FENCES = ("```", "~~~")
_PYTHON = ("python", "py", "python3", "")
# Each alternative scans a line once: completions are hostile, and may be 100,000 characters on one line.
_CODE_LINE = re.compile(
    r"from +\S+ +import\b|import +\w+(?: *$| *[,.]| +as )|(?:async +)?def +\w+ *\(|class +\w+ *[:(]"
    r"|(?:for|while|if|try|with)\b.*:(?: *$| *#)|(?:print|input)\(|[@#]|[A-Za-z_][\w.,\[\] ]*[-+*/%|&]?=(?!=)"
)
_PROSE_LINE = re.compile(r"(?:[-*>+]|\d+[.)]) +\S|\*\*\w|([A-Za-z']+)(?:[,.!?;]? +([A-Za-z']+)|[:!?] *$)")
_CODE_BEGINS = frozenset((*keyword.kwlist, "match", "type"))
_CODE_CONTINUES = frozenset(("and", "or", "if", "else", "in"))
_MOST_CUT_LINES = 30


class Block(NamedTuple):
    """A fenced block of a text."""

    language: str
    code: str


def program_of(completion: Completion, entry: str | None = None, *, prefilled: bool = False) -> str:
    r"""Return the one program a completion commits to.

    Outside the thinking, inside the last `<answer>` if there is one: the last fenced Python block that defines the
    entry, else the last Python block, else the last block. Without fences the text itself, from the first line that
    looks like code if it opens with prose. There is one program to judge: writing several gives no second try.

    Args:
        entry: the function the tests call, if known.
        prefilled: the prompt ends inside a thinking block.

    >>> program_of("Sure:\n```python\ndef f(x):\n    return x\n```\nTry it:\n```python\nprint(f(1))\n```", "f")
    'def f(x):\n    return x'
    """
    text = _answer(visible_text(completion_text(completion), prefilled=prefilled))
    blocks = fenced_blocks(text)
    if not blocks:
        return _from_first_code_line(text)
    python = [block.code for block in blocks if block.language in _PYTHON]
    defining = [code for code in python if entry is not None and defines(code, entry)]
    return (defining or python or [blocks[-1].code])[-1]


def fenced_blocks(text: str) -> list[Block]:
    """Return the fenced blocks in order; one that never closes ends with the text."""
    blocks: list[Block] = []
    fence, language = "", ""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        bare = line.strip()
        if not fence:
            if bare.startswith(_FENCES):
                fence = bare[:3]
                language = bare.strip("`~ ").split(" ")[0].lower()
                lines = []
        elif bare.startswith(fence) and not bare.strip(fence[0]):
            blocks.append(Block(language, textwrap.dedent("\n".join(lines))))
            fence = ""
        else:
            lines.append(line)
    if fence:
        blocks.append(Block(language, textwrap.dedent("\n".join(lines))))
    return blocks


def defines(code: str, name: str) -> bool:
    """Return whether code defines a name at its top level, going by the look of its lines."""
    return (
        re.search(rf"^(?:(?:async )?def|class) +{re.escape(name)}\b|^{re.escape(name)} *=[^=]", code, re.M) is not None
    )


def _answer(text: str) -> str:
    """Return what the last `<answer>` holds, or the whole text."""
    _, opened, rest = text.rpartition("<answer>")
    return rest.partition("</answer>")[0] if opened else text


def _from_first_code_line(text: str) -> str:
    """Drop prose in front of code. A text that does not begin as prose is left as it is: it may well be all code."""
    lines = text.split("\n")
    if not _is_prose(next((line for line in lines if line.strip()), "")):
        return text
    start = next((place for place, line in enumerate(lines) if _CODE_LINE.match(line)), 0)
    return "\n".join(lines[start:])


def _is_prose(line: str) -> bool:
    """Tell words that no line of Python can begin with: two names side by side, a list item, a lone word."""
    match = _PROSE_LINE.match(line)
    return match is not None and "=" not in line and match[1] not in _CODE_BEGINS and match[2] not in _CODE_CONTINUES


def prompt_code(prompt: Completion, entry: str) -> str:
    """Return the code in a prompt that defines the entry, such as HumanEval's stub with its helpers; "" if none does.

    The prompt comes from the dataset, so it may be parsed here.
    """
    text = completion_text(prompt)
    for code in (*(block.code for block in fenced_blocks(text)), text, _from_first_code_line(text)):
        lines = code.split("\n")
        for end in range(len(lines), max(len(lines) - _MOST_CUT_LINES, 0), -1):
            candidate = "\n".join(lines[:end])
            if not defines(candidate, entry):
                break
            if _parse(candidate) is not None:
                return candidate
    return ""


def complete(program: str, stub: str, entry: str) -> str:
    """Join a program with the code its prompt gave: after the stub if it only continues it, else after its helpers."""
    if not stub:
        return program
    if not defines(program, entry):
        return f"{stub}{'' if stub.endswith(chr(10)) else chr(10)}{program}"
    tree = _parse(stub)
    if tree is None or "__future__" in program:
        return program
    helpers = [ast.unparse(node) for node in tree.body if getattr(node, "name", None) != entry]
    return "\n".join([*helpers, program])


def _parse(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
