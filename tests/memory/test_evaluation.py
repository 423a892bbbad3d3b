"""The evaluation's share of the plan: no more completions at once than fit, the same greedy answers with any number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_lite.engine import attention
from grpo_lite.engine.generate import generate_completions
from grpo_lite.evaluation import evaluate, probe
from grpo_lite.memory import fit as budgets
from grpo_lite.memory.evaluation import evaluation_phase, most_rows
from grpo_lite.memory.fit import available_bytes, rows_that_fit
from grpo_lite.memory.phases import CONTEXT_BYTES, FRAGMENTATION, GIB
from grpo_lite.memory.plan import cheapest_changes, needed_bytes, plan_memory
from grpo_lite.memory.report import plan_recipe, report_lines
from grpo_lite.models.device import Device, find_card
from grpo_lite.recipe.load import load_recipe
from grpo_lite.task.prompts import Prompts
from tests.memory.known_models import job_of, known_base

# Training then takes less than scoring 64 prompts at once.
SMALL_STEPS = ["grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=8"]


def waves(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many sequences go into each call of `generate`."""
    seen: list[int] = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(len(given["input_ids"])) or real(**given))
    return seen


@pytest.mark.parametrize("shared", [False, True], ids=["generate", "shared"])
def test_an_evaluation_begins_with_what_the_free_memory_holds_and_answers_the_same(
    shared: bool, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir, padding_side="left")
    if shared:
        attention.install(model)
    prompts = [tokenizer("ab" * n)["input_ids"] for n in (3, 9, 5, 1, 7, 2, 8)]
    longest = max(map(len, prompts))
    greedy = generate_completions(model, tokenizer, prompts, max_new_tokens=6)
    seen = waves(model, monkeypatch)
    given: dict[str, Any] = {"max_new_tokens": 6, "rows_that_fit": rows_that_fit}
    assert generate_completions(model, tokenizer, prompts, **given) == greedy
    assert seen == [7]  # on a CPU nothing is planned
    free = next(n for n in range(64 << 20, 80 << 20, 1 << 10) if holds(n, model, longest, shared, monkeypatch) == 3)
    monkeypatch.setattr(budgets, "available_bytes", lambda device: free)
    seen.clear()
    assert generate_completions(model, tokenizer, prompts, **given) == greedy
    assert seen == [3, 3, 1]
    seen.clear()
    sampled = generate_completions(model, tokenizer, prompts[:2], samples=4, **given)  # of one prompt, in two calls
    assert seen == [3, 3, 2]
    assert [len(group) for group in sampled] == [4, 4]
    seen.clear()
    generate_completions(model, tokenizer, prompts, max_new_tokens=6)
    assert seen == [7]


def holds(free: int, model: Any, longest: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patched:
        patched.setattr(budgets, "available_bytes", lambda device: free)
        return rows_that_fit(model, longest, 6, 7, shared)


def test_one_completion_is_always_tried_and_an_unknown_architecture_is_not_planned(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_model

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype="float32")
    assert available_bytes(model.device) is None
    assert holds(0, model, 10, True, monkeypatch) == 1
    assert holds(1 << 40, model, 10, True, monkeypatch) == 7
    assert holds(0, tiny_model("gpt2"), 10, False, monkeypatch) == 7


@pytest.mark.parametrize("limit", [1, 2, 5, 63, 64, 65, 1000])
def test_the_most_rows_are_found(limit: int) -> None:
    assert most_rows(64, lambda rows: rows <= limit) == min(64, limit)
    assert most_rows(64, lambda rows: False) == 1


def test_the_plan_lowers_the_evaluation_s_batch_to_what_fits_the_card() -> None:
    job = job_of(load_recipe("gsm8k", SMALL_STEPS))
    assert (job.eval_rows, job.eval_completion, job.eval_while_training) == (64, 512, False)
    wide, small = plan_memory(job, 16 * GIB), plan_memory(job, 3 * GIB)
    assert wide.chosen == {}
    assert wide.evaluation is not None
    assert wide.evaluation.total > wide.peak  # more than training itself
    assert small.fits
    assert list(small.chosen) == ["eval.batch_size"]
    rows = small.chosen["eval.batch_size"]
    assert 1 < rows < 64
    # It takes what there is, so the card needs no more for it; a single completion that is too long does count.
    assert small.needed == needed_bytes(replace(job, eval_rows=0), 3 * GIB)
    endless = replace(job, eval_completion=500_000)
    assert not plan_memory(endless, 8 * GIB).fits
    changes = [text for text in cheapest_changes(endless, 8 * GIB) if text.startswith("eval.max_new_tokens=")]
    assert plan_memory(replace(job, eval_completion=int(changes[0].partition("=")[2])), 8 * GIB).fits


def test_chosen_rows_are_the_most_that_fit() -> None:
    job = job_of(load_recipe("gsm8k", ["eval.batch_size=512", "eval.limit=null"]))
    for gib in (3, 4, 6, 10, 16, 24):
        plan = plan_memory(job, gib * GIB)
        assert plan.fits
        rows = plan.job.eval_rows

        def needed(count: int) -> float:
            phase = dict(evaluation_phase(replace(job, eval_rows=count)).items)
            beyond = sum(phase.values()) - phase["base weights"]
            return phase["base weights"] + beyond * (1 + FRAGMENTATION) + 0.45 * GIB

        assert needed(rows) <= gib * GIB * 1.0001
        assert rows == 512 or needed(rows + 1) > gib * GIB * 0.9999


@pytest.mark.parametrize(
    "overrides, rows",
    [
        ([], 64),
        (["eval.enabled=false"], 0),
        (["eval.limit=10", "eval.samples=0"], 10),
        (["eval.limit=10", "eval.samples=4"], 40),
        (["eval.batch_size=6", "eval.samples=4"], 6),
        (["eval.batch_size=2", "eval.samples=8"], 8),
        (["eval.batch_size=512", "eval.limit=null", "eval.samples=0"], 512),
    ],
)
def test_the_planned_rows_are_those_that_are_generated_at_once(overrides: list[str], rows: int) -> None:
    assert job_of(load_recipe("gsm8k", overrides)).eval_rows == rows


def test_scores_while_training_count_the_optimizer() -> None:
    after, between = (evaluation_phase(job_of(load_recipe("gsm8k", [f"eval.every={every}"]))) for every in (0, 5))
    assert set(dict(between.items)) - set(dict(after.items)) == {"optimizer"}


def test_the_report_shows_the_evaluation_as_a_phase() -> None:
    recipe, card = load_recipe("gsm8k"), find_card("3GiB")
    text = "\n".join(report_lines(recipe, card, plan_recipe(recipe, card)))
    assert "evaluation, " in text
    assert "completions of up to 512 at once: " in text
    assert "chosen: eval.batch_size=" in text
    off = load_recipe("gsm8k", ["eval.enabled=false"])
    assert "evaluation, " not in "\n".join(report_lines(off, card, plan_recipe(off, card)))


def test_a_run_says_the_batch_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda: int(2.6 * GIB))
    said: list[str] = []
    device = Device("cuda", "small", 4 * GIB, bfloat16=True, compute_capability=(8, 6), count=1)
    recipe = load_recipe("gsm8k", SMALL_STEPS)
    fitted = budgets.fit_to_device(recipe, known_base(recipe, device, tmp_path), 300, said.append)
    assert "chosen: eval.batch_size=" in said[0]
    assert fitted.grpo == {}


