"""What training unlearned, by lm-evaluation-harness: paired by row, adapter off and on, stored, shown, and refused."""

from __future__ import annotations

import html
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_lite.errors import EvaluationError
from grpo_lite.evaluation.lm_eval import compare_tasks, load_tasks
from grpo_lite.export.hub.base_facts import base_facts
from grpo_lite.export.hub.card import model_card, read_facts
from grpo_lite.report.page import report_html
from grpo_lite.report.summary import run_summary
from grpo_lite.runs.run_dir import RunDir
from tests.command_line import ROOT, in_process
from tests.finished_run import make_run

CHOICE, ANSWER = (f"tests/data/sums_{name}.yaml" for name in ("choice", "answer"))
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra lm-eval)"
)


def scored(*shares: tuple[str, int], rows: int = 40) -> dict[str, Any]:
    """Return scores of one task: in each column so many of the first rows are right."""
    return {column: {("task", "none", "acc"): {i: float(i < n) for i in range(rows)}} for column, n in shares}


@pytest.mark.parametrize(
    "trained, lower, label",
    [
        (10, False, "unlearned"), (38, False, "better"), (21, False, "no clear change"), (20, False, "no clear change"),
        (10, True, "better"), (38, True, "unlearned"),
    ],
)  # fmt: skip
def test_a_change_is_named_only_where_its_interval_excludes_none(trained: int, lower: bool, label: str) -> None:
    columns = scored(("base", 20), ("trained", trained))
    (entry,) = compare_tasks(columns, [("task", "acc")] if lower else [], seed=1)
    assert entry["label"] == label
    assert entry["sentence"].endswith(f"{label}.")
    assert entry["difference"]["difference"] == pytest.approx((trained - 20) / 40)
    assert f"task (acc): 0.500 → {trained / 40:.3f} (" in entry["sentence"]


def test_rows_are_paired_by_their_number_and_not_by_their_order() -> None:
    columns = scored(("base", 20), ("trained", 20), ("merged", 10))
    columns["trained"] = {key: dict(reversed(rows.items())) for key, rows in columns["trained"].items()}
    (entry,) = compare_tasks(columns, [], seed=1)
    assert entry["difference"]["changed"] == 0
    assert entry["merged_label"] == "unlearned"
    assert "; merged 0.250 (" in entry["sentence"]


def test_tasks_without_a_number_a_row_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no number for each row"):
        compare_tasks({"base": {}, "trained": {}}, [], seed=1)


def test_a_missing_harness_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    text = in_process("eval", str(tmp_path), "--lm-eval", "gsm8k", expect=1)
    assert text.startswith("error: eval --lm-eval: lm-evaluation-harness is not installed here.")
    assert len(text.splitlines()) == 1
    assert "--limit is for --lm-eval" in in_process("eval", str(tmp_path), "--limit", "5", expect=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run whose adapter is strong enough to change answers."""
    run = make_run(tmp_path_factory.mktemp("lm_eval"))
    file = run.adapter / "adapter_model.safetensors"
    save_file({name: 5 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    return run


def right_choices(run: RunDir, model: Any) -> list[float | None]:
    """Return for each row whether the model finds the right choice likelier, by hand; None where it is a near tie."""
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    right: list[float | None] = []
    for line in (ROOT / "tests" / "data" / "sums_rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        message = [{"role": "user", "content": f"{row['question']}="}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(f"{prompt}{choice}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        clear = max(scores) - min(scores) > 0.1  # bfloat16, and the harness pads rows of a batch
        right.append(float(scores.index(max(scores)) == row["right"]) if clear else None)
    return right


@needs_harness
@pytest.mark.slow
def test_base_trained_and_merged_are_scored_stored_and_shown(run: RunDir, root: Path) -> None:
    text = in_process("eval", str(run.path), "--lm-eval", f"{CHOICE},{ANSWER}")
    entries = {(entry["task"], entry["filter"]): entry for entry in run.read_tasks()}
    assert list(entries) == [("sums_choice", "none"), ("sums_answer", "strict"), ("sums_answer", "anything")]
    choice = entries["sums_choice", "none"]
    assert choice["difference"]["n"] == 20

    base = AutoModelForCausalLM.from_pretrained(run.load_recipe().model.id, dtype="auto")
    rows = [json.loads(line) for line in (run.evaluation / "lm_eval.jsonl").read_text().splitlines()]
    mine = [row for row in rows if row["task"] == "sums_choice"]
    before = right_choices(run, base)
    after = right_choices(run, PeftModel.from_pretrained(base, run.adapter))
    for column, expected in (("base", before), ("trained", after)):
        scored = [(row[column], mine) for row, mine in zip(mine, expected, strict=True) if mine is not None]
        assert len(scored) > 10
        assert [by_harness for by_harness, _ in scored] == [by_hand for _, by_hand in scored], column
    # the adapter was off, then on: some row is clear on both sides and changed
    assert any(b != a for b, a in zip(before, after, strict=True) if None not in (b, a))
    assert choice["base"] == pytest.approx(sum(row["base"] for row in mine) / 20)

    sentences = [entry["sentence"] for entry in run.read_tasks()]
    card = model_card(read_facts(run, base_facts(run.load_recipe().model)), "me/model", "merged")
    for shown in (text, run_summary(run), html.unescape(report_html(run)), card):
        assert [sentence for sentence in sentences if sentence not in shown] == []
    assert "may have unlearnt" not in card


@needs_harness
@pytest.mark.slow
def test_other_tasks_stay_until_the_run_trains_further(run: RunDir, root: Path) -> None:
    in_process("eval", str(run.path), "--lm-eval", ANSWER, "--limit", "2")
    before = [(entry["task"], entry["filter"]) for entry in run.read_tasks()]
    in_process("eval", str(run.path), "--lm-eval", CHOICE, "--limit", "4")
    after = {(entry["task"], entry["filter"]): entry["difference"]["n"] for entry in run.read_tasks()}
    assert {*before, ("sums_choice", "none")} == {*after}
    assert after["sums_choice", "none"] == 4
    assert after["sums_answer", "strict"] == 2
    run.update_run(steps=99)
    assert run.read_tasks() == []


@needs_harness
@pytest.mark.slow
def test_what_cannot_be_scored_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / CHOICE).read_text()
    (tmp_path / "far.yaml").write_text(
        text.replace("dataset_path: json", "dataset_path: me/not-here").split("dataset_kw")[0]
    )
    with pytest.raises(
        EvaluationError, match=r"the data of .*far\.yaml is not in the local cache and HF_HUB_OFFLINE is"
    ):
        load_tasks([str(tmp_path / "far.yaml")], print)
    (tmp_path / "unsafe.yaml").write_text(f"{text}unsafe_code: true\n")
    with pytest.raises(EvaluationError, match="sums_choice: runs code that the model writes"):
        load_tasks([str(tmp_path / "unsafe.yaml")], print)
    known = SimpleNamespace(all_tasks=["gsm8k", "arc_easy"])  # the real list is read from thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: known)
    with pytest.raises(EvaluationError, match=r"'gsm8' is no task .* Did you mean gsm8k"):
        load_tasks(["gsm8"], print)
