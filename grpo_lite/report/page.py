"""report.html and compare.html: one self-contained page each, with no network access and only its own script.

run's files -> facts.py + curves.py (charts) -> html/*.html (Jinja2, all escaped) -> one file
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from grpo_lite.commands import either, hint
from grpo_lite.errors import RunDirError
from grpo_lite.files.atomic import write_atomic
from grpo_lite.recipe.recipe import values_by_key, without_paths
from grpo_lite.report.curves import Chart, Line, charts, placement, svg, write_png, write_scores_png
from grpo_lite.report.doctor import OnceUntilItChanges, examine, nothing_found, state_finding, stated_findings
from grpo_lite.report.evidence import Finding
from grpo_lite.report.expected import standing_line
from grpo_lite.report.facts import (
    RunPage,
    completion_rows,
    for_script,
    headline,
    held_out_rows,
    not_measured,
    phases,
    read_page,
    stated_rows,
    tiles,
    versions,
)
from grpo_lite.report.scores import table_rows
from grpo_lite.runs.run_dir import SCORE_COLUMNS, RunDir, dump_recipe
from grpo_lite.screen import Show
from grpo_lite.units import duration, size

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).resolve().parent / "html"


def write_report(run: RunDir) -> Path:
    """Write a run's report.html, curves.png and, once it is scored, scores.png; return the page's path.

    Raises:
        RunDirError: the folder is not a run.
    """
    page = read_page(run)
    run_charts = charts(page.evidence)
    title = f"{page.name}: {page.recipe.description}"
    write_png(run_charts, run.path / "curves.png", title)
    write_scores_png(page.scores, run.path / "scores.png", title)
    path = run.path / "report.html"
    write_atomic(path, _report(run, page, run_charts))
    return path


def report_html(run: RunDir) -> str:
    """Return the text of a run's report as its files are now; nothing is written.

    Raises:
        RunDirError: the folder is not a run.
    """
    page = read_page(run)
    return _report(run, page, charts(page.evidence))


def _report(run: RunDir, page: RunPage, run_charts: Sequence[Chart]) -> str:
    (rows, count), (held_out, held_out_count) = completion_rows(run), held_out_rows(run)
    data = {"charts": {chart.key: placement(chart) for chart in run_charts}, "completions": rows, "heldout": held_out}
    recipe = without_paths(page.recipe)
    html = _template("report.html").render(
        page=page, headline=headline(page), tiles=tiles(page), findings=page.findings, stated=stated_rows(page),
        charts=_drawn(run_charts), phases=phases(page), scores=table_rows(page.scores), completions=len(rows),
        count=count, held_out=len(held_out), held_out_count=held_out_count, not_measured=not_measured(page),
        versions=versions(page), expected=_expected(page),
        clean=nothing_found(page.evidence), model=recipe.model.id, recipe=dump_recipe(recipe),
        data=_safe(for_script(data)),
    )  # fmt: skip
    return str(html)


def _expected(page: RunPage) -> dict[str, Any] | None:
    """Return where the run stands in the band of its recipe, and where the band comes from; None without one."""
    expected = page.recipe.expected
    if expected is None:
        return None
    line = standing_line(page.evidence) or f"where the run stands in its band is not known yet; {expected.cited}"
    facts = f"{expected.model}, {expected.hardware}"
    return {"line": line, "link": expected.link, "facts": facts, "deviations": expected.deviations}


def finish_with_report(run: RunDir, show: Show) -> None:
    """Report the findings that need held-out scores, and write the report; an error here does not fail the run."""
    try:
        once = OnceUntilItChanges()
        once.news(Finding.from_record(record) for record in stated_findings(run) if "until" not in record)
        for finding in once.news(examine(run)):
            state_finding(run, finding, int(run.read_run().get("steps") or 0), show)
        write_report(run)
    except Exception as error:  # the run itself is finished and saved
        logger.exception("The report was not written.")
        again = f"the run is complete. Try again: {hint('report', run=run.path)}"
        show(f"report: not written ({type(error).__name__}: {error}); {again}")


def inline_report(run: RunDir, height_px: int = 900) -> Any:
    """Return a run's report as IPython's HTML, in a frame for a notebook's cell."""
    from html import escape

    from IPython.display import HTML

    page = write_report(run).read_text(encoding="utf-8")
    return HTML(f'<iframe srcdoc="{escape(page)}" width="100%" height="{height_px}" style="border:0"></iframe>')


