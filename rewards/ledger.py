"""The judge's memory on disk: verdicts that need not be asked again, and what has been spent, in one SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .waiting import BudgetSpent

BUDGET_KEYS = ("calls", "tokens", "usd")

_TABLES = """
CREATE TABLE IF NOT EXISTS verdicts (request TEXT PRIMARY KEY, score INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, calls INTEGER NOT NULL, tokens INTEGER NOT NULL,
    usd REAL NOT NULL);
"""


@dataclass
class Spent:
    """What one judge has cost so far, over all runs that share the file."""

    calls: int = 0
    tokens: int = 0
    usd: float = 0.0


class Ledger:
    """Verdicts and spending of one judge. A context manager; several processes may use the file at once.

    Args:
        file: where it is kept; None: `judge.sqlite` in the cache folder of grpo_lite.
        judge: what the spending is counted by: address, model and rubric.
        budget: most calls, tokens and US dollars.
    """

    def __init__(self, file: Path | None, judge: Mapping[str, Any], budget: Mapping[str, float]) -> None:
        self.file = file or default_file()
        self.judge, self.budget = digest(judge), budget

    def __enter__(self) -> Ledger:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.file, timeout=30.0, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last verdicts, no more
            self._connection.executescript(_TABLES)
            self._connection.execute("INSERT OR IGNORE INTO spent VALUES (?, 0, 0, 0.0)", (self.judge,))
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"judge_reward: its cache {self.file} cannot be used ({error}). Remove that file, or give `cache` "
                "another path."
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def known(self, request: str) -> int | None:
        """Return the score of a request that was answered before, by its digest; None for a new one."""
        row = self._connection.execute("SELECT score FROM verdicts WHERE request = ?", (request,)).fetchone()
        return None if row is None else int(row[0])

    def keep(self, request: str, score: int, reason: str) -> None:
        """Keep the verdict on a request, by its digest."""
        self._connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (request, score, reason))

    def spent(self) -> Spent:
        """Return what this judge has cost so far."""
        query = "SELECT calls, tokens, usd FROM spent WHERE judge = ?"
        return Spent(*self._connection.execute(query, (self.judge,)).fetchone())

    def begin_call(self) -> None:
        """Count a call before it is made, so that a call that is never answered counts too.

        Raises:
            BudgetSpent: nothing is left for it.
        """
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            spent = self.spent()
            for key in BUDGET_KEYS:
                limit = self.budget.get(key)
                if limit is not None and getattr(spent, key) >= limit:
                    raise BudgetSpent(
                        f"the judge's budget is spent: {getattr(spent, key):g} {key} of {limit:g}, counted over all "
                        f"runs in {self.file}. Raise limits.judge_budget.{key} to continue"
                    )
            self._connection.execute("UPDATE spent SET calls = calls + 1 WHERE judge = ?", (self.judge,))
        finally:
            self._connection.execute("COMMIT")

    def add(self, tokens: int, usd: float) -> None:
        """Count what a call has cost."""
        query = "UPDATE spent SET tokens = tokens + ?, usd = usd + ? WHERE judge = ?"
        self._connection.execute(query, (tokens, usd, self.judge))


def default_file() -> Path:
    """Return where verdicts are kept if the recipe names no file."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("GRPO_LITE_CACHE") or Path(home, "grpo_lite"), "judge.sqlite")


def digest(value: Mapping[str, Any]) -> str:
    """Return what names a request or a judge in the file."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
