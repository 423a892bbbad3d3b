"""Scores after a warm-up: three columns, GRPO's own gain in the headline, and never the sum of both stages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grpo_lite.report.evidence import read_evidence
from grpo_lite.report.facts import headline, not_measured, phases, read_page, tiles
from grpo_lite.report.hacking import reward_without_progress
from grpo_lite.report.page import comparison_table, write_report
from grpo_lite.report.scores import own_gain, rates_text, table_rows
from grpo_lite.report.summary import run_summary, score_lines
from grpo_lite.reproduce import result_lines
from grpo_lite.runs.run_dir import RunDir
from tests.run_files import write_run

SUM = re.compile(r"\+(65|0\.65)")  # base -> trained of `warmed`


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run in which 2, 9 and 15 of 20 held-out prompts are right with base, warm and trained model."""
    return write_run(tmp_path_factory.mktemp("scores") / "run", solved=(2, 9, 15), also=True)


@pytest.fixture(scope="module")
def html(warmed: RunDir) -> str:
    return write_report(warmed).read_text(encoding="utf-8")


def test_the_headline_is_grpo_s_own_gain(warmed: RunDir) -> None:
    top = headline(read_page(warmed))
    assert top["label"] == "GRPO alone: significant gain"
    assert top["difference"] == pytest.approx(6 / 20)
    assert [rate["name"] for rate in top["rates"]] == ["base", "warm", "trained"]
    assert top["warmup"].startswith("warm-up (SFT): +35.0 points (")
    assert top["sentence"].startswith("GRPO alone: the held-out lenient score rose from 0.450 to 0.750")
    assert "Warm-up (SFT): the held-out lenient score rose from 0.100 to 0.450" in top["sentence"]


def test_what_the_warm_up_gained_is_not_claimed_where_grpo_gained_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", solved=(2, 15, 14))
    top = headline(read_page(run))
    assert (top["label"], top["tone"]) == ("GRPO alone: no significant gain", "flat")
    assert score_lines(run.read_scores())[0].startswith(
        "GRPO alone: the held-out lenient score went from 0.750 to 0.700"
    )


def test_the_page_shows_three_columns_and_never_the_sum(html: str) -> None:
    hero = html[html.index('id="verdict"') : html.index('id="doctor"')]
    assert [f"{rate} %" in hero for rate in ("10.0", "45.0", "75.0")] == [True] * 3
    table = html[html.index('id="scores"') : html.index('id="heldout"')]
    assert re.findall(r"<th>([^<]*)</th>", table[: table.index("</thead>")]) == [
        "", "base", "warm", "trained", "gain of the warm-up (SFT)", "gain of GRPO alone",
    ]  # fmt: skip
    row = table[table.index("<th>right answer</th>") :]
    assert [cell.partition(" (")[0] for cell in re.findall(r"<td>([^<]*)</td>", row)[:5]] == [
        "10.0%", "45.0%", "75.0%", "+35.0 points", "+30.0 points",
    ]  # fmt: skip
    assert "three digits: right answer" in table
    assert "cut off by the cap" in table
    assert not SUM.search(html[: html.index('<script type="application/json"')])


def test_every_model_s_answer_stands_beside_the_others(html: str) -> None:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    row = json.loads(data)["heldout"][5]  # of the base's 2, warm's 9 and the trained model's 15 right ones
    assert [row[name]["right"] for name in ("base", "warm", "trained")] == [False, True, True]
    assert "Base, warm and trained, side by side" in html


def test_the_page_shows_the_warm_up_s_loss_its_figures_and_its_time(warmed: RunDir, html: str) -> None:
    assert 'data-chart="warmup"' in html
    page = read_page(warmed)
    assert dict(tiles(page))["warm-up"] == "6 steps, loss 2.00 → 0.50"
    assert next(phase for phase in phases(page) if phase["name"] == "warmup")["seconds"] == 20.0


def test_a_figure_of_the_scores_is_drawn(warmed: RunDir, html: str, tmp_path: Path) -> None:
    assert (warmed.path / "scores.png").read_bytes().startswith(b"\x89PNG")
    unscored = write_run(tmp_path / "run")
    unscored.scores_file.unlink()
    write_report(unscored)
    assert not (unscored.path / "scores.png").exists()


