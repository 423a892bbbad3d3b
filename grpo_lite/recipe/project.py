"""`grpo-lite init`: write a small project, recipe, reward, rows and README, to be changed into one's own."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

from grpo_lite.errors import GRPOLiteError

ROWS = 200  # of 400 distinct sums
LARGEST = 20


def create_project(folder: Path) -> list[Path]:
    """Write the files of a small project into a folder, and return their paths.

    Raises:
        GRPOLiteError: one of the files exists already, or the folder cannot be written.
    """
    files = project_files()
    if there := [name for name in files if (folder / name).exists()]:
        raise GRPOLiteError(
            f"init {folder}: holds {', '.join(there)} already, and nothing is overwritten. Choose another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise GRPOLiteError(f"init {folder}: cannot be written ({error.strerror}). Choose another folder.") from None
    return [folder / name for name in files]


def project_files() -> dict[str, str]:
    """Return the text of each file by its name."""
    template = resources.files("grpo_lite.recipe") / "template"
    names = ("recipe.yaml", "reward.py", "README.md")
    texts = {name: (template / name).read_text(encoding="utf-8") for name in names}
    return {**texts, "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows())}


def rows() -> list[dict[str, str]]:
    """Return sums of two numbers, all different and the same ones each time: question and answer."""
    numbers = range(1, LARGEST + 1)
    pairs = random.Random(0).sample([(a, b) for a in numbers for b in numbers], ROWS)
    return [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in pairs]
