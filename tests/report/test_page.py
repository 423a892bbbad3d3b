"""The report: one file that needs nothing else, right in its figures, harmless with hostile completions."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import RunDirError
from grpo_lite.report.curves import Chart, charts, moving_average, svg, write_png
from grpo_lite.report.evidence import read_evidence
from grpo_lite.report.facts import MOST_ROWS, completion_rows, phases, read_page, shortened, total_of
from grpo_lite.report.page import finish_with_report, recipe_differences, write_comparison, write_report
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.units import duration
from tests.command_line import in_process
from tests.run_files import HOSTILE, write_run


def data_of(html: str) -> dict[str, object]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def drawings() -> dict[str, Any]:
    return {}


@pytest.fixture(autouse=True)
def drawn_once(drawings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Draw charts of the same values once for all pages of these tests: drawing takes two seconds a page."""

    def svg_once(chart: Chart) -> str:
        if repr(chart) not in drawings:
            drawings[repr(chart)] = svg(chart)
        return str(drawings[repr(chart)])

    def png_once(shown: Sequence[Chart], path: Path, title: str = "") -> None:
        key = repr((list(shown), title))
        if key in drawings:
            path.write_bytes(drawings[key])
            return
        write_png(shown, path, title)
        if path.is_file():
            drawings[key] = path.read_bytes()

    monkeypatch.setattr("grpo_lite.report.page.svg", svg_once)
    monkeypatch.setattr("grpo_lite.report.page.write_png", png_once)
    return monkeypatch


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run as `write_run` leaves it."""
    return write_report(write_run(tmp_path_factory.mktemp("page") / "run")).read_text(encoding="utf-8")


def test_the_page_is_one_file_that_loads_nothing(html: str) -> None:
    without_data = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)=["\'](?!data:|#)', without_data)
    assert "@import" not in html
    assert not re.findall(r"url\((?!#)", without_data)  # clip paths of the charts are #…
    assert "default-src 'none'" in html
    assert len(html) < 400_000


def test_the_verdict_with_its_interval_stands_first(html: str) -> None:
    hero = html[html.index('id="verdict"') : html.index('id="doctor"')]
    assert "25.0 %" in hero  # 5 of 20
    assert "75.0 %" in hero  # 15 of 20
    assert "+50.0 points, 95 % interval" in hero
    assert "significant gain" in hero
    assert html.index('id="verdict"') < html.index('id="curves"')


@pytest.mark.parametrize(
    "solved, tone", [((5, 15), "good"), ((5, 6), "flat"), ((15, 5), "bad")], ids=["gain", "none", "loss"]
)
def test_the_tone_follows_the_interval(tmp_path: Path, solved: tuple[int, int], tone: str) -> None:
    html = write_report(write_run(tmp_path / "run", solved=solved)).read_text(encoding="utf-8")
    assert f'class="hero card {tone}"' in html


def test_hostile_completions_stay_text(html: str) -> None:
    assert HOSTILE not in html
    assert html.count("<script") == 2  # the data's and the page's own
    assert "<img" not in html
    assert any(row["text"] == HOSTILE for row in data_of(html)["completions"])


def test_a_hostile_description_of_the_recipe_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", overrides=(f"description={json.dumps(HOSTILE)}",))
    assert HOSTILE not in write_report(run).read_text(encoding="utf-8")


def test_every_metric_the_run_has_gets_a_chart_and_no_other(tmp_path: Path) -> None:
    found = {chart.key for chart in charts(read_evidence(write_run(tmp_path / "run")))}
    assert found == {"reward", "heldout", "parts", "groups", "length", "entropy", "kl", "grad_norm", "speed", "memory"}
    bare = write_run(tmp_path / "bare")
    bare.metrics_file.write_text("".join(f'{{"step": {i}, "reward": 0.5, "reward_std": 0}}\n' for i in (1, 2)))
    assert {chart.key for chart in charts(read_evidence(bare))} == {"reward"}


def test_ids_in_the_charts_are_unique_on_the_page(html: str) -> None:
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_chart_uses_the_page_s_colours(tmp_path: Path) -> None:
    text = svg(charts(read_evidence(write_run(tmp_path / "run")))[0])
    assert "var(--line0)" in text
    assert set(re.findall(r"#[0-9a-f]{6}\b", text)) <= {"#000000"}


def test_a_run_that_is_not_finished_or_has_nothing_yet_gets_a_page_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.scores_file.unlink()
    run.run_file.unlink()
    assert "not finished: 12 steps so far" in write_report(run).read_text(encoding="utf-8")
    run.metrics_file.unlink()
    for path in (run.path / "completions").glob("*"):
        path.unlink()
    html = write_report(run).read_text(encoding="utf-8")
    assert "not finished: 0 steps so far" in html
    assert 'id="curves"' not in html


def test_figures_that_are_not_finite_leave_a_gap_and_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = run.metrics_file.read_text().replace('"entropy": 1.9', '"entropy": NaN, "x": 1.9').replace("1.1", "Infinity")
    run.metrics_file.write_text(text)
    data = data_of(write_report(run).read_text(encoding="utf-8"))
    assert "NaN" not in json.dumps(data)


@pytest.mark.slow
def test_a_long_run_is_cut_down_evenly_and_the_page_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=150, group=64)
    rows, count = completion_rows(run)
    assert count == 150 * 64
    assert len(rows) <= MOST_ROWS
    steps = sorted({row["step"] for row in rows})
    assert steps[0] == 1
    assert steps[-1] == 150
    for step in steps:  # each step's best and worst are there
        kept = [row["reward"] for row in rows if row["step"] == step]
        lines = (run.path / "completions" / f"step_{step:06d}.jsonl").read_text().splitlines()
        everything = [json.loads(line)["reward"] for line in lines]
        assert (min(kept), max(kept)) == (min(everything), max(everything))
    assert f"{len(rows):,} of 9,600 are on this page" in write_report(run).read_text(encoding="utf-8")


def test_long_texts_lose_their_middle() -> None:
    text = shortened("a" * 5000 + "b" * 5000)
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert "6,000 characters left out" in text


def test_time_is_split_by_phase_and_adds_up(tmp_path: Path) -> None:
    found = {phase["name"]: phase for phase in phases(read_page(write_run(tmp_path / "run")))}
    # 12 steps of 2 s; of these 12 s generating and 1.2 s rewards; 30 s of training, of which 3 s held-out scores
    # between the steps; 5 s of evaluation and 3 s of merge after it
    seconds = {"rollout": 12.0, "reward": 1.2, "update": 10.8, "other": 3.0, "evaluation": 8.0, "merge": 3.0}
    assert {name: round(phase["seconds"], 6) for name, phase in found.items()} == seconds
    assert sum(phase["share"] for phase in found.values()) == pytest.approx(1)


def test_a_counter_that_a_resume_began_again_is_added_up() -> None:
    assert total_of([1.0, 2.0, 3.0, 0.5, 1.5]) == 4.5
    assert total_of([]) == 0.0


@pytest.mark.parametrize(
    "seconds, text",
    [
        (None, None),
        (0.04, "0.0 s"),
        (3.4, "3.4 s"),
        (9.97, "10 s"),
        (59.7, "1 min 00 s"),
        (208, "3 min 28 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float | None, text: str | None) -> None:
    assert duration(seconds) == text


def test_a_moving_average_is_of_the_last_values() -> None:
    assert moving_average([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


def test_the_curves_are_a_png_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_report(run)
    raw = (run.path / "curves.png").read_bytes()
    width, height = struct.unpack(">II", raw[16:24])
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 1200
    assert height > 800


def test_the_recipe_in_the_page_names_no_path_of_the_machine(tmp_path: Path) -> None:
    reward = tmp_path / "secret" / "mine.py"
    run = write_run(tmp_path / "run", overrides=(f"rewards[1].function={reward}:f", "rewards[1].kwargs={}"))
    assert str(tmp_path) not in write_report(run).read_text(encoding="utf-8")


def test_runs_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", solved=(5, 6), overrides=("grpo.learning_rate=0.5",))
    out = in_process("compare", str(a.path), str(b.path), "--out", str(tmp_path / "out" / "compare.html"))
    html = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert str(tmp_path / "out" / "compare.html") in out
    assert html.count("hero card good") == 1
    assert html.count("hero card flat") == 1
    differences = html[html.index("Where the recipes differ") :]
    assert "grpo.learning_rate" in differences
    assert "0.5" in differences
    assert {line["name"] for line in data_of(html)["charts"]["reward"]["lines"]} == {"a", "b"}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / side / "run") for side in ("x", "y")]
    html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "x/run" in html
    assert "y/run" in html
    assert "All runs have the same recipe." in html


def test_one_run_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="two or more"):
        write_comparison([write_run(tmp_path / "a")], tmp_path / "c.html")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is not a run" in in_process("report", str(tmp_path), expect=1)
    assert "is not a run" in in_process("compare", str(tmp_path), str(tmp_path), expect=1)


def test_recipes_of_different_shapes_are_compared_key_by_key(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a").load_recipe()
    two = write_run(tmp_path / "b", overrides=("rewards=[{function: rewards.accuracy_reward}]",)).load_recipe()
    keys = [key for key, _ in recipe_differences([one, two])]
    assert "rewards[1].function" in keys
    assert recipe_differences([one, one]) == []


def test_report_can_be_written_again_for_the_same_run(tmp_path: Path, drawn_once: pytest.MonkeyPatch) -> None:
    drawn_once.undo()
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(RunDir(run.path)).read_bytes() == first


def test_a_paused_run_and_what_was_left_out_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = {k: v for k, v in run.read_run().items() if k not in ("finished_at", "trained_at")}
    faults = {"skipped_steps": 2}
    run.run_file.write_text(
        json.dumps({**record, "max_steps": 50, "paused_at": "2026-01-01T00:05:00Z", "faults": faults})
    )
    html = write_report(run).read_text(encoding="utf-8")
    assert "it paused after step 12 of 50" in html
    assert "2 skipped steps" in html


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: RunDir) -> Path:
        raise ValueError("no fonts")

    monkeypatch.setattr("grpo_lite.report.page.write_report", broken)
    said: list[str] = []
    finish_with_report(write_run(tmp_path / "run"), said.append)
    assert said[-1].startswith("report: not written (ValueError: no fonts); the run is complete.")


def test_a_very_long_run_s_values_are_thinned_for_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5, group=2)
    lines = "".join(f'{{"step": {i}, "reward": {i / 5000}, "reward_std": 0.1}}\n' for i in range(1, 5001))
    run.metrics_file.write_text(lines)
    page = write_report(run)
    (line,) = data_of(page.read_text(encoding="utf-8"))["charts"]["reward"]["lines"]
    assert len(line["x"]) == len(line["y"]) == 556  # every ninth of 5,000
    assert page.stat().st_size < 400_000


def test_text_that_looks_like_mathematics_is_drawn_as_it_is(tmp_path: Path) -> None:
    # matplotlib would read it as TeX, and fail: "Learns $\\boxed{}$ for $5"
    run = write_run(tmp_path / "$x^{$", overrides=('description="Learns $\\\\boxed{$ for $5 奖励"',))
    write_report(run)
    assert (run.path / "curves.png").is_file()
    other = write_run(tmp_path / "_hidden")
    html = write_comparison([run, other], tmp_path / "c.html").read_text(encoding="utf-8")
    legend = html[html.index('data-chart="reward"') :]
    assert "$x^{$" in legend
    assert " _hidden</text>" in legend  # matplotlib leaves names that begin with _ out of a legend


def test_more_runs_than_colours_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{i}", steps=4) for i in range(8)]
    html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "stroke-dasharray" in html[html.index('data-chart="reward"') :]


def test_a_curve_that_one_run_alone_has_is_shown_whichever_it_is(tmp_path: Path) -> None:
    with_kl, without = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    without.metrics_file.write_text(without.metrics_file.read_text().replace('"kl"', '"other"'))
    for runs, colour in (([with_kl, without], "--line0"), ([without, with_kl], "--line1")):
        html = write_comparison(runs, tmp_path / "c.html").read_text(encoding="utf-8")
        assert [line["name"] for line in data_of(html)["charts"]["kl"]["lines"]] == ["a"]
        chart = html[html.index('data-chart="kl"') :].partition("</svg>")[0]
        assert ">a</text>" in chart  # named, though it is alone
        assert set(re.findall(r"--line\d", chart)) == {colour}  # the colour that the run has in the other charts


def test_a_run_given_as_the_folder_one_stands_in_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run(tmp_path / "mine").path)
    assert "<h1>mine</h1>" in write_report(RunDir(".")).read_text(encoding="utf-8")


def test_a_damaged_metrics_json_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.scores_file.write_text('{"lenient": ')
    for command in ("report", "doctor"):
        assert "metrics.json: is not valid JSON" in in_process(command, str(run.path), expect=1)


def test_a_local_model_s_folder_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", overrides=(f"model.id={tmp_path}/secret/base",))
    html = write_report(run).read_text(encoding="utf-8")
    assert "secret" not in html
    assert '<span class="mono">base</span>' in html


def test_completions_without_a_reward_are_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    file = run.path / "completions" / "step_000001.jsonl"
    file.write_text(file.read_text().replace('"reward": 1.0', '"reward": null'))
    rows = data_of(write_report(run).read_text(encoding="utf-8"))["completions"]
    assert None in {row["reward"] for row in rows}


def test_a_run_of_one_step_is_not_called_healthy(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", steps=1)).read_text(encoding="utf-8")
    assert "1 step logged so far; the doctor needs at least 4." in html
    assert "othing found wrong" not in html


def test_held_out_answers_beyond_what_a_page_can_hold_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    records = run.evaluation / "records.jsonl"
    records.write_text(records.read_text() * 120)  # 2,400
    html = write_report(run).read_text(encoding="utf-8")
    assert "2,000 of 2,400 are on this page" in html
