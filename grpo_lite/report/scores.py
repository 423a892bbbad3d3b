"""The held-out scores as people read them: metrics.json -> columns, gains and the rows of a table.

A run with a warm-up has three columns: base, warm (the warm-up's adapter) and trained. Its gain is then GRPO's own,
warm -> trained, and the warm-up's gain stands beside it. Without a warm-up there are base and trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_lite.runs.run_dir import MERGED_MODELS, SCORE_COLUMNS

KINDS = {
    "lenient": "right answer",
    "strict": "right answer in the required form",
    "honest": "second, independent judge",
}
EPISODES = {
    "turns": "turns an episode",
    "calls": "calls an episode",
    "failed_calls": "failed calls an episode",
    "without_call": "episodes without a call",
}


def columns_of(values: Mapping[str, Any]) -> list[str]:
    """Return which columns a score has, in order."""
    return [name for name in SCORE_COLUMNS if name in values]


def own_gain(score: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the difference, test and verdict of a score that are GRPO's own: from warm where there was a warm-up."""
    change: Mapping[str, Any] = score.get("grpo", score)
    return change


def rates_text(values: Mapping[str, Any]) -> str:
    """Return a score's rates as `0.100 → 0.400 → 0.600`: base, warm after a warm-up, trained."""
    rates = (values[name] for name in columns_of(values))
    return " → ".join(f"{rate['rate'] if isinstance(rate, Mapping) else rate:.3f}" for rate in rates)


def table_rows(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of held-out scores as text.

    Returns:
        Rows with `name`, a cell for each of `base`, `warm` and `trained`, `difference` (GRPO's own) and `warmup` (the
        warm-up's gain). `warm` and `warmup` are empty without a warm-up.
    """
    rows = [_row(name, part) for name, part in named_scores(scores)]
    for name, rates in scores.get("pass_at_k", {}).items():
        start = "warm" if "warm" in rates else "base"
        cells = {column: f"{rates[column]:.1%}" for column in columns_of(rates)}
        gain = f"{_points(rates['trained'] - rates[start])} points"
        warmup = f"{_points(rates['warm'] - rates['base'])} points" if "warm" in rates else ""
        rows.append(_cells(f"{name}, sampled", **cells, difference=gain, warmup=warmup))
    for key, name in MERGED_MODELS.items():
        if merged := scores.get(key):
            rows.append(_cells(name, trained=_rate(merged["lenient"])))
    if cut := scores.get("truncated"):
        rows.append(_cells("cut off by the cap", **{column: f"{cut[column]:.1%}" for column in columns_of(cut)}))
    if episodes := scores.get("episodes"):
        for key, name in EPISODES.items():
            cells = {column: _episode_cell(key, episodes[column][key]) for column in columns_of(episodes)}
            rows.append(_cells(name, **cells))
    return rows


def episodes_text(scores: Mapping[str, Any]) -> str:
    """Return what the held-out episodes were like in one line, base first; empty where completions are no episodes."""
    episodes = scores.get("episodes")
    if not episodes:
        return ""
    parts = []
    for key, name in EPISODES.items():
        means = (_episode_cell(key, episodes[column][key]) for column in columns_of(episodes))
        parts.append(f"{name} {' → '.join(means)}")
    return ", ".join(parts)


def named_scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the greedy scores with their names: all of the held-out rows, then those of each further set."""
    for kind, name in KINDS.items():
        if kind in scores:
            yield name, scores[kind]
    for further, its_scores in scores.get("also", {}).items():
        for name, part in distinct_scores(its_scores):
            yield f"{further}: {name}", part


def distinct_scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the greedy scores of one set of rows with their names, without those whose rates repeat earlier ones."""
    seen = []
    for kind, name in KINDS.items():
        part = scores.get(kind)
        rates = [part[column]["rate"] for column in columns_of(part)] if part else []
        if part and rates not in seen:
            seen.append(rates)
            yield name, part


def gain_text(change: Mapping[str, Any]) -> str:
    """Return a difference in percentage points with its interval."""
    d = change["difference"]
    return f"{_points(d['difference'])} points ({_points(d['low'])} to {_points(d['high'])})"


def _row(name: str, part: Mapping[str, Any]) -> dict[str, str]:
    cells = {column: _rate(part[column]) for column in columns_of(part)}
    warmup = gain_text(part["warmup"]) if "warmup" in part else ""
    return _cells(name, **cells, difference=gain_text(own_gain(part)), warmup=warmup)


def _cells(name: str, **cells: str) -> dict[str, str]:
    return {"name": name, **dict.fromkeys((*SCORE_COLUMNS, "difference", "warmup"), ""), **cells}


def _episode_cell(key: str, mean: float) -> str:
    return f"{mean:.0%}" if key == "without_call" else f"{mean:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"
