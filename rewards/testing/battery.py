r"""A battery of cheats: does a reward pay the right answer and nothing else? Runs before training and in any pytest.

    def test_my_reward_cannot_be_fooled():
        rows = [{"prompt": "What is 6 * 7?", "answer": "42"}, {"prompt": "What is 2 + 2?", "answer": "4"}]
        check_rewards(rows, my_reward, render_gold=lambda row: f"<answer>{row['answer']}</answer>").assert_ok()

`check_rewards` writes the completion that should win (`render_gold`) for every row, and some forty completions that
must not win: nothing, the prompt, every number from 0 to 1000, several answers, broken or stuffed tags, another row's
gold. The report says how often the gold does not score (false negatives), how often a cheat does (gameability), and
shows the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..completion import completion_text
from ..facts import Reward
from .cheats import Cheat, all_cheats

Row = Mapping[str, Any]
_TOLERANCE = 1e-6
_SHOWN_CHARS = 72


@dataclass(frozen=True)
class Finding:
    """One completion that was paid wrongly, or a gold that was not paid."""

    check: str
    row: int
    score: float | None
    top: float
    text: str


@dataclass(frozen=True)
class Line:
    """The result of one check over all rows."""

    check: str
    what: str
    must_win: bool
    tried: int
    wrong: int
    mean_score: float


@dataclass(frozen=True)
class Report:
    """The results of the battery. `table()` is the text to show; `ok` says whether the reward is fit to train on."""

    lines: tuple[Line, ...]
    findings: tuple[Finding, ...]
    unusable_rows: int
    rows: int
    top: float

    @property
    def false_negative_rate(self) -> float:
        """Share of right completions that do not earn the top score."""
        return _share(line for line in self.lines if line.must_win)

    @property
    def gameability_rate(self) -> float:
        """Share of cheats that earn the top score."""
        return _share(line for line in self.lines if not line.must_win)

    @property
    def ok(self) -> bool:
        """Whether every gold scores and no cheat does, on at least one usable row."""
        return not self.findings and self.unusable_rows < self.rows

    @property
    def gold_scores(self) -> bool:
        """Whether every rendered gold earns the top score; without that there is nothing to train on."""
        gold = [line for line in self.lines if line.check == "gold"]
        return bool(gold) and all(line.tried > 0 and line.wrong == 0 for line in gold)

    def table(self, most_findings: int = 8) -> str:
        """Return the report as text: one line per check, the rates, and the offending texts."""
        width = max(len(line.check) for line in self.lines)
        rows = [f"{'check':<{width}}  {'wants':<5}  {'tried':>5}  {'wrong':>5}  {'mean':>6}  what"]
        for line in self.lines:
            if not line.tried:
                continue
            wants = "top" if line.must_win else "less"
            mark = "  <-- " if line.wrong else "  "
            rows.append(
                f"{line.check:<{width}}  {wants:<5}  {line.tried:>5}  {line.wrong:>5}  {line.mean_score:>6.3f}"
                f"{mark}{line.what}"
            )
        if unused := [line.check for line in self.lines if not line.tried]:
            rows.append(f"not applicable to these rows: {', '.join(unused)}")
        rows.append(
            f"top score {self.top:g}; false negatives {self.false_negative_rate:.1%}, gameability "
            f"{self.gameability_rate:.1%} over {self.rows} rows ({self.unusable_rows} with an unusable gold)"
        )
        for finding in self.findings[:most_findings]:
            rows.append(
                f"  {finding.check}, row {finding.row}: score {_shown(finding.score)} of {finding.top:g}: "
                f"{_clip(finding.text)}"
            )
        if len(self.findings) > most_findings:
            rows.append(f"  … and {len(self.findings) - most_findings} more")
        return "\n".join(rows)

    def assert_ok(self) -> None:
        """Raise AssertionError with the table unless every gold scores and no cheat does."""
        if not self.ok:
            raise AssertionError("the reward is not fit to train on\n" + self.table())


def check_rewards(
    rows: Sequence[Row],
    score: Reward,
    *,
    render_gold: Callable[[Row], str],
    render_answer: Callable[[Row, str], str] | None = None,
    answer_column: str = "answer",
    top: float | None = None,
    chat: bool = False,
    skip: Sequence[str] = (),
    cheats: Sequence[Cheat] = (),
) -> Report:
    """Score the right completion and the battery of cheats on every row.

    Args:
        rows: dataset rows as TRL passes them: `prompt` and the columns the reward reads. A few dozen are enough.
        score: the reward, or the weighted sum a recipe trains with (TRL's signature).
        render_gold: writes the completion that ought to earn the top score for a row.
        render_answer: writes the same completion with another answer in its place, for the cheats that need the form
            (a list of numbers, several answers). None asks `render_gold` with a changed row, or replaces the text.
        answer_column: the column whose text stands in the completion: `answer`, or a worked solution's column.
        top: the score the gold must earn; None takes the highest score any gold earned (which must be above 0).
        chat: pass completions as chat messages, as TRL does for chat prompts.
        skip: names of checks that do not apply: where only the first line counts, `gold, then other` is no cheat.
        cheats: checks of your own, in addition.

    Returns:
        The report. Rows whose gold the reward calls unusable (None) are counted and left out.

    Raises:
        ValueError: no rows, or `skip` names an unknown check.

    >>> from rewards import accuracy_reward
    >>> rows = [{"prompt": "6 * 7?", "answer": "42"}, {"prompt": "2 + 2?", "answer": "4"}]
    >>> report = check_rewards(rows, accuracy_reward, render_gold=lambda row: f"<answer>{row['answer']}</answer>")
    >>> report.ok, report.false_negative_rate, report.gameability_rate
    (True, 0.0, 0.0)
    >>> def contains(completions, answer, **kwargs):
    ...     return [float(gold in text) for text, gold in zip(completions, answer)]
    >>> check_rewards(rows, contains, render_gold=lambda row: row["answer"]).gameability_rate > 0.2
    True
    """
    if not rows:
        raise ValueError("check_rewards: no rows to check on; pass some rows of the dataset you will train on")
    battery = [*all_cheats(render_gold, render_answer, answer_column), *cheats]
    unknown = set(skip) - {cheat.name for cheat in battery}
    if unknown:
        raise ValueError(f"check_rewards: skip names {sorted(unknown)}; the checks are {[c.name for c in battery]}")
    golds = score_rows(score, rows, [render_gold(row) for row in rows], chat)
    usable = [index for index, value in enumerate(golds) if value is not None]
    best = top if top is not None else max((value for value in golds if value is not None), default=0.0)
    lines: list[Line] = []
    findings: list[Finding] = []
    for cheat in battery:
        if cheat.name in skip:
            continue
        texts = [(index, cheat.write(rows[index], rows)) for index in usable]
        tries = [(index, text) for index, text in texts if text is not None]
        values = score_rows(score, [rows[index] for index, _ in tries], [text for _, text in tries], chat)
        wrong = 0
        for (index, text), value in zip(tries, values, strict=True):
            wins = value is not None and value >= best - _TOLERANCE and best > 0
            if wins != cheat.must_win:
                wrong += 1
                findings.append(Finding(cheat.name, index, value, best, text))
        mean = sum(value or 0.0 for value in values) / max(1, len(values))
        lines.append(Line(cheat.name, cheat.what, cheat.must_win, len(tries), wrong, mean))
    findings.sort(key=lambda finding: finding.check != "gold")
    return Report(tuple(lines), tuple(findings), len(rows) - len(usable), len(rows), best)


def score_rows(score: Reward, rows: Sequence[Row], texts: Sequence[str], chat: bool) -> list[float | None]:
    """Score one text per row as TRL calls a reward: one list per column, prompts and completions among them."""
    if not rows:
        return []
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts)
    ids = [list(text.encode()[:4096]) for text in texts]  # bytes as tokens: enough for the length rewards
    values = score(
        prompts=[row.get("prompt", "") for row in rows], completions=completions, completion_ids=ids, **columns
    )
    if len(values) != len(texts):
        raise ValueError(f"the reward returned {len(values)} values for {len(texts)} completions")
    return [None if value is None or value != value else float(value) for value in values]


def _share(lines: Any) -> float:
    counted = [(line.wrong, line.tried) for line in lines]
    return sum(wrong for wrong, _ in counted) / max(1, sum(tried for _, tried in counted))


def _shown(score: float | None) -> str:
    return "None" if score is None else f"{score:g}"


def _clip(text: str) -> str:
    shown = repr(completion_text(text))
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[: _SHOWN_CHARS - 1]}… ({len(text)} characters)"