@pytest.mark.parametrize("fit", [True, False])
def test_evaluation_and_probe_ask_for_it_unless_the_recipe_plans_nothing(
    fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("smoke", [f"memory.fit={str(fit).lower()}"])
    asked: list[bool] = []

    class Asked(Exception):
        pass

    def generate(*_: Any, **given: Any) -> Any:
        asked.append(given["rows_that_fit"] is rows_that_fit)
        raise Asked

    rows = [{"prompt": "1+1=", "answer": "2"}]
    tokenizer = type("Tokenizer", (), {"__call__": lambda self, text, **_: {"input_ids": [1, 2]}})()
    for module in (evaluate, probe):
        monkeypatch.setattr(module, "generate_completions", generate)
        monkeypatch.setattr(module, "prompt_ids", lambda *_: [1, 2])
    with pytest.raises(Asked):
        evaluate.score_model(None, tokenizer, recipe, rows, print, "base")
    with pytest.raises(Asked):
        probe.probe_recipe(recipe, None, Prompts(rows, rows, tokenizer=tokenizer))
    assert asked == [fit, fit]


def test_a_cuda_device_counts_what_is_reserved_but_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert available_bytes(torch.device("cuda", 0)) == 1500


def test_a_plan_counts_the_memory_that_an_earlier_model_of_this_process_has_left_in_pytorchs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probe, then train, in one notebook: a 15 GiB card with 9 GiB of the probe's memory still reserved, 1 GiB used."""
    card = {"free": 5 * GIB, "reserved": 9 * GIB, "allocated": 1 * GIB}
    calls: list[str] = []

    def empty_cache() -> None:  # half of it is in blocks that the allocator cannot give back
        calls.append("empty_cache")
        card.update(free=card["free"] + 4 * GIB, reserved=card["reserved"] - 4 * GIB)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        calls.append("mem_get_info")
        return card["free"], 15 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: card["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: card["allocated"])
    device = Device("cuda", "Tesla T4", 15 * GIB, bfloat16=False, compute_capability=(7, 5), count=1)
    planned: list[int] = []
    real = budgets.plan_memory
    monkeypatch.setattr(budgets, "plan_memory", lambda job, size: planned.append(size) or real(job, size))
    lines: list[str] = []
    recipe = load_recipe("gsm8k")
    budgets.fit_to_device(recipe, known_base(recipe, device, tmp_path), 300, lines.append)
    # 9 GiB free after the cache is emptied, 5 GiB still reserved of which 1 is used, and the context that exists.
    assert planned[0] == 13 * GIB + CONTEXT_BYTES
    assert calls[:2] == ["empty_cache", "mem_get_info"]
    assert f"of {planned[0] / GIB:.1f} GiB planned" in lines[0]
