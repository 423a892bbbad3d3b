"""The run doctor: each problem on a real run of a tiny model that has it, and no finding on a healthy run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from grpo_lite.recipe.load import apply_override, build_recipe, load_recipe, read_yaml, recipe_names
from grpo_lite.recipe.overrides import twice_the_cap, twice_the_group
from grpo_lite.report import diagnoses, hacking
from grpo_lite.report.doctor import (
    TABLE,
    OnceUntilItChanges,
    diagnose,
    examine,
    forget_findings_after,
    nothing_found,
    state_finding,
    stated_findings,
    troubleshooting,
)
from grpo_lite.report.evidence import Evidence, Finding, read_evidence
from grpo_lite.report.facts import read_page, stated_rows
from grpo_lite.report.watch import read_board, watch_lines
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.session.records import RunDoctor
from grpo_lite.session.views import View, make_view
from grpo_lite.train import train_run
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.report.test_episodes import CASES as EPISODES
from tests.report.test_warmup import PROVEN
from tests.run_files import write_run

ROOT = Path(__file__).resolve().parents[2]

# Rewards as a user writes them. A random model of bytes can learn to write certain bytes within ten steps.
REWARDS = """
import hashlib

def _texts(completions):
    return [c[0]["content"] for c in completions]

def _noise(text):  # two values without a pattern that could be learnt
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % 2

def learnable(completions, **kwargs):
    return [sum(ord(ch) < 79 for ch in t) / max(len(t), 1) for t in _texts(completions)]

def noise(completions, **kwargs):
    return [0.2 * _noise(t) for t in _texts(completions)]

def form(completions, **kwargs):
    return learnable(completions)

def ended(completions, completion_ids, **kwargs):
    return [float(len(ids) < 8) for ids in completion_ids]

def same(completions, prompts, **kwargs):
    return [0.1 * (len(str(p)) % 3) for p in prompts]

def nothing(completions, **kwargs):
    return [0.0 for _ in completions]

def short(completions, completion_ids, **kwargs):
    return [-len(ids) / 10 for ids in completion_ids]

def long(completions, completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]

def any_answer(completions, answer, **kwargs):
    return [float(t.count("boxed") > 2) for t in _texts(completions)]

def tag_count(completions, **kwargs):
    return [0.25 * min(4, t.count("<think>")) for t in _texts(completions)]

CALLS = [0]
def earthquake(completions, **kwargs):
    CALLS[0] += 1
    return [(1000.0 if CALLS[0] == 8 else 1.0) * _noise(t) for t in _texts(completions)]
"""
OVERRIDES = [
    "grpo.max_steps=8", "grpo.max_completion_length=8", "grpo.learning_rate=0.02",
    "grpo.per_device_train_batch_size=16", "grpo.beta=0", "check.enabled=false",
    "grpo.gradient_checkpointing=false", "grpo.save_steps=100", "eval.enabled=false", "merge=false",
    "log.sample_every=0", "grpo.lr_scheduler_type=constant", "model.load_in=32bit",
]  # fmt: skip


@dataclass
class Case:
    """A problem: the recipe's changes, and a script of completions if the model is too random to have it."""

    key: str | None
    rewards: list[str] = field(default_factory=lambda: ["learnable"])
    overrides: tuple[str, ...] = ()
    script: Callable[[int, random.Random], str] | None = None  # of the step
    golds: list[str] = field(default_factory=list)  # of the rows, in turn; without any: sums
    sharpen: bool = False  # from the fifth step on the model's logits are made ten times as large
    says: str = ""
    override: str | None = None


def words(count: int, rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(count))


