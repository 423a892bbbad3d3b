"""The charts of a run, drawn by matplotlib: as SVG for the report and as one PNG for the model card."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_lite.report.evidence import Evidence
from grpo_lite.report.expected import measured
from grpo_lite.report.scores import columns_of, distinct_scores, gain_text, own_gain

# Every colour of a chart. On a page each becomes a CSS variable, so that it follows the reader's light or dark scheme.
COLOURS = ("#2f6fdb", "#d9622b", "#2a9d6f", "#8a56c8", "#b8891f", "#c2417c")
_COLUMN_COLOURS = {"base": "#8b93a3", "warm": COLOURS[1], "trained": COLOURS[0]}
_GRID, _TEXT, _INK, _PAPER = "#e6e8ec", "#5b6270", "#20242c", "#ffffff"
_VARIABLES = {**{c: f"var(--line{i})" for i, c in enumerate(COLOURS)}, _GRID: "var(--grid)", _TEXT: "var(--soft)"}
_SIZE_INCHES = (3.8, 2.25)
_AXES = (0.135, 0.14, 0.84, 0.81)  # left, bottom, width, height, as fractions of the figure
_STYLES = ("-", "--", ":")  # of lines beyond the last colour
_SMOOTH_FROM = 24  # steps from which a bold moving average is drawn over the raw line


@dataclass(frozen=True)
class Line:
    """One named line of a chart; `low` and `high` make a band, `slot` is the index of its colour (None: in order)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    slot: int | None = None


@dataclass(frozen=True)
class Chart:
    """One chart: its lines, and a note on how to read it."""

    key: str
    title: str
    note: str
    lines: Sequence[Line] = field(default=())
    top: float | None = None  # of the y axis; None: by the data


def charts(e: Evidence) -> list[Chart]:
    """Return the charts for which a run has at least two values, the most important first."""
    parts = [_line(e, f"rewards/{part}/mean", part) for part in e.parts] if len(e.parts) > 1 else []
    held = [_line(e, "heldout/lenient", "lenient"), _line(e, "heldout/strict", "strict")]
    lengths = _line(e, "completions/mean_length", "mean")
    warmup = [_plain(e.warmup_steps, "loss", "training"), _plain(e.warmup_steps, "heldout_loss", "rows not trained on")]
    candidates = [
        Chart("reward", "Reward", "mean of the batch; the band is one standard deviation", [_reward(e)]),
        Chart("heldout", "Held-out score", "greedy, on prompts never trained on", held, 1.0),
        Chart("warmup", "Loss of the warm-up", "nats a completion token, over the warm-up's steps", warmup),
        Chart("parts", "Reward parts", "mean of each reward, before weights", parts),
        Chart(
            "groups",
            "Groups without a signal",
            "share of groups with equal rewards; share of completions cut off",
            [_line(e, "frac_reward_zero_std", "equal rewards"), _line(e, "completions/clipped_ratio", "cut off")],
            1.0,
        ),
        Chart("length", "Completion length", "tokens; the band is shortest to longest", [_banded(e, lengths)]),
        Chart("entropy", "Entropy", "nats a token; near 0 means no exploration is left", [_line(e, "entropy", "")]),
        Chart("kl", f"KL to the {e.recipe.reference}", "nats a token", [_line(e, "kl", "")]),
        Chart("grad_norm", "Gradient norm", "before clipping", [_line(e, "grad_norm", "")]),
        Chart("speed", "Tokens per second", "prompt and completion tokens over the whole step", [_speed(e)]),
        Chart("memory", "Peak memory", "GiB so far", [_line(e, "memory/peak_gib", "")]),
    ]
    result = []
    for chart in [*_score_chart(e), *candidates]:
        lines = [line for line in chart.lines if len(line.y) >= 2]
        if lines:
            expected = _expected_band(e, chart.key, lines[0].x[-1])
            note = chart.note + ("; dashed: what the recipe expects, with its band" if expected else "")
            result.append(Chart(chart.key, chart.title, note, [*lines, *expected], chart.top))
    return result


def _expected_band(e: Evidence, key: str, last: float) -> list[Line]:
    """Return the band of the recipe's `expected:` for the chart that shows its metric, up to the run's last step."""
    expected = e.recipe.expected
    if expected is None or key != _chart_of(e, expected.metric):
        return []
    steps = sorted({*(float(step) for step, _, _ in expected.points if step <= last or expected.of_scores), last})
    bands = [(step, band) for step in steps if (band := expected.band_at(int(step))) is not None]
    low, high = [band[0] for _, band in bands], [band[1] for _, band in bands]
    middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
    return [Line("expected", [step for step, _ in bands], middle, low, high, slot=len(COLOURS) + 4)] if bands else []


def _chart_of(e: Evidence, metric: str) -> str:
    if metric.startswith("rewards/"):
        return "parts" if len(e.parts) > 1 else "reward"
    return "heldout" if metric.startswith("heldout/") else "score" if metric.startswith("score/") else "reward"


