"""Sudoku on a 4 x 4 board: fill it by placing digits, with the rules and no oracle behind the tool."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

SIDE = 4
DIGITS = "1234"
MOST_EMPTY = 10  # of 16 cells; fewer clues leave few boards with one solution
_SPARE_MOVES = 4
_LOST_PER_MOVE = 0.1
QUESTION = (
    "Solve this 4 x 4 Sudoku by calling the tool place for each empty cell. Every row, every column and every 2 x 2 "
    "box holds 1, 2, 3 and 4 once. A dot is an empty cell."
)


class Sudoku:
    """Fill a 4 x 4 Sudoku whose solution is unique.

    Columns: `puzzle` (four lines of four, dots for empty cells), or `seed`, which makes one. Reward: 1 for the solved
    board, 0.1 less for each move more than there are empty cells, 0 if unsolved. Every call is a move, also a refused
    one; there are four moves more than empty cells. A digit is refused if the board shows it in the same row, column
    or box. The tool does not say whether a digit is right.
    """

    def __init__(self) -> None:
        self._clues = ""
        self._board = ""
        self._moves = 0

    def reset(self, puzzle: str | None = None, seed: int | None = None, **row: Any) -> str | None:
        """Set up the board and show it."""
        if puzzle is None and seed is not None:
            puzzle = make(random.Random(seed), 6)[0]
        board = "".join(str(puzzle or "").split())
        self._clues = board if len(board) == SIDE * SIDE and set(board) <= {".", *DIGITS} else ""
        self._board, self._moves = self._clues, 0
        return f"\n\n{shown(self._board)}" if self._clues else None

    def place(self, row: int, column: int, digit: int) -> str:
        """Place a digit in an empty cell.

        Args:
            row: Row from the top, 1 to 4.
            column: Column from the left, 1 to 4.
            digit: Digit to place, 1 to 4.

        Returns:
            The board, or why the digit cannot be placed; and the moves that are left.
        """
        if not self._clues or self._solved():
            return "Error: the game is over."
        if self._moves >= self._most_moves():
            return "Error: the game is over; no moves are left."
        self._moves += 1
        left = f"{self._most_moves() - self._moves} moves are left."
        if why := self._refusal(row, column, digit):
            return f"Error: {why}. {left}"
        cell = SIDE * (row - 1) + column - 1
        self._board = self._board[:cell] + str(digit) + self._board[cell + 1 :]
        return f"{shown(self._board)}\n{'Solved.' if self._solved() else left}"

    def get_reward(self) -> float | None:
        """Return 1 less 0.1 for each spare move used, 0 if unsolved; None without a puzzle."""
        if not self._clues:
            return None
        spare = self._moves - self._clues.count(".")
        return round(1 - _LOST_PER_MOVE * spare, 6) if self._solved() else 0.0

    def _most_moves(self) -> int:
        return self._clues.count(".") + _SPARE_MOVES

    def _solved(self) -> bool:
        return "." not in self._board and all(
            not _breaks(self._board, cell, digit) for cell, digit in enumerate(self._board)
        )

    def _refusal(self, row: Any, column: Any, digit: Any) -> str:
        """Return why the digit cannot be placed, "" if it can."""
        for name, value in (("row", row), ("column", column), ("digit", digit)):
            if type(value) is not int or not 1 <= value <= SIDE:
                return f"{name} must be a whole number from 1 to {SIDE}"
        cell = SIDE * (row - 1) + column - 1
        if self._clues[cell] != ".":
            return "this cell is a clue"
        if _breaks(self._board, cell, str(digit)):
            return f"the digit {digit} is in the same row, column or box already"
        return ""


def shown(board: str) -> str:
    """Return a board of 16 characters as four lines."""
    return "\n".join(" ".join(board[start : start + SIDE]) for start in range(0, SIDE * SIDE, SIDE))


def _breaks(board: str, cell: int, digit: str) -> bool:
    """Return whether another cell of the row, column or box holds the digit."""
    return any(board[other] == digit for other in _PEERS[cell])


def _peers(cell: int) -> frozenset[int]:
    row, column = divmod(cell, SIDE)
    every = ((other, *divmod(other, SIDE)) for other in range(SIDE * SIDE) if other != cell)
    return frozenset(
        other for other, r, c in every if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    )


_PEERS = [_peers(cell) for cell in range(SIDE * SIDE)]


def solutions(board: str) -> Iterator[str]:
    """Yield every solution of a board."""
    cell = board.find(".")
    if cell < 0:
        yield board
        return
    for digit in DIGITS:
        if not _breaks(board, cell, digit):
            yield from solutions(board[:cell] + digit + board[cell + 1 :])


def make(rng: random.Random, empty: int) -> tuple[str, str]:
    """Return a puzzle with so many empty cells and one solution, and the solution."""
    while True:
        board = solution = rng.choice(_full_boards())
        for cell in rng.sample(range(SIDE * SIDE), SIDE * SIDE):
            if board.count(".") == empty:
                return board, solution
            without = board[:cell] + "." + board[cell + 1 :]
            if len(list(islice(solutions(without), 2))) == 1:
                board = without


@cache
def _full_boards() -> list[str]:
    """Return the 288 solved boards."""
    return list(solutions("." * SIDE * SIDE))


def rows(seed: int, size: int, empty: int) -> list[dict[str, Any]]:
    """Return distinct rows `{question, puzzle, answer}`; `reset` shows the puzzle, `answer` is its solution.

    Raises:
        ValueError: `empty` or `size` is out of range, or there are not so many puzzles.
    """
    if not 1 <= empty <= MOST_EMPTY or size < 1:
        raise ValueError(f"1 <= empty <= {MOST_EMPTY} and size >= 1 are needed")
    rng = random.Random(seed)
    puzzles: dict[str, str] = {}
    for _ in range(20 * size):
        puzzle, solution = make(rng, empty)
        puzzles.setdefault(puzzle, solution)
        if len(puzzles) == size:
            return [
                {"question": QUESTION, "puzzle": _lines(puzzle), "answer": _lines(solution)}
                for puzzle, solution in puzzles.items()
            ]
    raise ValueError(f"only {len(puzzles)} distinct puzzles turned up; ask for fewer or for more empty cells")


def _lines(board: str) -> str:
    return shown(board).replace(" ", "")


def gold(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns that earn 1: place each missing digit of the solution."""
    return [*[[_call(*move)] for move in _missing(row)], "The board is solved."]


