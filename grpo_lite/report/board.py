"""A run's state in a few lines with sparklines, for the live view, notebooks and `watch`; each stage has its board."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.evidence import Evidence, Finding
from grpo_lite.report.expected import band_text, standing
from grpo_lite.report.turns import turns_of
from grpo_lite.screen import printable
from grpo_lite.units import duration, size, time_left, whole_seconds

MOST_FINDINGS = 3  # on a board: those that stand first in the doctor's table
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Progress:
    """What the boards of both stages share: steps, speed, time left, findings.

    Args:
        recipe: of the run.
        total: number of steps; 0: not known yet.
        steps: the stage's records of metrics.jsonl.
        rows: the latest completions; empty in the warm-up, which generates none.
        findings: the doctor's, as they are now.
        seconds: since this process started to train.
        begun_at: the step that it started from; above 0 in a resumed run.
    """

    recipe: Recipe
    total: int = 0
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    rows: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Finding] = ()
    seconds: float = 0.0
    begun_at: int = 0

    counted = "step"  # what the board calls a step
    logged: ClassVar[str]  # the metric that every record of the stage has

    @property
    def step(self) -> int:
        """The last logged step."""
        return int(self.steps[-1]["step"]) if self.steps else self.begun_at

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the stage's last step; None before the first step."""
        done = self.step - self.begun_at
        return self.seconds / done * (self.total - self.step) if done > 0 and self.total else None

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt and completion tokens a second over the last ten steps."""
        recent = [r for r in self.steps[-11:] if r.get("num_tokens") is not None and r.get("step_time")]
        if len(recent) < 2 or recent[-1]["num_tokens"] <= recent[0]["num_tokens"]:
            return None
        return float((recent[-1]["num_tokens"] - recent[0]["num_tokens"]) / sum(r["step_time"] for r in recent[1:]))

    def series(self, key: str) -> list[float]:
        """Return a metric's finite values."""
        values = [record.get(key) for record in self.steps]
        return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]

    def count(self) -> str:
        """Return the step out of all, as `step 3/60`."""
        return f"{self.counted} {self.step}/{self.total or '?'}"

    def line(self) -> str:
        """Return the run's state as one line, for logs; there is at least one step."""
        raise NotImplementedError

    def table(self) -> list[tuple[str, str, str]]:
        """Return the board's rows: name, latest value, sparkline."""
        raise NotImplementedError

    def foot(self) -> str:
        """Return speed and memory."""
        memory, speed = self.series("memory/peak_gib"), self.tokens_per_second
        pieces = [f"{speed:.0f} tokens/s" if speed else "", f"peak {size(memory[-1] * 2**30)}" if memory else ""]
        return " · ".join(piece for piece in pieces if piece)

    def sample(self, width: int = 100) -> list[str]:
        """Return a prompt with its best and worst completion and the reward of each part."""
        return describe_sample(self.rows, width).splitlines() if self.rows else []