def _score_chart(e: Evidence) -> list[Chart]:
    """Return the chart of a published score: the run's own before and after, where the recipe expects one."""
    expected = e.recipe.expected
    if expected is None or not expected.of_scores:
        return []
    values = measured(e, expected)
    steps, rates, margins = [v[0] for v in values], [v[1] for v in values], [v[2] for v in values]
    low, high = ([r + sign * m for r, m in zip(rates, margins, strict=True)] for sign in (-1, 1))
    line = Line("base, trained", steps, rates, list(low), list(high))
    return [Chart("score", "Score against the published one", "greedy, on held-out prompts", [line], 1.0)]


def _points(records: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[float, ...]]:
    rows = [(record["step"], *(record.get(key) for key in keys)) for record in records]
    return [row for row in rows if all(isinstance(v, int | float) and math.isfinite(v) for v in row)]


def _line(e: Evidence, key: str, name: str) -> Line:
    return _plain(e.steps, key, name)


def _plain(records: Sequence[Mapping[str, Any]], key: str, name: str) -> Line:
    points = _points(records, key)
    return Line(name, [x for x, _ in points], [y for _, y in points])


def _reward(e: Evidence) -> Line:
    points = _points(e.steps, "reward", "reward_std")
    low, high = [r - s for _, r, s in points], [r + s for _, r, s in points]
    return Line("reward", [step for step, _, _ in points], [r for _, r, _ in points], low, high)


def _banded(e: Evidence, line: Line) -> Line:
    points = _points(e.steps, "completions/mean_length", "completions/min_length", "completions/max_length")
    return Line("length", line.x, line.y, [p[2] for p in points], [p[3] for p in points])


def _speed(e: Evidence) -> Line:
    points = _points(e.steps, "num_tokens", "step_time")
    rates = [(b[0], (b[1] - a[1]) / b[2]) for a, b in itertools.pairwise(points) if b[2] > 0]
    rates = [(step, rate) for step, rate in rates if rate > 0]  # a resume may count from 0 again
    return Line("", [step for step, _ in rates], [rate for _, rate in rates])


def svg(chart: Chart) -> str:
    """Return a chart as an inline SVG whose colours are CSS variables; `placement` says where its axes are."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_style(), "svg.hashsalt": chart.key}), _any_script():
        figure = Figure(figsize=_SIZE_INCHES)
        draw(figure.add_axes(_AXES), chart)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # the same in every chart of a page
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', text, count=1
    )
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text)


def placement(chart: Chart) -> dict[str, Any]:
    """Return what the page needs to show the values under the pointer: the axes' place, their limits, the values."""
    low, high = _span(chart)
    return {
        "left": _AXES[0], "width": _AXES[2], "low": low, "high": high,
        "lines": [
            {"name": line.name, "x": list(line.x[:: _stride(line)]), "y": [_short(y) for y in line.y[:: _stride(line)]]}
            for line in chart.lines
        ],
    }  # fmt: skip


def drawable(chart: Chart) -> dict[str, Any]:
    """Return a chart as data for a page that draws it itself: `placement`, its words, bands and the y axis' top."""
    place = placement(chart)
    for line, data in zip(chart.lines, place["lines"], strict=True):
        stride = _stride(line)
        data |= {"low": [_short(y) for y in line.low[::stride]], "high": [_short(y) for y in line.high[::stride]]}
        data["slot"] = line.slot
    return {"key": chart.key, "title": chart.title, "note": chart.note, "top": chart.top, **place}


def _span(chart: Chart) -> tuple[float, float]:
    """Return the steps at both ends of the axis, with a small margin around the first and the last mark."""
    xs = [x for line in chart.lines for x in line.x]
    margin = 0.02 * (max(xs) - min(xs)) or 0.5
    return min(xs) - margin, max(xs) + margin


def _stride(line: Line, most: int = 600) -> int:
    return -(-len(line.x) // most)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def write_png(run_charts: Sequence[Chart], path: Path, title: str = "") -> None:
    """Draw the charts as one PNG, three in a row, for the model card; a run without charts gets no file."""
    if not run_charts:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(3, len(run_charts))
    rows = math.ceil(len(run_charts) / columns)
    with rc_context(_style()), _any_script():
        width, height = 4.4 * columns, 2.75 * rows + 0.45  # inches; placed by hand, as automatic layout takes a second
        figure = Figure(figsize=(width, height), facecolor=_PAPER)
        figure.subplots_adjust(
            left=0.6 / width,
            right=1 - 0.2 / width,
            bottom=0.35 / height,
            top=1 - 0.75 / height,
            wspace=0.16,
            hspace=0.3,
        )
        if title:
            place = {"x": 0.2 / width, "y": 1 - 0.15 / height, "ha": "left", "va": "top"}
            title = _title(title, width)
            figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK, **place)
        for index, chart in enumerate(run_charts):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(chart.title, loc="left", fontsize=9.5, fontweight="bold", color=_INK)
            draw(axes, chart)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _title(text: str, width: float) -> str:
    """Return a title that fits `width` inches at 11 points: about 10.8 bold letters an inch."""
    return textwrap.shorten(_drawable(text), int(10.2 * width), placeholder=" …")


