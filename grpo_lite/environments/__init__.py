"""Environments that come with the kit: offline, without torch, each with a gold policy and a battery of cheats.

They follow TRL's contract for `environment_factory`, so they also run in plain TRL: a class without arguments, with
`reset(**row)`, whose text is appended to the last user message, public methods as tools, and `get_reward()`.

name         class          tool         columns of a row        earns 1 by
calculator   `Calculator`   `calculate`  `question`, `answer`    reaching the answer by a call
python       `Python`       `run`        `question`, `answer`    printing the answer by a program
wordle       `Wordle`       `guess`      `answer` or `seed`      the word at once; 0.1 less a turn
sudoku       `Sudoku`       `place`      `puzzle` or `seed`      the full board, no spare move
search       `Search`       `search`     those and `corpus`      finding a passage with the answer

`python:StatelessPython` is the python tool that keeps nothing between calls.

An environment sees tool calls and never the final text (TRL's contract). A recipe that wants the text to be right adds
`rewards.accuracy_reward`. A tool called with nonsense returns a line that begins with "Error:"; it never raises.

Each module also has two plain functions of a row, which `make check-env` runs as policies:

    gold(row) -> turns                 earns 1
    cheats(row) -> {name: turns}       each earns less, most of them 0

Turns are what the model would do, in order. A turn is a list of calls `{"name": …, "arguments": {…}}`, made at once, or
the final text.
"""

from __future__ import annotations

BUILT_IN = {
    "calculator": "grpo_lite.environments.calculator:Calculator",
    "python": "grpo_lite.environments.python:Python",
    "wordle": "grpo_lite.environments.wordle:Wordle",
    "sudoku": "grpo_lite.environments.sudoku:Sudoku",
    "search": "grpo_lite.environments.search:Search",
}
