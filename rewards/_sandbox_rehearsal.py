"""What a child will do, done a few times in the worker before it forks any: children then start with warm caches.

A page that a child writes to is copied first, and in Python's first runs of a function nearly everything is written:
counters and caches in its code, caches of its types, free lists. Measured, a program costs 5 to 10 % less.
"""

from __future__ import annotations

import socket
import sys
from functools import partial
from typing import Any

from rewards import _sandbox_child as child
from rewards import _sandbox_limits as limits
from rewards import _sandbox_linux as linux
from rewards._sandbox_codec import dumps
from rewards._sandbox_frames import pack
from rewards._sandbox_judge import judge

_ROUNDS = 40  # CPython 3.11 specialises a function's code at the 8th call, and its instructions some calls later
_PR_GET_DUMPABLE = 3  # stands for the calls that children make: it changes nothing
_PROGRAM = """
from collections import Counter
import math, re

class Pair:
    def __init__(self, left, right=0):
        self.left, self.right = left, right

def ranked(words, most):
    counts = Counter(words)
    pairs = [Pair(word, counts[word]) for word in sorted(counts, key=lambda word: (-counts[word], word))]
    return [(pair.left, pair.right) for pair in pairs[:most] if re.match("[a-z]", pair.left)]
"""
_CALL = {"do": "call", "on": "ranked", "args": [["a", "b", "a"], 2], "kwargs": {}}
_TESTS = {
    "entry": None,
    "tests": ["assert ranked(['a', 'b', 'a'], 2) == [('a', 2), ('b', 1)]", "assert len(ranked(['a'], 1)) == 1"],
    "check": "",
    "setup": "",
    "helpers": "",
    "open": True,
}


def rehearse() -> None:
    """Go through a child's steps, except those that would hold for this process for good."""
    arguments = sys.argv
    for _ in range(_ROUNDS):
        ours, theirs = socket.socketpair()
        steps = [{"program": _PROGRAM, "keep": False}, _CALL, _CALL]
        ours.sendall(b"".join(pack(dumps(step)) for step in steps))
        ours.shutdown(socket.SHUT_WR)
        child.answer_calls(theirs.fileno())
        space = vars(sys.modules["solution"])
        judge(_TESTS, partial(_reply, space))
        ours.close()
        theirs.close()
        limits.lower("RLIMIT_CORE", 0)
        if linux.LINUX:
            linux.prctl(_PR_GET_DUMPABLE)
    sys.argv = arguments
    for name in ("solution", "tests"):
        sys.modules.pop(name, None)


def _reply(space: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Answer the judge in the program's place."""
    return {"value": child.answer(request, space, [], keep=True)}