def write_comparison(runs: Sequence[RunDir], path: Path) -> Path:
    """Write a page that compares runs: scores, figures, curves in one chart, differences between the recipes.

    Raises:
        RunDirError: a folder is not a run, or fewer than two are given.
    """
    if len(runs) < 2:
        example = either('make compare RUNS="runs/a runs/b"', "grpo-lite compare runs/a runs/b")
        raise RunDirError(f"compare: give two or more runs, as in {example}.")
    pages = [read_page(run) for run in runs]
    names = distinct_names([run.path for run in runs])
    run_charts = overlaid_charts(pages, names)
    html = _template("compare.html").render(
        names=names, headlines=[headline(page) for page in pages], table=comparison_table(pages),
        differences=recipe_differences([page.recipe for page in pages]), charts=_drawn(run_charts),
        findings=[page.findings for page in pages], clean=[nothing_found(page.evidence) for page in pages],
        data=_safe(for_script({"charts": {chart.key: placement(chart) for chart in run_charts}})),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html)
    return path


def _drawn(run_charts: Sequence[Chart]) -> list[dict[str, Any]]:
    return [{"key": c.key, "title": c.title, "note": c.note, "svg": _safe(svg(c))} for c in run_charts]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as much of the path as makes them distinct."""
    for depth in range(1, 1 + max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(paths, start=1)]


def overlaid_charts(pages: Sequence[RunPage], names: Sequence[str]) -> list[Chart]:
    """Return charts in which every run has one line: the first line of its own chart."""
    per_run = [{chart.key: chart for chart in charts(page.evidence)} for page in pages]
    keys = [key for of_run in per_run for key in of_run if key != "parts"]
    result = []
    for key in dict.fromkeys(keys):
        having = [(slot, of_run[key]) for slot, of_run in enumerate(per_run) if key in of_run]
        # a run keeps its colour even if another run has no line
        lines = [Line(names[slot], chart.lines[0].x, chart.lines[0].y, slot=slot) for slot, chart in having]
        result.append(Chart(key, having[0][1].title, having[0][1].note.partition(";")[0], lines, having[0][1].top))
    return result


def comparison_table(pages: Sequence[RunPage]) -> list[tuple[str, list[str]]]:
    """Return rows (name, one cell a run) for what at least one run has."""
    tables = [_figures(page) for page in pages]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [(key, [table.get(key, "–") for table in tables]) for key in keys]


def _figures(page: RunPage) -> dict[str, str]:
    figures: dict[str, str] = {}
    for row in table_rows(page.scores):
        rates = [row[column].partition(" (")[0] for column in SCORE_COLUMNS if row[column]]
        figures[row["name"]] = " → ".join(rates)
        if "(" in row["difference"]:  # with its interval
            figures[f"{row['name']}: gain"] = row["difference"] + (" by GRPO alone" if row["warmup"] else "")
        if "(" in row["warmup"]:
            figures[f"{row['name']}: gain of the warm-up"] = row["warmup"]
    figures |= dict(tiles(page))
    record = page.record
    extra = {
        "evaluation time": duration(record.get("evaluation_seconds")),
        "adapter and merge": "verified" if (record.get("merge") or {}).get("passed") else None,
        "memory of the device": size((record.get("device") or {}).get("memory_bytes")),
        "seed": record.get("seed"),
        **{f"version of {name}": value for name, value in (record.get("versions") or {}).items()},
    }
    return figures | {name: str(value) for name, value in extra.items() if value is not None}


def recipe_differences(recipes: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Return the keys in which recipes differ, with the value in each recipe."""
    flat = [values_by_key(recipe.model_dump(mode="json")) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, ["–" if values.get(key) in (None, [], {}) else str(values[key]) for values in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def page_part(name: str) -> str:
    """Return the text of `page.css`, of `parts.js` (what every page's script draws with) or of `page.js`."""
    return (_PAGE / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["css"] = _safe(page_part("page.css"))
    environment.globals["js"] = _safe(page_part("parts.js") + page_part("page.js"))
    return environment.get_template(name)


def _safe(text: str) -> Any:
    """Mark text as HTML: it is ours, or escaped already."""
    from markupsafe import Markup

    return Markup(text)
