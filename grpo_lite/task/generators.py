"""Named generators of rows: problems with a checkable answer, all distinct, from a seed. Torch-free."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from grpo_lite.environments import search as search_environment
from grpo_lite.environments import sudoku as sudoku_environment
from grpo_lite.environments import verifiers as verifiers_environment
from grpo_lite.environments import wordle as wordle_environment
from grpo_lite.errors import DataError

Row = dict[str, Any]


def generate_rows(name: str, kwargs: dict[str, Any], seed: int, where: str = "data") -> list[Row]:
    """Return the rows of a named generator; `where` is the recipe key that names it.

    Raises:
        DataError: unknown arguments, or values out of range; with what is allowed.
    """
    function = GENERATORS[name]
    allowed = [key for key in inspect.signature(function).parameters if key != "seed"]
    unknown = [key for key in kwargs if key not in allowed]
    if unknown and name not in ("reasoning_gym", "verifiers"):  # theirs are the library's
        raise DataError(
            f"{where}: the generator {name!r} has no argument {', '.join(map(repr, unknown))}. "
            f"Allowed: {', '.join(allowed)}."
        )
    try:
        return function(seed=seed, **kwargs)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the generator {name!r} was given {kwargs!r}: {error}.") from None


def sums(seed: int, low: int = 1, high: int = 20, operator: str = "+", size: int | None = None) -> list[Row]:
    """Return distinct sums or differences `{question: '3+12', answer: '15'}` of terms low…high, in random order.

    Args:
        seed: of the order.
        low: smallest term.
        high: largest term; there are (high − low + 1)² problems.
        operator: `+` or `-`.
        size: how many of them; None: all.
    """
    if operator not in ("+", "-"):
        raise ValueError("operator is + or -")
    if not 0 <= low <= high:
        raise ValueError("0 <= low <= high is needed")
    pairs = list(itertools.product(range(low, high + 1), repeat=2))
    if size is not None and not 1 <= size <= len(pairs):
        raise ValueError(f"there are {len(pairs)} distinct problems, so size is 1 to {len(pairs)}")
    random.Random(seed).shuffle(pairs)
    return [
        {"question": f"{a}{operator}{b}", "answer": str(a + b if operator == "+" else a - b)} for a, b in pairs[:size]
    ]


def products(seed: int, low: int = 12, high: int = 999, size: int = 1000, direct: float | None = None) -> list[Row]:
    """Return distinct products `{question: '17*23', answer: '391'}` of factors low…high, in random order.

    With `direct` each row also has `trace`, the assistant's messages: a call of the environment calculator, its result
    and the answer. Or it answers directly.

    Args:
        seed: of the problems.
        low: smallest factor.
        high: largest factor.
        size: how many, all distinct.
        direct: share of the rows whose trace answers directly, 0 to 1; None: no traces.
    """
    if not 0 <= low <= high or not 0 <= (direct or 0) <= 1:
        raise ValueError("0 <= low <= high and 0 <= direct <= 1 are needed")
    count = (high - low + 1) ** 2
    if not 1 <= size <= count:
        raise ValueError(f"there are {count} distinct problems, so size is 1 to {count}")
    rng, width = random.Random(seed), high - low + 1
    pairs = (divmod(number, width) for number in rng.sample(range(count), size))
    rows: list[Row] = [{"question": f"{low + a}*{low + b}", "answer": str((low + a) * (low + b))} for a, b in pairs]
    if direct is not None:
        for row in rows:
            row["trace"] = _calculated(row["question"], row["answer"], calls=rng.random() >= direct)
    return rows


def _calculated(question: str, answer: str, calls: bool) -> list[Row]:
    final: Row = {"role": "assistant", "content": f"The answer is {answer}."}
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": question}}}
    before: list[Row] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculate", "content": answer},
    ]
    return [*before, final] if calls else [final]


def chain(seed: int, terms: int = 4, low: int = 1, high: int = 9, size: int = 1000, direct: float = 0.0) -> list[Row]:
    """Return distinct sums of several numbers `{question: '4+7+8+9', answer: '28', trace: …}`, in random order.

    `trace` is a whole completion. It adds one number after the other:
    `<think>4+7=11, 11+8=19, 19+9=28</think><answer>28</answer>`. Or it answers directly: `<answer>28</answer>`.

    Args:
        seed: of the problems.
        terms: how many numbers each, 2 to 20.
        low: smallest number.
        high: largest number.
        size: how many, all distinct.
        direct: share of the rows whose trace answers directly, 0 to 1.
    """
    if not 2 <= terms <= 20 or not 0 <= low <= high or not 0 <= direct <= 1:
        raise ValueError("2 <= terms <= 20, 0 <= low <= high and 0 <= direct <= 1 are needed")
    count = (high - low + 1) ** terms
    if not 1 <= size <= count:
        raise ValueError(f"there are {count} distinct problems, so size is 1 to {count}")
    rng = random.Random(seed)
    rows: dict[tuple[int, ...], Row] = {}
    while len(rows) < size:
        numbers = tuple(rng.randint(low, high) for _ in range(terms))
        if numbers not in rows:
            rows[numbers] = _chain_row(numbers, shows_working=rng.random() >= direct)
    return list(rows.values())


def _chain_row(numbers: Sequence[int], shows_working: bool) -> Row:
    totals = list(itertools.accumulate(numbers))
    steps = [f"{a}+{b}={total}" for a, b, total in zip(totals, numbers[1:], totals[1:], strict=False)]
    working = f"<think>{', '.join(steps)}</think>" if shows_working else ""
    answer = str(totals[-1])
    return {"question": "+".join(map(str, numbers)), "answer": answer, "trace": f"{working}<answer>{answer}</answer>"}


def countdown(seed: int, size: int = 1000, numbers: int = 3, low: int = 1, high: int = 99) -> list[Row]:
    """Return countdown problems: reach `target` from `nums`, each used at most once, by + − × ÷. All are solvable.

    Args:
        seed: of the problems.
        size: how many, all distinct.
        numbers: how many numbers each, 2 to 6.
        low: smallest number.
        high: largest number.
    """
    if not 2 <= numbers <= 6 or not 1 <= low < high or size < 1:
        raise ValueError("2 <= numbers <= 6, 1 <= low < high and size >= 1 are needed")
    rng = random.Random(seed)
    rows: dict[tuple[Any, ...], Row] = {}
    for _ in range(size * 200):
        nums = [rng.randint(low, high) for _ in range(numbers)]
        expression, target = _random_expression(nums, rng)
        if 1 <= target <= 10 * high and target not in nums:
            row = {"nums": nums, "target": target, "numbers": ", ".join(map(str, nums)), "answer": expression}
            rows.setdefault((*sorted(nums), target), row)
        if len(rows) == size:
            return list(rows.values())
    raise ValueError(f"only {len(rows)} distinct problems exist for these arguments; ask for fewer or widen low…high")


def _random_expression(nums: list[int], rng: random.Random) -> tuple[str, int]:
    """Combine all numbers left to right in a random order with random operators; whole results only."""
    order = nums[:]
    rng.shuffle(order)
    text, value = str(order[0]), order[0]
    for number in order[1:]:
        operators = ["+", "-", "*"] + (["/"] if number and value % number == 0 else [])
        operator = rng.choice(operators)
        results = {"+": value + number, "-": value - number, "*": value * number}
        value = value // number if operator == "/" else results[operator]
        text = f"({text}{operator}{number})"
    return text[1:-1], value


def counting(seed: int, size: int = 1000, high: int = 2000) -> list[Row]:
    """Return distinct questions `How many whole numbers from 1 to … are …?` with `answer`, and `code` that prints it.

    They are hard in the head and one line of Python. Answers are at least 10, and no number of the question.

    Args:
        seed: of the problems.
        size: how many, all distinct.
        high: the largest number to count to, at least 200.
    """
    if size < 1 or high < 200:
        raise ValueError("size >= 1 and high >= 200 are needed")
    problems = list(itertools.product(range(150, high + 1), range(3, 10), _CONDITIONS))
    rows: list[Row] = []
    for last, divisor, (words, test) in random.Random(seed).sample(problems, len(problems)):
        answer = sum(map(eval(f"lambda n: {test}"), range(divisor, last + 1, divisor)))
        if answer >= 10 and answer != last:
            question = f"How many whole numbers from 1 to {last} are divisible by {divisor} and {words}?"
            code = f"print(sum(1 for n in range(1, {last + 1}) if n % {divisor} == 0 and {test}))"
            rows.append({"question": question, "answer": str(answer), "code": code})
        if len(rows) == size:
            return rows
    raise ValueError(f"there are {len(rows)} distinct problems; ask for fewer or raise high")


_CONDITIONS = (
    ("have an even digit sum", "sum(map(int, str(n))) % 2 == 0"),
    ("have an odd digit sum", "sum(map(int, str(n))) % 2 == 1"),
    ("contain no digit 5", "'5' not in str(n)"),
    ("do not end in 0", "n % 10 != 0"),
    ("have a first digit that is even", "int(str(n)[0]) % 2 == 0"),
    ("have an odd number of odd digits", "sum(int(d) % 2 for d in str(n)) % 2 == 1"),
)


def wordle(seed: int, size: int = 500) -> list[Row]:
    """Return Wordle rows `{question, answer}` with distinct hidden words, for the environment `wordle`.

    Args:
        seed: of the words and their order.
        size: how many.
    """
    return wordle_environment.rows(seed, size)


def sudoku(seed: int, size: int = 1000, empty: int = 6) -> list[Row]:
    """Return distinct 4 x 4 Sudokus `{question, puzzle, answer}` with one solution each, for the environment `sudoku`.

    Args:
        seed: of the puzzles.
        size: how many.
        empty: empty cells, 1 to 10.
    """
    return sudoku_environment.rows(seed, size, empty)


def towns(seed: int, size: int = 1000) -> list[Row]:
    """Return distinct questions about invented towns, for the environment `search`; two searches answer each.

    Rows have `question`, `answer`, `corpus` (the kit's own text) and `queries` (searches that find the answer).

    Args:
        seed: of the questions; the text is always the same.
        size: how many.
    """
    return search_environment.rows(seed, size)


def reasoning_gym(seed: int, task: str, size: int = 1000, **task_kwargs: Any) -> list[Row]:
    """Return rows of a reasoning-gym task; `entry` keeps what its own verifier needs (rewards.reasoning_gym_reward)."""
    try:
        import reasoning_gym as library
    except ImportError:
        raise DataError(
            "data: the generator 'reasoning_gym' needs the library: pip install 'grpo-lite[reasoning-gym]'."
        ) from None
    dataset = library.create_dataset(task, size=size, seed=seed, **task_kwargs)
    return [
        {
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "task": task,
            "entry": json.dumps(entry, default=str),
        }
        for entry in dataset
    ]


def verifiers(seed: int, taskset: str, size: int = 1000, **settings: Any) -> list[Row]:
    """Return the first tasks of a taskset of the library verifiers (grpo_lite/environments/verifiers.py).

    Args:
        seed: not used; a taskset has its own order.
        taskset: name of its installed package.
        size: most tasks.
        settings: keys of its config.
    """
    return verifiers_environment.rows(taskset, size, settings)


GENERATORS: dict[str, Callable[..., list[Row]]] = {
    "sums": sums,
    "products": products,
    "chain": chain,
    "countdown": countdown,
    "counting": counting,
    "wordle": wordle,
    "sudoku": sudoku,
    "towns": towns,
    "reasoning_gym": reasoning_gym,
    "verifiers": verifiers,
}
