"""The run doctor: each disease on a real run of a tiny model that has it, silence on a healthy one."""

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

from grpo_lite import diagnoses, hacking
from grpo_lite.doctor import (
    TABLE,
    OnceUntilItChanges,
    diagnose,
    examine,
    forget_findings_after,
    state_finding,
    stated_findings,
    troubleshooting,
)
from grpo_lite.evidence import Evidence, Finding, read_evidence
from grpo_lite.recipe_load import build_recipe, load_recipe, read_yaml
from grpo_lite.run_dir import RunDir
from grpo_lite.train import train_run
from grpo_lite.trainer_rollout import RolloutGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent

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
    """A disease: the recipe's changes, and where the model is too random to have it, what it is made to write."""

    key: str | None
    rewards: list[str] = field(default_factory=lambda: ["learnable"])
    overrides: tuple[str, ...] = ()
    script: Callable[[int, random.Random], str] | None = None  # of the step
    sharpen: bool = False  # from the fifth step on the model's logits are made ten times as large
    says: str = ""
    override: str | None = None


def words(count: int, rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(count))


CASES = [
    Case(None, overrides=("grpo.max_steps=14", "grpo.learning_rate=0.05")),
    Case("truncation", ["ended"], script=lambda s, r: words(r.choice([3, 20, 20, 20]), r),
         says="are cut off at 8 tokens, and those earn 0.00 where finished ones earn 1.00",
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
         override="grpo.num_generations=16"),
    Case("zero_part", ["noise", "rewards.format_reward"], ("grpo.max_completion_length=60",),
         script=lambda s, r: words(4, r) + "</think>\n<answer>4</answer>", says="format_reward has been 0 for all",
         override="rewards[1].kwargs.prefilled=true"),
    Case("equal_groups", ["same"], says="In 100% of the groups all completions earn the same, so they give no",
         override="sampling.refill=4 sampling.difficulty=true"),
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
         says="nats a token: the model is leaving its language", override="grpo.learning_rate=0.02 grpo.beta=0.04"),
    Case("grad_norm_spikes", ["earthquake"], ("grpo.scale_rewards=none", "grpo.max_steps=10", "grpo.learning_rate=1e-4",
         "grpo.max_grad_norm=1000000"), says="steps had a gradient norm up to"),
    Case("learning_rate_too_low", overrides=("grpo.learning_rate=1e-6",), says="The learning rate 1e-06 is for full",
         override="grpo.learning_rate=2e-5"),
    Case("repeated_text", ["long"], ("grpo.max_completion_length=130",),
         script=lambda s, r: "and so on and " * r.randint(4, 8), says="repeat themselves, such as “and so on",
         override="rewards[1].function=rewards.repetition_penalty_reward rewards[1].weight=0.5"),
    Case("many_answers", ["any_answer"], ("grpo.max_completion_length=80",),
         script=lambda s, r: " ".join(f"\\boxed{{{i}}}" for i in range(r.choice([1, 2, 4, 5]))),
         says="commit to three or more answers", override="rewards[0].function=rewards.accuracy_reward"),
    Case("stuffed_tags", ["noise", "tag_count"], ("grpo.max_completion_length=80",),
         script=lambda s, r: "<think>" * r.choice([1, 4, 5]) + words(3, r), says="stuff in tags",
         override="rewards[1].function=rewards.format_reward"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def teachable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with embeddings six times as large: its own are too small to prefer any token by much."""
    from safetensors.torch import load_file, save_file

    from grpo_lite.base_model import make_tiny_model

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
    from grpo_lite.recipe_load import apply_override

    for override in [*OVERRIDES, *case.overrides]:
        apply_override(raw, override)
    if case.script:
        monkeypatch.setattr(RolloutGRPOTrainer, "_generate_single_turn", scripted(case.script))
    if case.sharpen:
        monkeypatch.setattr(RolloutGRPOTrainer, "_generate_single_turn", sharpened())
    monkeypatch.setattr("grpo_lite.report.write_report", lambda run: run.path)  # tested elsewhere
    said: list[str] = []
    run = RunDir(folder / "run")
    train_run(build_recipe(raw, "test"), run, said.append)
    return run, said


def scripted(script: Callable[[int, random.Random], str]) -> Callable[..., Any]:
    rng = random.Random(0)

    def generate(self: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        self._rollout = None
        cap = self.max_completion_length
        texts = [script(self.state.global_step, rng) for _ in prompt_ids]
        ids = [[*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id][:cap] for text in texts]
        return ids, None

    return generate


def sharpened() -> Callable[..., Any]:
    original = RolloutGRPOTrainer._generate_single_turn

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            with torch.no_grad():
                self.model.get_output_embeddings().weight.mul_(10)
        return original(self, *args, **kwargs)

    return generate


@pytest.mark.parametrize("case", CASES, ids=[f"{c.key}-{c.says[:24]}" for c in CASES])
def test_a_real_run_with_the_disease_is_diagnosed_and_a_healthy_one_is_not(
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
    assert len(live) == 1, said  # said while it ran, once
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
    # the quickstart: four tokens of few-shot text, always cut off, and paid all the same
    part = "rewards__accuracy_reward__mean"
    paid = steps(8, reward=lambda i: i / 8, completions__clipped_ratio=lambda i: 1.0, **{part: lambda i: i / 8})
    assert diagnose(replace(sums(), steps=paid)) == []


def test_solved_prompts_are_called_solved() -> None:
    part = "rewards__accuracy_reward__mean"
    solved = steps(8, reward=lambda i: 1.0, frac_reward_zero_std=lambda i: 1.0, **{part: lambda i: 1.0})
    (finding,) = diagnose(replace(sums(), steps=solved))
    assert "are solved" in finding.sentence
    assert finding.override == "sampling.difficulty=true"


@pytest.mark.parametrize("key, function", [("unusable_gold", diagnoses.unusable_golds),
                                           ("timeout", diagnoses.judge_timeouts)])  # fmt: skip
def test_golds_that_cannot_be_used_and_a_judge_out_of_time_are_named(key: str, function: Any) -> None:
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


def test_where_groups_are_refilled_already_more_completions_are_advised() -> None:
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
    proven = {case.key for case in CASES} | {
        "reward_without_progress", "fp16_scale_skips", "unusable_golds", "judge_timeouts",
    }  # fmt: skip
    assert {row.key for row in TABLE} <= proven


def test_the_troubleshooting_page_is_the_table_s() -> None:
    assert (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8") == troubleshooting()


def test_the_command_line_reads_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from command_line import in_process

    run, _ = train(Case(None, ["same"]), tmp_path, monkeypatch)
    assert 'Try: ARGS="sampling.refill=4 sampling.difficulty=true"' in in_process("doctor", str(run.path))
    run.metrics_file.write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    (run.path / "findings.jsonl").unlink()
    assert "nothing found wrong" in in_process("doctor", str(run.path))
    assert "is not a run" in in_process("doctor", str(tmp_path / "nowhere"), expect=1)


def test_a_fault_of_the_doctor_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(evidence: Evidence) -> list[Finding]:
        if evidence.steps:
            raise ZeroDivisionError
        return []

    monkeypatch.setattr("grpo_lite.progress.diagnose", broken)
    run, _ = train(Case(None, overrides=("grpo.max_steps=2",)), tmp_path, monkeypatch)
    assert run.read_run()["steps"] == 2
    assert "training goes on" in caplog.text