CASES = [
    Case(None, overrides=("grpo.max_steps=14", "grpo.learning_rate=0.05")),
    Case(None, ["rewards.accuracy_reward"], ("grpo.max_completion_length=30",), golds=["2\\sqrt{3}"],
         script=lambda s, r: "\\boxed{\\sqrt{12}}" if r.random() < 0.1 + 0.1 * s else "\\boxed{\\sqrt{8}}"),
    Case("truncation", ["ended"], script=lambda s, r: words(r.choice([3, 20, 20, 20]), r),
         says="are cut off at 8 tokens; those get a reward of 0.00, finished ones 1.00",
         override="grpo.max_completion_length=16"),
    Case("zero_reward", ["nothing"], says="cut off at 8 tokens, before an answer",
         override="grpo.max_completion_length=16"),
    Case("zero_reward", ["rewards.accuracy_reward"], script=lambda s, r: words(5, r),
         says="the parser finds no committed answer",
         override="rewards[0].kwargs.extract=[answer_tag,boxed,hash,phrase,last_number]"),
    Case("zero_reward", ["rewards.accuracy_reward"], ("grpo.max_completion_length=40",),
         script=lambda s, r: words(4, r) + "</think> \\boxed{99}", says="the template has already written <think>",
         override="rewards[0].kwargs.prefilled=true"),
    Case("zero_reward", ["rewards.accuracy_reward"], ("grpo.max_completion_length=20",),
         script=lambda s, r: f"\\boxed{{{r.randint(200, 300)}}}", says="too hard for this model",
         override="grpo.num_generations=8"),
    Case("zero_part", ["noise", "rewards.format_reward"], ("grpo.max_completion_length=60",),
         script=lambda s, r: words(4, r) + "</think>\n<answer>4</answer>", says="format_reward has been 0 in all",
         override="rewards[1].kwargs.prefilled=true"),
    Case("equal_groups", ["same"], says="In 100% of the groups all completions have the same reward, so they give no",
         override="grpo.num_generations=8"),
    Case("format_up_accuracy_flat", ["noise", "form"], ("grpo.max_steps=16", "grpo.learning_rate=0.04",
         "rewards[0].weight=0"), says="form rose from", override="rewards[1].gate=true"),
    Case("length_collapse", ["noise", "short"], ("grpo.max_completion_length=40",),
         script=lambda s, r: words(30 - 3 * s, r), says="Completions shrank from", override="grpo.beta=0.04"),
    Case("length_growth", ["noise", "long"], ("grpo.max_completion_length=40",),
         script=lambda s, r: words(6 + 3 * s, r), says="Completions grew from",
         override="grpo.mask_truncated_completions=true"),
    Case("entropy_collapse", ["noise"], ("grpo.learning_rate=0.003",), sharpen=True, says="Entropy fell from 1.",
         override="grpo.learning_rate=0.001"),
    Case("kl_blow_up", overrides=("grpo.learning_rate=0.05", "grpo.beta=0.0001", "grpo.max_steps=14"),
         says="nats a token: the policy is far from its base", override="grpo.learning_rate=0.02 grpo.beta=0.04"),
    Case("grad_norm_spikes", ["earthquake"], ("grpo.scale_rewards=none", "grpo.max_steps=10", "grpo.learning_rate=1e-4",
         "grpo.max_grad_norm=1000000"), says="steps had a gradient norm up to"),
    Case("learning_rate_too_low", overrides=("grpo.learning_rate=1e-6",), says="The learning rate 1e-06 is for full",
         override="grpo.learning_rate=2e-5"),
    Case("unusable_golds", ["rewards.accuracy_reward"], ("grpo.max_completion_length=20",), golds=["2", ""],
         script=lambda s, r: f"\\boxed{{{r.choice([2, 3])}}}",
         says="of the completions answer a prompt whose gold answer cannot be used"),
    Case("judge_timeouts", ["rewards.accuracy_reward"], ("grpo.max_completion_length=60",
         "rewards[0].kwargs.timeout_s=0.05", "grpo.max_steps=5"), golds=["\\prod_{n=1}^{10^{8}} n"],
         script=lambda s, r: f"\\boxed{{\\prod_{{n={r.choice([1, 2])}}}^{{10^{{8}}}} n}}",
         says="of the answers took longer than 0.05 s, so they", override="rewards[0].kwargs.timeout_s=0.125"),
    Case("repeated_text", ["long"], ("grpo.max_completion_length=130",),
         script=lambda s, r: "and so on and " * r.randint(4, 8), says="repeat themselves, such as “and so on",
         override="rewards[1].function=rewards.repetition_penalty_reward rewards[1].weight=0.5"),
    Case("many_answers", ["any_answer"], ("grpo.max_completion_length=80",),
         script=lambda s, r: " ".join(f"\\boxed{{{i}}}" for i in range(r.choice([1, 2, 4, 5]))),
         says="commit to three or more answers", override="rewards[0].function=rewards.accuracy_reward"),
    Case("stuffed_tags", ["noise", "tag_count"], ("grpo.max_completion_length=80",),
         script=lambda s, r: "<think>" * r.choice([1, 4, 5]) + words(3, r), says="repeat tags",
         override="rewards[1].function=rewards.format_reward"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def teachable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with embeddings six times as large: its own are too small to prefer any token by much."""
    from safetensors.torch import load_file, save_file

    from grpo_lite.models.embedded import make_tiny_model

    folder = tmp_path_factory.mktemp("teachable")
    make_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    OVERRIDES[:] = [o for o in OVERRIDES if not o.startswith("model.id=")] + [f"model.id={folder}"]
    return folder


def train(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDir, list[str]]:
    """Run a case: real rewards, trainer and metrics; only scripted completions are not the model's own."""
    (folder / "mine.py").write_text(REWARDS)
    raw = read_yaml(ROOT / "recipes" / "smoke.yaml")
    raw["name"] = "sick"
    raw["rewards"] = [{"function": name if "." in name else f"{folder / 'mine.py'}:{name}"} for name in case.rewards]
    if case.golds:
        rows = [{"question": f"{i} and {i}", "answer": case.golds[i % len(case.golds)]} for i in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw["data"]["train"] = {"path": str(folder / "rows.jsonl")}
    for override in [*OVERRIDES, *case.overrides]:
        apply_override(raw, override)
    if case.script:
        monkeypatch.setattr(PackedGRPOTrainer, "_generate_single_turn", scripted(case.script))
    if case.sharpen:
        monkeypatch.setattr(PackedGRPOTrainer, "_generate_single_turn", sharpened())
    monkeypatch.setattr("grpo_lite.report.page.write_report", lambda run: run.path)  # tested elsewhere
    said: list[str] = []
    run = RunDir(folder / "run")
    train_run(build_recipe(raw, "test"), run, said.append)
    return run, said


def scripted(script: Callable[[int, random.Random], str]) -> Callable[..., Any]:
    rng = random.Random(0)

    def generate(self: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        self.rollouts.last = None
        cap = self.max_completion_length
        texts = [script(self.state.global_step, rng) for _ in prompt_ids]
        ids = [[*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id][:cap] for text in texts]
        return ids, None

    return generate


def sharpened() -> Callable[..., Any]:
    original = PackedGRPOTrainer._generate_single_turn

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            with torch.no_grad():
                self.model.get_output_embeddings().weight.mul_(10)
        return original(self, *args, **kwargs)

    return generate


QUICK = (None, "truncation", "zero_part")  # the others really train too, and CI runs them
ALL = [pytest.param(c, id=f"{c.key}-{c.says[:24]}", marks=[pytest.mark.slow] * (c.key not in QUICK)) for c in CASES]


@pytest.mark.parametrize("case", ALL)
def test_a_real_run_with_the_problem_is_diagnosed_and_a_healthy_one_is_not(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = train(case, tmp_path, monkeypatch)
    found = {finding.key: finding for finding in examine(run)}
    if case.key is None:
        assert found == {}
        assert not [line for line in said if line.startswith("doctor")]
        assert read_evidence(run).rise("reward") > 0.2  # it did learn
        return
    finding = found[case.key]
    assert case.says in finding.sentence
    assert finding.override == case.override or case.override is None
    live = [line for line in said if line.startswith("doctor") and case.says in line]
    assert len(live) == 1, said  # reported during the run, once
    assert case.key in {record["key"] for record in stated_findings(run)}


@pytest.mark.parametrize("case", [c for c in CASES if c.override], ids=lambda c: f"{c.key}-{c.says[:24]}")
def test_every_override_to_paste_is_one_that_the_recipe_takes(case: Case) -> None:
    recipe = ROOT / "recipes" / "gsm8k.yaml"  # two rewards, as the cases have
    assert case.override is not None
    overrides = case.override.split()
    if "rewards[1].function=rewards.repetition" in case.override:  # one reward there, two here
        overrides = [override.replace("rewards[1]", "rewards[2]") for override in overrides]
    load_recipe(str(recipe), overrides)


def sums(**settings: Any) -> Evidence:
    return Evidence(load_recipe(str(ROOT / "recipes" / "smoke.yaml"), [f"{k}={v}" for k, v in settings.items()]), [])


def steps(count: int, **series: Callable[[int], float | None]) -> list[dict[str, Any]]:
    return [{key.replace("__", "/"): value(i) for key, value in series.items()} | {"step": i} for i in range(count)]


def test_a_reward_that_rises_while_the_held_out_score_does_not_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("reward_without_progress", overrides=(
        "grpo.max_steps=14", "grpo.learning_rate=0.05", "eval.enabled=true", "eval.limit=8", "eval.samples=0",
        "eval.lenient={function: rewards.accuracy_reward}"))  # fmt: skip
    run, _ = train(case, tmp_path, monkeypatch)
    (finding,) = examine(run)
    assert finding.key == "reward_without_progress"
    assert "but the held-out score did not (0.00 → 0.00)" in finding.sentence
    assert finding.override == "grpo.beta=0.04"


def test_float16_steps_left_out_by_a_real_grad_scaler_are_counted() -> None:
    """No trainer runs in float16 on a CPU, so the scaler and its gradients are real, and the loop is the test's."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1)
    norms = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (weight.half() * torch.full((4,), 200.0, dtype=torch.float16)).sum().float()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(float(weight.grad.norm()) if weight.grad is not None else math.nan)
        scaler.step(optimizer)
        scaler.update()
    assert sum(not math.isfinite(norm) for norm in norms) >= 3
    gpu = {"kind": "cuda", "bfloat16": False}
    sick = replace(sums(), steps=steps(12, reward=lambda i: 0.5, grad_norm=lambda i: norms[i]), device=gpu)
    finding = diagnoses.fp16_scale_skips(sick)
    assert finding is not None
    assert "were skipped because gradients overflowed float16" in finding.sentence
    in_bfloat16 = replace(sick, device={"kind": "cuda", "bfloat16": True})
    assert diagnoses.fp16_scale_skips(in_bfloat16) is None
    healthy = replace(sick, steps=steps(12, reward=lambda i: 0.5, grad_norm=lambda i: math.inf if i < 2 else 1.0))
    assert diagnoses.fp16_scale_skips(healthy) is None


def test_truncation_that_costs_no_reward_is_left_alone() -> None:
    # the recipe sums: four tokens of few-shot text, always cut off, and paid all the same
    part = "rewards__accuracy_reward__mean"
    paid = steps(8, reward=lambda i: i / 8, completions__clipped_ratio=lambda i: 1.0, **{part: lambda i: i / 8})
    assert diagnose(replace(sums(), steps=paid)) == []


def test_solved_prompts_are_called_solved() -> None:
    part = "rewards__accuracy_reward__mean"
    solved = steps(8, reward=lambda i: 1.0, frac_reward_zero_std=lambda i: 1.0, **{part: lambda i: 1.0})
    (finding,) = diagnose(replace(sums(), steps=solved))
    assert "are solved" in finding.sentence
    assert "Train on harder rows" in finding.sentence
    assert finding.override is None


@pytest.mark.parametrize("key, function", [("unusable_gold", diagnoses.unusable_golds),
                                           ("timeout", diagnoses.judge_timeouts)])  # fmt: skip
def test_a_few_golds_that_cannot_be_used_and_a_rare_time_out_are_left_alone(key: str, function: Any) -> None:
    part = "rewards__accuracy_reward__mean"
    some = {f"accuracy_reward__{key}": lambda i: 0.2, part: lambda i: 0.5, "reward": lambda i: 0.5}
    few = {**some, f"accuracy_reward__{key}": lambda i: 0.01}
    assert "20%" in function(replace(sums(), steps=steps(6, **some))).sentence
    assert function(replace(sums(), steps=steps(6, **few))) is None


def held_out_run(scores: list[float | None], rewards: list[float]) -> Evidence:
    part = "rewards/accuracy_reward/mean"
    records = [{"step": i, "reward": r, part: r} for i, r in enumerate(rewards)]
    for record, score in zip(records, scores, strict=True):
        if score is not None:
            record["heldout/lenient"] = score
    return replace(sums(), steps=records)


def test_a_held_out_score_taken_after_the_reward_had_risen_is_no_suspicion() -> None:
    rewards = [0.1, 0.2, 0.4, 0.6, 0.8] + [0.8] * 15
    late = [None] * 9 + [0.8] + [None] * 5 + [0.79] + [None] * 4
    assert diagnose(held_out_run(late, rewards)) == []
    rising = [0.1 + 0.04 * i for i in range(20)]
    (finding,) = diagnose(held_out_run([0.3 if i % 5 == 0 else None for i in range(20)], rising))
    assert finding.key == "reward_without_progress"
    assert "but the held-out score did not (0.30 → 0.30)" in finding.sentence


def test_a_spike_that_clipping_already_tames_is_left_alone() -> None:
    norms = [0.2] * 11 + [50.0]
    spiky = replace(sums(), steps=steps(12, reward=lambda i: i / 12, grad_norm=lambda i: norms[i]))
    assert diagnoses.grad_norm_spikes(spiky) is None  # clipped at 1.0: five times the median
    assert diagnoses.grad_norm_spikes(replace(spiky, recipe=sums(**{"grpo.max_grad_norm": 100}).recipe)) is not None


@pytest.mark.parametrize(
    "median, spike, expected",
    [(0.083, 50.0, 0.1), (0.24, 50.0, 0.2), (0.004, 2.0, 0.01), (40.0, 1000.0, 1.0), (8e-5, 0.5, None)],
    ids=["rounded up", "rounded down", "not below a hundredth", "not above TRL's default", "next to no gradient"],
)
def test_the_advised_clipping_is_a_value_that_one_would_type(
    median: float, spike: float, expected: float | None
) -> None:
    norms = [median] * 11 + [spike]
    spiky = replace(sums(**{"grpo.max_grad_norm": 1000}),
                    steps=steps(12, reward=lambda i: i / 12, grad_norm=lambda i: norms[i]))  # fmt: skip
    finding = diagnoses.grad_norm_spikes(spiky)
    assert (finding and finding.override) == (expected and f"grpo.max_grad_norm={expected:g}")


def test_where_rewards_are_constant_gradients_near_zero_call_for_no_clipping() -> None:
    norms = [8e-5] * 10 + [0.3] + [8e-5] * 5
    constant = {"reward": lambda i: 0.5, PART: lambda i: 0.5, "frac_reward_zero_std": lambda i: 1.0}
    still = replace(sums(), steps=steps(16, grad_norm=lambda i: norms[i], **constant))
    assert [finding.key for finding in diagnose(still)] == ["equal_groups"]
    # one step in four has a signal: the others' gradients are no measure of it
    rare = {**constant, "frac_reward_zero_std": lambda i: 0.5 if i % 4 == 0 else 1.0}
    mixed = steps(40, grad_norm=lambda i: 0.2 if i % 4 == 0 else 8e-5, **rare)
    assert diagnoses.grad_norm_spikes(replace(sums(), steps=mixed)) is None


@pytest.mark.parametrize(
    "rate, expected",
    [(2e-5, "grpo.learning_rate=5e-06"), (3e-4, "grpo.learning_rate=0.0001"), (6e-6, "grpo.learning_rate=5e-06"),
     (5e-6, None)],
)  # fmt: skip
def test_a_lower_learning_rate_is_a_round_one_that_still_teaches_lora(rate: float, expected: str | None) -> None:
    entropy = [1.0, 1.0, 0.9, 0.5, 0.1, 0.05, 0.05, 0.05]
    collapsed = steps(8, reward=lambda i: 0.5, entropy=lambda i: entropy[i], **{PART: lambda i: 0.5})
    finding = diagnoses.entropy_collapse(replace(sums(**{"grpo.learning_rate": rate}), steps=collapsed))
    assert finding is not None
    assert finding.override == expected


def test_groups_that_stay_equal_after_refilling_are_judged_by_the_refilled_share() -> None:
    part = "rewards__accuracy_reward__mean"
    flat = steps(8, reward=lambda i: 0.5, frac_reward_zero_std=lambda i: 1.0, refill__frac_without_signal=lambda i: 0.9,
                 **{part: lambda i: 0.5})  # fmt: skip
    (finding,) = diagnose(replace(sums(**{"sampling.refill": 2}), steps=flat))
    assert finding.override == "grpo.num_generations=8"


def test_nothing_is_said_before_there_are_a_few_steps_or_about_missing_metrics() -> None:
    assert diagnose(replace(sums(), steps=steps(3, reward=lambda i: 0.0))) == []
    assert diagnose(replace(sums(), steps=steps(9, reward=lambda i: 0.5))) == []
    assert diagnose(replace(sums(), steps=steps(9, reward=lambda i: 0.5, kl=lambda i: None))) == []


def test_a_finding_is_said_once_until_it_changes() -> None:
    once = OnceUntilItChanges(gone_for=2)
    first, other = Finding("a", "one", "x=1"), Finding("a", "one", "y=2")
    assert once.news([first]) == [first]
    assert once.news([replace(first, sentence="with other figures", override="x=2")]) == []
    assert once.news([other]) == [other]  # other advice
    assert once.news([]) == []
    assert once.news([other]) == []  # a short absence is a figure at its limit
    assert [once.news([]) for _ in range(3)] == [[], [], []]
    assert once.news([other]) == [other]


def follow_zero_reward(run: RunDir, count: int) -> tuple[View, list[str]]:
    """Let the doctor follow a run whose first reward is 0 in six steps and rises from then on."""
    said: list[str] = []
    view = make_view("plain", run.load_recipe(), said.append)
    doctor = RunDoctor(run, run.load_recipe(), view, list)
    doctor.on_train_begin(None, TrainerState(), None)
    for step in range(1, count + 1):
        value = max(0.0, 0.05 * (step - 6))
        logs = {"reward": value, "rewards/accuracy_reward/mean": value}
        with run.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **logs}) + "\n")
        doctor.on_log(TrainingArguments(logging_steps=1), TrainerState(global_step=step), None, logs=logs)
    return view, said


@pytest.fixture
def bare_run(tmp_path: Path) -> RunDir:
    run = write_run(tmp_path / "run", steps=1)
    run.metrics_file.write_text("")
    return run


def test_the_board_shows_a_finding_with_today_s_figures_and_only_while_it_is_the_case(bare_run: RunDir) -> None:
    view, said = follow_zero_reward(bare_run, 6)
    (finding,) = view.board.findings
    assert "accuracy_reward has been 0 in all 6 steps" in finding.sentence
    assert ["all 4 steps" in line for line in said if line.startswith("doctor")] == [True]  # stated once
    assert read_board(bare_run).findings == [finding]  # `watch` shows the same
    bare_run.metrics_file.write_text("")
    view, _ = follow_zero_reward(bare_run, 7)
    assert view.board.findings == []
    assert read_board(bare_run).findings == []


def test_the_end_of_a_finding_is_stated_and_the_report_says_when_it_was_the_case(bare_run: RunDir) -> None:
    _, said = follow_zero_reward(bare_run, 20)
    spoken = [line for line in said if line.startswith("doctor")]
    assert len(spoken) == 2
    assert spoken[1].startswith("doctor: no longer the case, last at step 6: accuracy_reward has been 0 in all 6 steps")
    (record,) = stated_findings(bare_run)
    assert (record["step"], record["until"]) == (4, 6)
    (row,) = stated_rows(read_page(bare_run))
    assert row["when"] == "steps 4–6, no longer"
    lines = list(watch_lines(bare_run))
    assert lines[4] == spoken[0]  # after the line of step 4
    assert lines[lines.index(spoken[1]) - 1].startswith("step 17/")  # ten steps without it: it is over


def test_a_finding_of_a_run_that_ended_soon_after_is_not_called_present(bare_run: RunDir) -> None:
    follow_zero_reward(bare_run, 8)
    assert [row["when"] for row in stated_rows(read_page(bare_run))] == ["step 4, no longer"]


def test_a_finding_that_lasts_to_the_end_is_reported_since_its_first_step(bare_run: RunDir) -> None:
    follow_zero_reward(bare_run, 6)
    assert [row["when"] for row in stated_rows(read_page(bare_run))] == ["since step 4"]


def test_a_resumed_run_forgets_what_was_stated_after_its_checkpoint(tmp_path: Path) -> None:
    run, said = RunDir(tmp_path), []
    for step in (3, 7):
        state_finding(run, Finding(f"k{step}", "Something.", "a=1"), step, said.append)
    forget_findings_after(run, 5)
    assert [record["key"] for record in stated_findings(run)] == ["k3"]
    assert said[0] == 'doctor: Something. Try: ARGS="a=1"'


def test_a_stage_s_own_finding_is_seen_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = train(Case(None, overrides=("grpo.max_steps=1",)), tmp_path, monkeypatch)
    own = Finding("out_of_memory", "The micro-batch was halved.", "grpo.per_device_train_batch_size=4")
    state_finding(run, own, 1, lambda line: None)
    assert examine(run) == [own]


def test_damaged_lines_of_a_killed_run_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = train(Case(None, overrides=("grpo.max_steps=1",)), tmp_path, monkeypatch)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "rew')
    assert len(read_evidence(run).steps) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "First add 3 and 4, which gives 7. Then take 7 twice, which gives 14. So the answer is 14.",
        "| 1 | 2 |\n|---|---|\n| 3 | 4 |\n| 5 | 6 |\nThe sum of the column is 9, and of the other one 12.",
        "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return f(f(x))\n\n\nprint(g(1), g(2), g(3))",
        r"<think>\boxed{3}? No: \boxed{4}.</think><answer>4</answer>",
    ],
    ids=["empty", "one digit", "prose", "table", "code", "second thoughts"],
)
def test_honest_texts_show_no_sign_of_hacking(text: str) -> None:
    assert not hacking.repeats_itself(text)
    assert not hacking.commits_often(text)
    assert not hacking.stuffs_tags(text)


def test_the_signs_are_cheap_on_long_completions() -> None:
    import time

    text = " ".join(str(i % 97) for i in range(20_000))
    begun = time.perf_counter()
    hacking.repeats_itself(text)
    assert time.perf_counter() - begun < 1


def test_every_row_of_the_table_is_proven_on_a_run_here() -> None:
    """`below_expected`, which needs a band and no model, is proven in tests/report/test_expected.py."""
    of_episodes = {name.split()[0] for name in EPISODES}
    proven = {case.key for case in CASES} | {"reward_without_progress", "fp16_scale_skips"} | PROVEN | of_episodes
    assert {row.key for row in TABLE} <= proven | {"below_expected"}


def test_the_troubleshooting_page_is_the_table_s() -> None:
    assert (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8") == troubleshooting()


def test_the_command_line_reads_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.command_line import in_process

    run, _ = train(Case(None, ["same"]), tmp_path, monkeypatch)
    assert 'Try: ARGS="grpo.num_generations=8"' in in_process("doctor", str(run.path))
    (run.path / "findings.jsonl").unlink()
    healthy = [{"step": i, "reward": 0.1 * i} for i in range(1, 6)]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in healthy))
    assert "nothing found wrong" in in_process("doctor", str(run.path))
    run.metrics_file.write_text(json.dumps(healthy[0]) + "\n")
    assert "1 step logged so far; the doctor needs at least 4" in in_process("doctor", str(run.path))
    assert "is not a run" in in_process("doctor", str(tmp_path / "nowhere"), expect=1)


def test_a_fault_of_the_doctor_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(evidence: Evidence) -> list[Finding]:
        if evidence.steps:
            raise ZeroDivisionError
        return []

    monkeypatch.setattr("grpo_lite.session.records.diagnose_grpo", broken)
    run, _ = train(Case(None, overrides=("grpo.max_steps=2",)), tmp_path, monkeypatch)
    assert run.read_run()["steps"] == 2
    assert "training continues" in caplog.text


PART = "rewards__accuracy_reward__mean"


def test_nothing_is_called_healthy_that_has_not_been_looked_at() -> None:
    assert nothing_found(sums()).startswith("no steps logged so far")
    assert nothing_found(replace(sums(), steps=steps(4, reward=lambda i: 0.5))).startswith("nothing found wrong")


@pytest.mark.parametrize(
    "means, spread, expected",
    [
        ([-1.0] * 6, 0.0, "accuracy_reward has been -1 in all 5 steps"),
        ([-1.0, -0.9, -0.8, -0.7, -0.6, -0.5], 0.3, None),
        ([0.0] * 6, 0.7, None),
    ],
    ids=["always at the bottom", "negative and rising", "centred in every batch"],
)
def test_only_a_first_reward_that_never_moves_is_called_stuck(
    means: list[float], spread: float, expected: str | None
) -> None:
    series = {PART: lambda i: means[i], "rewards__accuracy_reward__std": lambda i: spread}
    found = diagnoses.zero_reward(replace(sums(), steps=steps(6, reward=lambda i: means[i], **series)))
    assert (found and found.sentence.startswith(expected or "?")) == (None if expected is None else True)


def test_a_penalty_that_never_applies_is_no_problem() -> None:
    zero = steps(6, reward=lambda i: 0.5, rewards__accuracy_reward__mean=lambda i: 0.5, rewards__f__mean=lambda i: 0.0)
    for weight, expected in ((1, True), (0, False), (-1, False)):
        with_part = sums(**{"rewards[1].function": "mine.py:f", "rewards[1].kwargs": "{}", "rewards[1].weight": weight})
        assert bool(diagnoses.zero_part(replace(with_part, steps=zero))) is expected
    alone = sums(rewards="[{function: rewards.repetition_penalty_reward}]")
    never = steps(6, reward=lambda i: 0.0, rewards__repetition_penalty_reward__mean=lambda i: 0.0)
    assert diagnoses.zero_reward(replace(alone, steps=never)) is None


def test_a_gated_reward_is_not_blamed_for_a_gate_that_never_opens() -> None:
    nothing = steps(6, reward=lambda i: 0.0, rewards__accuracy_reward__mean=lambda i: 0.0,
                    rewards__format_reward__mean=lambda i: 0.0)  # fmt: skip
    gated = sums(**{"rewards[1].function": "rewards.format_reward", "rewards[1].kwargs": "{}", "rewards[1].gate": True})
    assert [finding.key for finding in diagnose(replace(gated, steps=nothing))] == ["zero_reward"]


def test_a_larger_cap_is_told_to_the_rewards_that_know_it() -> None:
    recipe = sums().recipe  # its soft_overlong_punishment is told of the cap of 8 tokens
    override = twice_the_cap(recipe)
    assert override == "grpo.max_completion_length=16 rewards[1].kwargs.max_completion_length=16"
    assert recipe.rewards[1].kwargs["max_completion_length"] == recipe.max_completion_length


@pytest.mark.parametrize(
    "name, more",
    [*((name, []) for name in recipe_names()), ("smoke", ["grpo.steps_per_generation=3"]),
     ("smoke", ["grpo.generation_batch_size=24"])],
)  # fmt: skip
def test_twice_the_group_is_advised_in_a_way_that_every_recipe_takes(name: str, more: list[str]) -> None:
    path = str(ROOT / "recipes" / f"{name}.yaml")
    recipe = load_recipe(path, more)
    advised = load_recipe(path, [*more, *twice_the_group(recipe).split()])
    assert advised.num_generations == 2 * recipe.num_generations
    assert advised.schedule.batch >= recipe.schedule.batch


def test_a_reward_of_a_larger_scale_is_not_called_solved_half_way() -> None:
    rows = [{"step": 7, "prompt": "p", "completion": "c", "reward": r, "rewards": {"accuracy_reward": r}}
            for r in (1.0, 10.0)]  # fmt: skip
    half = replace(
        sums(), steps=steps(8, reward=lambda i: 5.0, frac_reward_zero_std=lambda i: 1.0, **{PART: lambda i: 5.0})
    )
    assert "are solved" not in diagnose(replace(half, completions=rows))[0].sentence


def test_cut_completions_that_earn_more_than_finished_ones_are_left_alone_below_zero_too() -> None:
    def row(cut: bool, paid: float) -> dict[str, Any]:
        return {"step": 7, "prompt": "p", "completion": "c", "truncated": cut, "reward": paid,
                "rewards": {"accuracy_reward": paid}}  # fmt: skip

    moving = steps(8, reward=lambda i: -0.4 + i / 100, completions__clipped_ratio=lambda i: 0.5,
                   **{PART: lambda i: -0.4 + i / 100})  # fmt: skip
    for cut, whole, expected in ((-0.3, -0.5, None), (-0.9, -0.2, "truncation")):
        rows = [row(True, cut)] * 8 + [row(False, whole)] * 8
        found = diagnoses.truncation(replace(sums(), steps=moving, completions=rows))
        assert (found and found.key) == expected


def test_a_kl_that_is_infinite_is_a_blow_up() -> None:
    kl = [0.1, 0.2, 0.3, 0.4, math.inf, math.inf]
    found = diagnoses.kl_blow_up(replace(sums(), steps=steps(6, reward=lambda i: 0.5, kl=lambda i: kl[i])))
    assert found is not None


def test_skipped_steps_are_counted_by_the_scaler_where_it_is_logged() -> None:
    gpu = {"kind": "cuda", "bfloat16": False}
    of_few, of_many = (
        replace(sums(), device=gpu, steps=steps(16, reward=lambda i: 0.5, optimizer_steps_skipped=count))
        for count in (lambda i: float(min(i, 3)), lambda i: i / 2)
    )
    assert diagnoses.fp16_scale_skips(of_few) is None  # three at the start
    finding = diagnoses.fp16_scale_skips(of_many)
    assert finding is not None
    assert finding.sentence.startswith("4 of the last 8 steps")


def test_a_run_without_a_gradient_norm_is_not_taken_for_one_that_overflows() -> None:
    silent = replace(sums(), device={"kind": "cuda", "bfloat16": False}, steps=steps(12, reward=lambda i: 0.5))
    assert diagnoses.fp16_scale_skips(silent) is None


def test_golds_of_which_none_can_be_used_are_named_though_no_step_has_a_reward() -> None:
    unusable = steps(6, reward=lambda i: None, accuracy_reward__unusable_gold=lambda i: 1.0)
    (finding,) = diagnose(replace(sums(), steps=unusable))
    assert finding.sentence.startswith("100% of the completions answer a prompt whose gold answer cannot be used")


def test_lengthening_runs_that_leave_out_cut_completions_already_get_other_advice() -> None:
    growing = steps(8, reward=lambda i: 0.5, completions__mean_length=lambda i: 4.0 + 4 * i, **{PART: lambda i: 0.5})
    masked = {"grpo.mask_truncated_completions": True}
    found = diagnoses.length_growth(replace(sums(**masked), steps=growing))
    assert found is not None
    assert found.override == "rewards[1].weight=0.2"  # twice that of its soft_overlong_punishment
    alone = sums(rewards="[{function: rewards.accuracy_reward}]", **masked)
    found = diagnoses.length_growth(replace(alone, steps=growing))
    assert found is not None
    assert found.override is not None
    load_recipe(str(ROOT / "recipes" / "smoke.yaml"), ["rewards=[{function: rewards.accuracy_reward}]",
                                                       *found.override.split()])  # fmt: skip


@pytest.mark.parametrize(
    "text, many",
    [
        ("1 2 3 4 5 6 7 8 9 10", True),
        ("The answer is 4. The answer is 5. The answer is 6.", True),
        ("<think>\\boxed{1} \\boxed{2} \\boxed{3}</think><answer>3</answer>", False),
        ("2+3=5\n4+4=8\n6+1=7\n9+8=17", False),
        ("1,234,567,890,123,456", False),
        ("The answer is 4. To check: 2 + 2 is 4, so the answer is 4.", False),
    ],
    ids=["a list", "phrases", "second thoughts", "sums", "one large number", "said twice"],
)
def test_a_list_of_answers_is_told_from_an_honest_text(text: str, many: bool) -> None:
    assert hacking.commits_often(text) is many


def paid_rows(text: str, answer: str | None = None) -> list[dict[str, Any]]:
    return [{"step": 7, "prompt": "p", "completion": text, "answer": answer, "reward": 1.0,
             "rewards": {"accuracy_reward": 1.0, "f": 1.0}}] * 10  # fmt: skip


def test_a_list_is_no_sign_where_a_list_is_asked_for_or_the_last_answer_counts() -> None:
    own = sums(**{"rewards[0].function": "mine.py:f", "rewards[0].kwargs": "{}"})
    for evidence, gold, expected in (
        (own, "5", True), (own, "12 numbers\n#### 5", True), (own, "1, 2, 3, 4, 5", False), (sums(), "5", False),
    ):  # fmt: skip
        found = hacking.many_answers(replace(evidence, completions=paid_rows("1, 2, 3, 4, 5", gold)))
        assert (found is not None) is expected, gold


def test_tags_of_the_recipe_s_own_are_looked_for() -> None:
    own = sums(**{"rewards[1].function": "rewards.format_reward", "rewards[1].kwargs": "{tags: [work, result]}"})
    rows = paid_rows("<work><work><work>4")
    assert hacking.stuffed_tags(replace(own, completions=rows)) is not None
    assert hacking.stuffed_tags(replace(sums(), completions=rows)) is None


def test_the_doctor_knows_a_reward_of_ours_under_every_dotted_name_and_no_other() -> None:
    rows = [{**row, "rewards": {"accuracy_reward": 0.0, "format_reward": 1.0}} for row in paid_rows("<think>" * 3)]
    for function, override in (
        ("rewards.format.format_reward", "rewards[1].weight=0"),
        ("mine.format_reward", "rewards[1].function=rewards.format_reward rewards[1].kwargs={}"),
    ):
        own = sums(**{"rewards[1].function": function, "rewards[1].kwargs": "{tags: [think]}"})
        found = hacking.stuffed_tags(replace(own, completions=rows))
        assert found is not None
        assert found.override == override


def test_a_finding_cannot_steer_the_terminal() -> None:
    rows = paid_rows("\x1b[2J\u202e" + "again and again " * 9)
    found = hacking.repeated_text(replace(sums(), completions=rows))
    assert found is not None
    assert "\x1b" not in found.sentence
    assert "\\u001b[2J\\u202e" in found.sentence


def test_rewards_are_known_by_the_recipe_s_names_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward given twice, and one whose function calls itself otherwise, are each logged, shown and examined."""
    monkeypatch.setitem(globals(), "REWARDS", REWARDS + "\ndef make():\n    def inner(completions, **kwargs):\n"
                        "        return noise(completions)\n    return inner\n\nmade = make()\n")  # fmt: skip
    run, said = train(Case(None, ["noise", "noise", "made"], ("grpo.max_steps=1",)), tmp_path, monkeypatch)
    assert run.load_recipe().reward_names == ["noise", "noise_1", "made"]
    (step,) = read_evidence(run).steps
    assert {f"rewards/{name}/mean" for name in ("noise", "noise_1", "made")} <= step.keys()
    (line,) = [line for line in said if line.startswith("step 1/1")]
    assert " noise_1 0." in line
    assert " made 0." in line


def test_completions_with_line_separators_of_unicode_are_read_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "recipe.yaml").write_text((ROOT / "recipes" / "smoke.yaml").read_text() + "name: smoke\n")
    (tmp_path / "completions").mkdir()
    text = "one\u2028two\u2029three\x85four\x0cfive"
    rows = [{"step": 1, "completion": text, "reward": 1.0, "rewards": {}}] * 3
    file = tmp_path / "completions" / "step_000001.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [row["completion"] for row in read_evidence(run).completions] == [text] * 3


def test_a_finding_cut_within_a_character_by_a_kill_costs_no_other(tmp_path: Path) -> None:
    run, said = RunDir(tmp_path), []
    state_finding(run, Finding("k", "One: “so”."), 1, said.append)
    file = tmp_path / "findings.jsonl"
    file.write_bytes(file.read_bytes() + '{"step": 2, "key": "“'.encode()[:-1])
    assert [record["key"] for record in stated_findings(run)] == ["k"]