def test_the_summary_tells_grpo_s_gain_from_the_warm_up_s(warmed: RunDir) -> None:
    text = run_summary(warmed)
    assert "warm-up (SFT): 6 steps in 20 s, loss 2.000 → 0.500" in text
    lines = score_lines(warmed.read_scores())
    assert lines[0].startswith("GRPO alone: ")
    assert lines[1].startswith("Warm-up (SFT): ")
    assert lines[2].split() == ["base", "warm", "trained"]
    assert re.search(r"^  right answer +0\.100 \(0\.\d+ to 0\.\d+\)  0\.450 \(.*\)  0\.750 \(", lines[3])
    assert any(line.startswith("  three digits: right answer  ") for line in lines)
    assert "pass@1 (sampled): 0.050 → 0.225 → 0.375" in lines
    assert not SUM.search(text)


def test_a_further_set_has_its_sentence_without_a_warm_up_too(tmp_path: Path) -> None:
    lines = score_lines(write_run(tmp_path / "run", also=True).read_scores())
    assert lines[0].startswith("The held-out lenient score rose from 0.250 to 0.750")
    assert lines[1].startswith("The lenient score on three digits went from 0.050 to 0.100")


def test_a_comparison_sets_grpo_s_gains_side_by_side(warmed: RunDir, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    table = dict(comparison_table([read_page(warmed), read_page(plain)]))
    assert table["right answer"] == ["10.0% → 45.0% → 75.0%", "25.0% → 75.0%"]
    with_warmup, without = table["right answer: gain"]
    assert re.fullmatch(r"\+30\.0 points \(.*\) by GRPO alone", with_warmup)
    assert re.fullmatch(r"\+50\.0 points \([^)]*\)", without)
    assert table["right answer: gain of the warm-up"][0].startswith("+35.0 points")
    assert table["right answer: gain of the warm-up"][1] == "–"


def test_a_repeated_run_compares_all_columns(warmed: RunDir) -> None:
    assert "held-out lenient: 0.100 → 0.450 → 0.750 then, 0.100 → 0.450 → 0.750 now: the same" in result_lines(
        warmed, warmed
    )


def test_the_doctor_compares_with_what_grpo_started_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", solved=(2, 15, 15))  # the reward rises in GRPO; only the warm-up raised the score
    run.metrics_file.write_text(re.sub(r', "heldout/\w+": [\d.]+', "", run.metrics_file.read_text()))
    finding = reward_without_progress(read_evidence(run))
    assert finding is not None
    assert "(0.75 → 0.75)" in finding.sentence


def test_a_run_that_paused_in_its_warm_up_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", solved=(2, 9, 15))
    scores = run.read_scores()
    cause = "Warm-up (SFT), paused before its end, without GRPO"
    for kind in ("lenient", "strict", "honest"):
        for key in ("warm", "warmup", "grpo"):
            del scores[kind][key]
        sentence = scores[kind]["verdict"]["sentence"].replace("Warm-up and GRPO together", cause)
        scores[kind]["verdict"]["sentence"] = sentence
    for rates in (*scores["pass_at_k"].values(), scores["truncated"]):
        del rates["warm"]
    run.write_scores(scores)
    warmup = {"began_at": "then", "paused_at": "now", "steps": 6, "max_steps": 20, "seconds": 20.0}
    run.update_run(warmup=warmup, steps=None, trained_at=None, finished_at=None, paused_at="now")
    lines = [line for line in run.metrics_file.read_text().splitlines() if '"stage": "warmup"' in line]
    run.metrics_file.write_text("\n".join(lines) + "\n")
    page = read_page(run)
    assert headline(page)["label"] == f"{cause}: significant gain"
    assert any(
        line.startswith("GRPO: the run paused in its warm-up, after step 6 of 20.") for line in not_measured(page)
    )
    assert cause in write_report(run).read_text(encoding="utf-8")
    text = run_summary(run)
    assert "paused before its end (20 steps), without GRPO" in text
    assert f"{cause}: the held-out lenient score rose" in text


def test_a_run_that_is_in_its_warm_up_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0, solved=(2, 9, 15))
    run.scores_file.unlink()
    run.update_run(trained_at=None, finished_at=None)
    assert "not finished: 6 steps of the warm-up so far" in write_report(run).read_text(encoding="utf-8")


def test_scores_of_before_the_warm_up_read_as_they_did(tmp_path: Path) -> None:
    scores = write_run(tmp_path / "run").read_scores()
    del scores["truncated"]
    assert own_gain(scores["lenient"]) is scores["lenient"]
    assert rates_text(scores["lenient"]) == "0.250 → 0.750"
    assert [row["name"] for row in table_rows(scores)] == [
        "right answer", "right answer in the required form", "second, independent judge", "pass@1, sampled",
        "pass@2, sampled",
    ]  # fmt: skip
    assert all(row["warm"] == row["warmup"] == "" for row in table_rows(scores))
