"""The band of `expected:`: where a run stands, why it may be below, and where the band is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import RecipeError
from grpo_lite.recipe.expected import Expected
from grpo_lite.recipe.load import build_recipe, load_recipe
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.report.board import Board
from grpo_lite.report.curves import charts
from grpo_lite.report.diagnoses import learning_rate_too_low
from grpo_lite.report.evidence import Evidence
from grpo_lite.report.expected import band_text, below_expected, changed_keys, standing, standing_line
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from tests.command_line import in_process
from tests.run_files import write_run

BAND = {
    "source": "a paper, table 1",
    "model": "m",
    "hardware": "h",
    "points": [[1, 0.0, 0.2], [11, 0.5, 0.7]],  # rises by 0.05 a step
}


def recipe(overrides: tuple[str, ...] = (), **expected: Any) -> Recipe:
    raw = load_recipe("smoke", overrides).model_dump(mode="json")
    return build_recipe(raw | {"expected": {**BAND, **expected}}, "test.yaml")


def evidence(values: list[float | None], given: Recipe | None = None, **scores: Any) -> Evidence:
    records = [{"step": step, "reward": value, "reward_std": 0.1} for step, value in enumerate(values, start=1)]
    return Evidence(given or recipe(), records, scores=scores)


INSIDE = [0.1 + 0.05 * step for step in range(10)]


@pytest.mark.parametrize(
    "step, band",
    [(0, None), (1, (0.0, 0.2)), (6, (0.25, 0.45)), (11, (0.5, 0.7)), (99, None)],
    ids=["before", "first", "between", "last", "after"],
)
def test_the_band_is_straight_between_its_points(step: int, band: tuple[float, float] | None) -> None:
    found = Expected.model_validate(BAND).band_at(step)
    assert found == (band and pytest.approx(band))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"points": [[2, 0, 1], [2, 0, 1]]}, "expected: points: the steps are [2, 2]"),
        ({"points": [[2, 0.5]]}, "expected.points[0]: [2, 0.5] is given, and a value is missing. `[step, low, high]`"),
        ({"points": [[2, 0.5, 0.1]]}, "write [step, low, high] with low <= high"),
        ({"metric": "accuracy"}, "expected.metric: 'accuracy' is given; allowed are reward, rewards/NAME/mean"),
        ({"link": "example.org"}, "write an address that begins with https://"),
        ({"sauce": "x"}, "expected.sauce: unknown key (did you mean 'source'?)"),
    ],
)
def test_a_wrong_band_is_one_clear_fault(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(**change)
    assert said in str(error.value)


def test_a_run_within_the_band_is_inside() -> None:
    found = standing(evidence(INSIDE))
    assert found is not None
    assert (found.step, found.since) == (10, None)
    assert found.value == pytest.approx((0.45 + 0.5 + 0.55) / 3)  # the mean of steps 8 to 10
    line = standing_line(evidence(INSIDE))
    assert line == "inside the band: reward 0.500 at step 10, expected 0.450 to 0.650; a paper, table 1"
    assert below_expected(evidence(INSIDE)) is None


def test_one_bad_batch_decides_nothing() -> None:
    dip = [*INSIDE[:6], 0.0, *INSIDE[7:]]
    assert below_expected(evidence(dip)) is None
    at_the_edge = evidence([*INSIDE[:9], 0.0])  # the mean of the last three is 0.317, where the band begins at 0.45
    assert below_expected(at_the_edge) is None
    line = standing_line(at_the_edge) or ""
    assert line.startswith("at the edge of the band, 0.133 below: reward 0.317 at step 10, expected 0.450 to 0.650 (")
    assert "(in too few steps in a row to count)" in line
    assert ("expected", "0.45 to 0.65", "at the edge") in Board(recipe(), 20, list(at_the_edge.steps)).table()


def test_a_run_that_does_not_rise_is_below_since_a_step() -> None:
    # The mean of three steps at 0.1 is below the band once that begins above 0.1: from step 4 on (0.15).
    finding = below_expected(evidence([0.1] * 10))
    assert finding is not None
    assert finding.sentence.startswith("Below the band since step 4: reward is 0.100, expected 0.450 to 0.650 (a paper")
    assert standing_line(evidence([0.1] * 10)).startswith("outside the band, 0.350 below: ")  # type: ignore[union-attr]


def test_a_run_above_the_band_is_outside_and_no_fault() -> None:
    assert below_expected(evidence([0.9] * 10)) is None
    assert "outside the band, 0.250 above" in (standing_line(evidence([0.9] * 10)) or "")


def test_without_a_band_or_values_nothing_is_said() -> None:
    assert standing(evidence([0.1] * 2)) is None
    assert standing(evidence([None] * 9)) is None
    assert standing_line(Evidence(load_recipe("smoke"), evidence(INSIDE).steps)) is None


def test_a_setting_that_differs_from_the_shipped_recipe_is_the_first_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = recipe()
    monkeypatch.setattr("grpo_lite.report.expected.load_recipe", lambda name: shipped)
    given = recipe(("grpo.learning_rate=1e-6", "grpo.beta=0.04", "limits.max_minutes=3", "grpo.save_steps=7"))
    rate = shipped.grpo["learning_rate"]
    assert [key for key, *_ in changed_keys(given)] == ["grpo.learning_rate", "grpo.beta"]
    finding = below_expected(evidence([0.1] * 10, given))
    assert finding is not None
    assert f"grpo.learning_rate is 1e-06 and not {rate}, grpo.beta is 0.04 and not 0.0" in finding.sentence
    assert finding.override == f"grpo.learning_rate={rate}"


def test_else_another_finding_is_the_reason_and_else_the_seed() -> None:
    slow = recipe(("grpo.learning_rate=1e-6",))
    finding = below_expected(evidence([0.1] * 10, slow))
    assert finding is not None
    assert "The likeliest reason: The learning rate 1e-06 is for full fine-tuning" in finding.sentence
    assert finding.override == "grpo.learning_rate=2e-5"
    finding = below_expected(evidence([0.1] * 10))
    assert finding is not None
    assert finding.override == f"seed={recipe().seed + 1}"


def rate(value: float, half: float) -> dict[str, float]:
    return {"rate": value, "low": value - half, "high": value + half, "n": 100}


def test_a_score_is_below_only_with_its_whole_interval() -> None:
    of_scores = recipe(metric="score/lenient", points=[[10, 0.5, 0.6]])

    def found(value: float) -> Evidence:
        return evidence(INSIDE, of_scores, lenient={"base": rate(0.2, 0.05), "trained": rate(value, 0.05)})

    assert below_expected(found(0.46)) is None
    finding = below_expected(found(0.4))
    assert finding is not None
    assert finding.sentence.startswith("Below the band: score/lenient is 0.400, expected 0.500 to 0.600 (")
    line = standing_line(found(0.46))
    assert line is not None
    assert line.startswith("at the edge of the band, 0.040 below: score/lenient 0.460 at step 10")
    assert "(its own interval is ± 0.050)" in line
    assert [chart.key for chart in charts(found(0.4))][:2] == ["score", "reward"]  # what the recipe is for, first


def test_the_band_is_drawn_in_the_chart_of_its_metric() -> None:
    reward = next(chart for chart in charts(evidence(INSIDE)) if chart.key == "reward")
    assert [line.name for line in reward.lines] == ["reward", "expected"]
    band = reward.lines[1]
    assert (list(band.x), list(band.low)) == ([1.0, 10.0], [0.0, pytest.approx(0.45)])
    assert reward.note.endswith("; dashed: what the recipe expects, with its band")
    plain = charts(Evidence(load_recipe("smoke"), evidence(INSIDE).steps))
    assert all("expects" not in chart.note for chart in plain)


def test_after_the_last_point_a_curve_stands_where_it_was_and_a_score_still_counts() -> None:
    later = evidence([*INSIDE, 0.6, 0.1, 0.1, 0.1, 0.1])
    found = standing(later)
    assert found is not None
    assert (found.step, found.below) == (11, False)
    assert Expected.model_validate(BAND | {"metric": "score/lenient"}).band_at(99) == (0.5, 0.7)


def test_the_board_and_its_line_show_the_band() -> None:
    board = Board(recipe(), 20, list(evidence(INSIDE).steps))
    assert ("expected", "0.45 to 0.65", "inside") in board.table()
    assert "reward 0.550 ± 0.100 · expected 0.45 to 0.65 ·" in board.line()
    beyond = Board(recipe(), 20, list(evidence([*INSIDE, 0.6, 0.9, 0.9]).steps))  # the band's last point is at step 11
    assert ("expected", "0.50 to 0.70", "inside at step 11") in beyond.table()
    assert band_text(Evidence(load_recipe("smoke"), board.steps)) is None


def test_tina_s_learning_rate_is_not_called_too_low() -> None:
    """1e-6 with alpha / r = 4 moves the weights like 2e-6 with 2, and has trained well; with 2 it is too low."""
    flat = evidence([0.1] * 10, recipe(("grpo.learning_rate=1e-6", "lora.r=32", "lora.lora_alpha=128")))
    assert learning_rate_too_low(flat) is None
    assert learning_rate_too_low(evidence([0.1] * 10, recipe(("grpo.learning_rate=1e-6",)))) is not None
    rs = recipe(("grpo.learning_rate=1e-6", "lora.r=16", "lora.lora_alpha=16", "lora.use_rslora=true"))
    assert learning_rate_too_low(evidence([0.1] * 10, rs)) is None


def written(tmp_path: Path, values: list[float], **expected: Any) -> RunDir:
    given = recipe(**expected)
    steps = [{"step": step, "reward": value, "reward_std": 0.1} for step, value in enumerate(values, start=1)]
    run = write_run(tmp_path / "run", steps=1)
    run.recipe_file.write_text(dump_recipe(given))
    run.metrics_file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return run


def test_doctor_and_report_say_where_the_run_stands(tmp_path: Path) -> None:
    run = written(tmp_path, INSIDE, link="https://example.org/x")
    assert "doctor: inside the band: reward 0.500 at step 10" in in_process("doctor", str(run.path))
    in_process("report", str(run.path))
    page = (run.path / "report.html").read_text()
    assert "Inside the band: reward 0.500" in page
    assert '<a href="https://example.org/x">' in page
    below = written(tmp_path / "below", [0.1] * 10)
    said = in_process("doctor", str(below.path))
    assert "doctor: Below the band since step 4" in said
    assert "doctor: outside" not in said


def test_reproduce_anchor_ends_with_one_line(tmp_path: Path) -> None:
    run = written(tmp_path, INSIDE)
    run.update_run(trained_at="2026-01-01T00:00:00Z", finished_at="2026-01-01T00:00:00Z")
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe()))
    said = in_process("reproduce-anchor", str(path), "--run", str(run.path))
    assert said == "smoke: inside the band: reward 0.500 at step 10, expected 0.450 to 0.650; a paper, table 1\n"
    said = in_process("reproduce-anchor", "smoke", expect=1)
    assert "smoke: has no section `expected:`" in said
    assert "These have one: quickstart, sums, tool-sums, anchors/" in said