def write_scores_png(scores: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Draw the held-out scores of base, warm and trained model with their intervals; an unscored run gets no file.

    Args:
        scores: metrics.json.
        path: of the PNG.
        title: a line above.
    """
    blocks = list(distinct_scores(scores))
    blocks += [
        (f"{further}: {name}", part)
        for further, its_scores in scores.get("also", {}).items()
        for name, part in distinct_scores(its_scores)
    ]
    if not blocks:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = sum(1.3 + len(columns_of(part)) for _, part in blocks)
    with rc_context({**_style(), "axes.grid.axis": "x"}), _any_script():
        width, height = 8.8, 0.26 * rows + 0.95  # inches
        figure = Figure(figsize=(width, height), facecolor=_PAPER)
        axes = figure.add_axes((0.09, 0.4 / height, 0.48, 1 - 0.95 / height))
        if title:
            text = _title(title, width)
            figure.text(0.02, 1 - 0.15 / height, text, fontsize=11, fontweight="bold", color=_INK, va="top")
        y = 0.0
        for name, part in blocks:
            y = _draw_block(axes, y, f"{name}, {part['base']['n']} prompts", part)
        axes.set(xlim=(0, 1), ylim=(y, -0.9), yticks=[])
        figure.text(0.98, 0.12 / height, "bars and brackets: 95 % intervals", color=_TEXT, fontsize=8.5, ha="right")
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def _draw_block(axes: Any, y: float, name: str, part: Mapping[str, Any]) -> float:
    """Draw a score's columns, one row each from y downward, and return where the next block begins."""
    left, right = axes.get_yaxis_transform(), {"va": "center", "transform": axes.get_yaxis_transform()}
    axes.text(-0.145, y - 0.1, _drawable(name), fontweight="bold", color=_INK, va="center", transform=left)
    gains = {
        "warm": ("warm-up", part.get("warmup")),
        "trained": ("GRPO alone" if "grpo" in part else "gain", own_gain(part)),
    }
    for column in columns_of(part):
        y += 1
        rate, colour = part[column], _COLUMN_COLOURS[column]
        axes.plot([rate["low"], rate["high"]], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot([rate["rate"]], [y], "o", color=colour, markersize=7, clip_on=False)
        axes.text(-0.02, y, column, ha="right", color=_TEXT, **right)
        stage, change = gains.get(column, ("", None))
        gain = f"   {stage} {gain_text(change)}" if change else ""
        axes.text(1.03, y, f"{rate['rate']:.1%}{gain}", color=_INK if column == "trained" else _TEXT, **right)
    return y + 1.3


def draw(axes: Any, chart: Chart) -> None:
    """Draw a chart into matplotlib axes."""
    named = len(chart.lines) > 1 or chart.lines[0].slot is not None
    for order, line in enumerate(chart.lines):
        i = order if line.slot is None else line.slot
        colour, style = COLOURS[i % len(COLOURS)], _STYLES[i // len(COLOURS) % len(_STYLES)]
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
        smooth = len(line.y) >= _SMOOTH_FROM
        name = f" {line.name}" if line.name.startswith("_") else line.name  # matplotlib leaves `_x` out of legends
        label = name if named else None
        marker: Mapping[str, Any] = {"marker": "o", "markersize": 3.2} if len(line.y) <= 16 else {}
        axes.plot(
            line.x, line.y, color=colour, linewidth=0.9 if smooth else 1.7, alpha=0.35 if smooth else 1,
            linestyle=style, label=None if smooth else label, **marker,
        )  # fmt: skip
        if smooth:
            averages = moving_average(line.y, max(5, len(line.y) // 20))
            axes.plot(line.x, averages, color=colour, linewidth=1.9, linestyle=style, label=label)
    if chart.top is not None:
        axes.set_ylim(-0.03 * chart.top, 1.05 * chart.top)
    axes.set_xlim(*_span(chart))
    axes.margins(y=0.08)
    if named:
        axes.legend(loc="best", frameon=False, fontsize=9.5, labelcolor=_TEXT, handlelength=1.2, borderaxespad=0.2)


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Return at each place the mean of the last `width` values (fewer at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """Let matplotlib measure names in scripts that its font lacks: the page's reader has fonts for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _drawable(text: str) -> str:
    """Return a text without the characters that matplotlib's font cannot draw in a PNG."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c for c in text if ord(c) in known).strip(" :")


def _style() -> Any:
    return {
        "svg.fonttype": "none", "text.parse_math": False,
        "font.family": "sans-serif", "font.size": 9.5, "text.color": _TEXT,
        "axes.edgecolor": _GRID, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "grid.color": _GRID,
        "grid.linewidth": 0.8, "xtick.color": _TEXT, "ytick.color": _TEXT, "xtick.major.size": 0, "ytick.major.size": 0,
        "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "axes.titlepad": 6,
        "lines.solid_capstyle": "round", "axes.facecolor": "none",
    }  # fmt: skip
