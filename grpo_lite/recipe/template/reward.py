"""What a completion earns in this project. After a change run the example below: python -m doctest reward.py"""

from typing import Any


def right_number(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Return 1.0 for each completion whose first line is the right number and nothing else, otherwise 0.0.

    `answer` is the column of that name in rows.jsonl, one value for each completion.

    >>> right_number(["12", "13", "12 or 13", ""], answer=["12", "12", "12", "12"])
    [1.0, 0.0, 0.0, 0.0]
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    first_lines = [text.strip().partition("\n")[0].strip() for text in texts]
    return [float(line == right) for line, right in zip(first_lines, answer, strict=True)]