@dataclass
class Board(Progress):
    """The state of GRPO."""

    logged = "reward"

    def line(self) -> str:
        """Return the run's state as one line, for logs."""
        last = self.steps[-1]
        truncated, held, speed = (
            last.get("completions/clipped_ratio"),
            last.get("heldout/lenient"),
            self.tokens_per_second,
        )
        parts = [(name, last.get(f"rewards/{name}/mean")) for name in self.recipe.reward_names]
        memory = last.get("memory/peak_gib")
        left = self.seconds_left
        pieces = [
            self.count(),
            "no reward"  # none of the step's groups could be scored
            if last["reward"] is None
            else f"reward {last['reward']:.3f} ± {last.get('reward_std') or 0.0:.3f}",
            band_text(Evidence(self.recipe, self.steps)) or "",
            *(f"{name} {value:.3f}" for name, value in parts if len(parts) > 1 and value is not None),
            f"held-out {held:.1%}" if held is not None else "",
            f"length {last.get('completions/mean_length') or 0.0:.0f} tokens",
            f"truncated {truncated:.0%}" if truncated else "",
            *self._tools(last),
            f"{speed:.0f} tokens/s" if speed else "",
            time_left(left) if left else "",
            f"peak {size(memory * 2**30)}" if memory else "",
        ]
        return " · ".join(piece for piece in pieces if piece)

    def _tools(self, last: Mapping[str, Any]) -> list[str]:
        """Return calls, failed calls and turns an episode; empty without tools."""
        each = last.get("tools/call_frequency")
        if each is None:
            return []
        failed = last.get("tools/failure_frequency") or 0.0
        turns = [sum(message.get("role") != "tool" for message in row.get("turns") or [row]) for row in self.rows]
        return [
            f"calls {each:.1f}" + (f" ({failed:.0%} failed)" if failed else ""),
            f"turns {sum(turns) / len(turns):.1f}" if turns else "",
        ]

    def table(self) -> list[tuple[str, str, str]]:
        """Return the board's rows: name, latest value, sparkline."""
        names = [("reward", "reward")]
        if len(self.recipe.rewards) > 1:
            names += [(name, f"rewards/{name}/mean") for name in self.recipe.reward_names]
        rows = [(name, f"{v[-1]:.3f}", sparkline(v)) for name, key in names if (v := self.series(key))]
        if found := standing(Evidence(self.recipe, self.steps)):
            at = f" at step {found.step}" if found.step < self.step else ""  # the band has ended
            rows.append(("expected", f"{found.low:.2f} to {found.high:.2f}", found.place + at))
        if held := self.series("heldout/lenient"):
            rows.append(("held-out", f"{held[-1]:.1%}", sparkline(held)))
        if lengths := self.series("completions/mean_length"):
            cut = self.series("completions/clipped_ratio")
            note = f", {cut[-1]:.0%} cut off" if cut and cut[-1] else ""
            rows.append(("length", f"{lengths[-1]:.0f} tokens{note}", sparkline(lengths)))
        if calls := self.series("tools/call_frequency"):
            shown = ", ".join(piece.removeprefix("calls ") for piece in self._tools(self.steps[-1]) if piece)
            rows.append(("calls", shown, sparkline(calls)))
        if equal := self.series("frac_reward_zero_std"):
            rows.append(("equal groups", f"{equal[-1]:.0%}", sparkline(equal)))
        if kl := self.series("kl"):
            rows.append(("kl", f"{kl[-1]:.3g}", sparkline(kl)))
        return rows


@dataclass(frozen=True)
class GRPOAhead:
    """What follows the warm-up.

    Args:
        steps: of GRPO.
        seconds: they take, by the last probe of this very recipe; None: not probed.
        measured_at: date and time of the probe, UTC.
    """

    steps: int
    seconds: float | None = None
    measured_at: str = ""

    def sentence(self) -> str:
        """Return it as a piece of a line.

        >>> GRPOAhead(60, 180.0, "2026-11-02T10:20:30Z").sentence(), GRPOAhead(1).sentence()
        ('then GRPO: 60 steps (about 3 min 00 s, measured 2026-11-02)', 'then GRPO: 1 step')
        """
        steps = f"then GRPO: {self.steps} step{'s' * (self.steps != 1)}"
        return f"{steps} (about {duration(self.seconds)}, measured {self.measured_at[:10]})" if self.seconds else steps