def cheats(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the turns of each cheat, by its name."""
    missing = _missing(row)
    clues = [(r, c, d) for r, c, d in _cells(str(row["answer"])) if (r, c, d) not in missing]
    last = missing[-1]
    return {
        "answer without a move": [str(row["answer"])],
        "overwrite the clues": [[_call(r, c, d % SIDE + 1)] for r, c, d in clues],
        "place the clues again": [[_call(*clue)] for clue in clues],
        "all but one cell": [*[[_call(*move)] for move in missing[:-1]], "The board is solved."],
        "a wrong last digit": [[_call(*move)] for move in (*missing[:-1], (last[0], last[1], last[2] % SIDE + 1))],
        "one digit everywhere": [[_call(r, c, missing[0][2] % SIDE + 1)] for r, c, _ in missing],
        "use up the moves": [
            *[[_call(1, 1, 9)]] * (len(missing) + _SPARE_MOVES),
            *[[_call(*move)] for move in missing],
        ],
        "the board in the text": [[_call(1, 1, "1\nSolved.")], str(row["answer"])],  # type: ignore[arg-type]
        "choose the puzzle": [[{"name": "reset", "arguments": {"puzzle": row["answer"]}}], "Solved."],
        "read the board": [[{"name": "_board", "arguments": {}}, {"name": "get_reward", "arguments": {}}], "Solved."],
    }


def _cells(board: str) -> list[tuple[int, int, int]]:
    """Return row, column and digit of every cell of a solution."""
    flat = "".join(board.split())
    return [(cell // SIDE + 1, cell % SIDE + 1, int(digit)) for cell, digit in enumerate(flat)]


def _missing(row: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    puzzle = "".join(str(row["puzzle"]).split())
    return [cell for cell, clue in zip(_cells(str(row["answer"])), puzzle, strict=True) if clue == "."]


def _call(row: int, column: int, digit: int) -> dict[str, Any]:
    return {"name": "place", "arguments": {"row": row, "column": column, "digit": digit}}