@dataclass
class WarmupBoard(Progress):
    """The state of the warm-up: losses are means over completion tokens, in nats.

    Args:
        ahead: GRPO's share of the work; None: none follows, or it is not known.
    """

    ahead: GRPOAhead | None = None

    counted = "warm-up"
    logged = "loss"

    @property
    def seconds_left_in_all(self) -> float | None:
        """Estimated seconds to the last step of GRPO; None unless both stages' times are known."""
        left, after = self.seconds_left, self.ahead.seconds if self.ahead else None
        return None if left is None or after is None else left + after

    def line(self) -> str:
        last, speed, left = self.steps[-1], self.tokens_per_second, self.seconds_left
        loss, held = last.get("loss"), last.get("heldout_loss")
        accuracy, memory = last.get("mean_token_accuracy"), last.get("memory/peak_gib")
        pieces = [
            self.count(),
            f"loss {loss:.3f}" if loss is not None else "",
            f"held-out loss {held:.3f}" if held is not None else "",
            f"token accuracy {accuracy:.0%}" if accuracy is not None else "",
            f"{speed:.0f} tokens/s" if speed else "",
            f"peak {size(memory * 2**30)}" if memory else "",
            time_left(left) if left else "",
            self.ahead.sentence() if self.ahead else "",
        ]
        return " · ".join(piece for piece in pieces if piece)

    def table(self) -> list[tuple[str, str, str]]:
        names = [("loss", "loss", ".3f"), ("held-out loss", "heldout_loss", ".3f")]
        names += [("token accuracy", "mean_token_accuracy", ".0%"), ("entropy", "entropy", ".3f")]
        return [(name, format(v[-1], form), sparkline(v)) for name, key, form in names if (v := self.series(key))]

    def foot(self) -> str:
        total = self.seconds_left_in_all
        pieces = [
            super().foot(),
            self.ahead.sentence() if self.ahead else "",
            f"{time_left(total)} in both stages" if total else "",
        ]
        return " · ".join(piece for piece in pieces if piece)


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Return values as block characters, means of neighbours where there are more than `width`.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7]), sparkline([2.5, 2.5]), sparkline([])
    ('▁▂▃▄▅▆▇█', '▁▁', '')
    """
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def describe_sample(rows: Sequence[Mapping[str, Any]], width: int = 160) -> str:
    """Return the prompt whose rewards differ most, with its best and worst completion, as lines."""
    best, worst = _extremes(rows)
    pairs = [("best  ", best), ("worst ", worst)] if best["reward"] != worst["reward"] else [("all   ", best)]
    lines = [f"  prompt {_short(_text(best['prompt']), width, tail=True)}"]
    for name, row in pairs:
        parts = ", ".join(f"{part} {value:g}" for part, value in row["rewards"].items() if value is not None)
        shown = f" [{parts}]" if len(row["rewards"]) > 1 else ""
        reward = "no reward" if row["reward"] is None else f"{row['reward']:+.2f}"
        said = _episode(row["turns"], 2 * width) if row.get("turns") else _short(row["completion"], width)
        lines.append(f"  {name} ({reward}){shown} {said}")
    return "\n".join(lines)


def _episode(turns: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return an episode as one line: calls, results and what was said, the middle left out where it is long."""
    marks = {"call": "→ ", "result": "← ", "failed": "← "}
    parts = [
        f"{marks[kind]}{' '.join(text.split())}" if kind in marks else _short(text, width)
        for kind, text in turns_of(turns)
    ]
    line = printable(" ".join(parts))
    return line if len(line) <= width else f"{line[: width // 2]} … {line[-width // 2 :]}"


def _extremes(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the best and worst completion of the prompt whose rewards differ most: a step learns most from it.

    The later prompt wins a tie. If nothing has a reward, it is the last completion twice.
    """
    extremes: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for row in rows:
        if row["reward"] is not None:
            best, worst = extremes.get(key := repr(row["prompt"]), (row, row))
            extremes[key] = (max(best, row, key=_reward), min(worst, row, key=_reward))
    if not extremes:
        return rows[-1], rows[-1]
    return max(reversed(extremes.values()), key=lambda pair: _reward(pair[0]) - _reward(pair[1]))


def _reward(row: Mapping[str, Any]) -> float:
    return float(row["reward"])


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _short(text: str, width: int, tail: bool = False) -> str:
    shown = text if len(text) <= width else "…" + text[-width:] if tail else text[:width] + "…"
    return printable(json.dumps(shown, ensure_ascii=False))


def rendered(board: Progress, title: str) -> Any:
    """Return the board for rich: progress, sparklines, a sample, findings."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = board.seconds_left
    head = Text(board.count(), style="bold")
    head.append(f"   {whole_seconds(board.seconds)} elapsed", style="dim")
    head.append(f", {time_left(left)}" if left else "", style="dim")
    if budget := board.recipe.limits.max_minutes:
        head.append(f" · budget {duration(60 * budget)}", style="dim")
    table = Table.grid(padding=(0, 2))
    for name, value, spark in board.table():
        table.add_row(Text(name, style="dim"), Text(value, style="bold", justify="right"), Text(spark, style="cyan"))
    bar = Padding(ProgressBar(total=max(1, board.total), completed=board.step), 0)  # alone it ends without a newline
    parts: list[Any] = [head, bar, table]
    parts.append(Text(board.foot(), style="dim"))
    parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in board.sample()]
    parts += [Text(finding.line(), style="yellow") for finding in board.findings]
    return Panel(Group(*parts), title=Text(title, style="bold"), title_align="left", border_style="dim")
