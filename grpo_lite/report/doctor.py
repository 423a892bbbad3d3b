"""The run doctor: a table of diagnoses over a run's metrics and completions, live and afterwards (`doctor RUN`).

    evidence.py         diagnoses.py, hacking.py, warmup.py, episodes.py   here                    session/records.py
    Evidence, Finding   one small function for each diagnosis              the table, `diagnose`   live, once each

Any stage may report a finding of its own with `state_finding`. docs/troubleshooting.md is written from the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lite.files.atomic import write_atomic
from grpo_lite.files.records import read_json_lines
from grpo_lite.report import diagnoses, episodes, expected, hacking, warmup
from grpo_lite.report.evidence import FEWEST, GRPO, WARMUP, Evidence, Finding, read_evidence
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


@dataclass(frozen=True)
class Diagnosis:
    """One row of the table.

    Args:
        find: takes evidence, and returns a finding whose key is the function's name.
        seen: what a user sees without the doctor.
        means: what it means, and what the override does.
        stage: whose records it needs; the warm-up is judged before GRPO has begun.
    """

    find: Callable[[Evidence], Finding | None]
    seen: str
    means: str
    stage: str = GRPO

    @property
    def key(self) -> str:
        """The finding's key."""
        return self.find.__name__


TABLE = (
    Diagnosis(
        warmup.warmup_earns_little,
        "The warm-up's loss falls, and the reward after it is low",
        "The completions of the warm-up are tried on the recipe's own rewards before it trains. Where those pay "
        "nothing, the completions are wrong or in another format than the rewards look for (another tag, no "
        "`\\boxed{}`), and GRPO has to train away what the warm-up taught.",
        WARMUP,
    ),
    Diagnosis(
        warmup.warmup_loss_flat,
        "The warm-up's `loss` does not fall",
        "The first quarter of the steps is compared with the last. If the loss rises, the learning rate is too high; "
        "if it stays, the rate is too low, or the completions do not follow from their prompts. A loss that is low "
        "from the start, and that of the base's own samples (`source: self`), cannot fall far: the doctor is silent.",
        WARMUP,
    ),
    Diagnosis(
        warmup.warmup_memorised,
        "The warm-up's `loss` falls, `heldout_loss` does not",
        "`heldout_loss` is measured on rows of the warm-up that are not trained on. The adapter then repeats its rows "
        "instead of learning from them. Take more rows, or stop where the held-out loss was lowest.",
        WARMUP,
    ),
    Diagnosis(
        diagnoses.zero_reward,
        "The reward is 0 from the first step on",
        "No completion ever gets a reward, so nothing is learnt. The finding names the reason: the cap cuts every "
        "completion off, the parser finds no answer, the template has already opened the thinking block, the gold "
        "answers cannot be used, or the task is too hard. If it is too hard, take a larger model or easier rows.",
    ),
    Diagnosis(
        diagnoses.truncation,
        "The reward stays low, `completions/clipped_ratio` is high",
        "Completions are cut off before they answer. A larger cap costs memory and time; a prompt that asks for "
        "shorter answers costs nothing. If cut completions get as much reward as finished ones, the doctor is silent.",
    ),
    Diagnosis(
        diagnoses.zero_part,
        "One of several rewards is always 0",
        "The form that it looks for never occurs in the completions, or the template writes that part itself.",
    ),
    Diagnosis(
        diagnoses.equal_groups,
        "`loss` and `grad_norm` are 0 or nearly, `frac_reward_zero_std` is near 1",
        "The advantage compares the completions of a group; where all have the same reward there is nothing to "
        "compare. A larger group is more likely to contain both right and wrong answers. If nearly all groups are "
        "wrong, train on easier rows or a stronger model; if nearly all are right, train on harder rows, or after a "
        "warm-up take fewer steps of it. (A loss near 0 alone is normal with `beta: 0`.)",
    ),
    Diagnosis(
        diagnoses.format_up_accuracy_flat,
        "The reward rises, the answers do not get better",
        "The form is easier to learn than the task. With the gate, the form is rewarded only if the answer is right.",
    ),
    Diagnosis(
        diagnoses.length_collapse,
        "Completions become very short",
        "Short completions get more reward than reasoning does. A KL term keeps the policy near the base; check the "
        "weights of the length rewards too.",
    ),
    Diagnosis(
        diagnoses.length_growth,
        "Completions grow longer and no better",
        "Losses that average within a sequence punish long wrong answers less; `dr_grpo` does not. Masking cut-off "
        "completions removes the noise that they add to the loss.",
    ),
    Diagnosis(
        diagnoses.entropy_collapse,
        "All completions of a prompt look alike",
        "The policy has become deterministic too early: it no longer explores. Smaller steps keep the entropy up.",
    ),
    Diagnosis(
        warmup.warmup_collapse,
        "After a warm-up, all completions of a prompt are the same from the start",
        "Too many steps of supervised fine-tuning leave one text for each prompt, so GRPO has nothing to compare. A "
        "shorter warm-up teaches the format and keeps the samples different.",
    ),
    Diagnosis(
        diagnoses.kl_blow_up,
        "`kl` explodes, the text turns into garbage",
        "The steps are too large for the KL term. Lower the learning rate and raise `beta`.",
    ),
    Diagnosis(
        diagnoses.grad_norm_spikes,
        "The reward drops after single steps",
        "One batch moves the weights as much as many others together. Clipping near the median prevents it.",
    ),
    Diagnosis(
        diagnoses.fp16_scale_skips,
        "On a T4 or older, `grad_norm` is often NaN",
        "float16 overflows, and the gradient scaler skips the step. A few at the start are normal: the scaler is "
        "looking for its scale.",
    ),
    Diagnosis(
        diagnoses.learning_rate_too_low,
        "Neither the reward nor the completions change",
        "1e-6 is TRL's default, for full fine-tuning. LoRA needs ten times that rate or more. What counts is the rate "
        "times `lora_alpha / r`: 1e-6 with 128 / 32 has trained well (Tina), and is not reported.",
    ),
    Diagnosis(
        diagnoses.unusable_golds,
        "`accuracy_reward/unusable_gold` is above 0",
        "A completion cannot be scored without a readable gold answer. The column may be wrong, or some rows broken.",
    ),
    Diagnosis(
        diagnoses.judge_timeouts,
        "`accuracy_reward/timeout` is above 0",
        "Answers that need computer algebra reach the time limit and count as wrong. Often they are not answers.",
    ),
    Diagnosis(
        episodes.tools_never_called,
        "`tools/calls` is 0 from the first step on",
        "The model does not know that it may call, or how. Its chat template has to show the tools (`grpo-lite check` "
        "prints the prompt), and it has to have learned calls: in its own training, or in a warm-up.",
    ),
    Diagnosis(
        episodes.calls_malformed,
        "Completions hold `<tool_call>` as text",
        "What is no valid call is an ordinary answer: nothing is called, and the episode ends. Often the cap cuts it "
        "off.",
    ),
    Diagnosis(
        episodes.calls_fail,
        "`tools/failure_frequency` is high",
        "A wrong name, a missing argument, a wrong type, or a tool that raises. The model reads the error as the "
        "result.",
    ),
    Diagnosis(
        episodes.paid_without_call,
        "The reward is high and few tools are called",
        "What is paid does not need the tools: the model knows the answer, or a cheat earns it.",
    ),
    Diagnosis(
        episodes.call_loops,
        "Episodes repeat one call",
        "The model learned that calling is good, or does not understand the result. Fewer turns end it, and a reward "
        "that falls with each turn.",
    ),
    Diagnosis(
        episodes.episodes_at_limit,
        "Episodes stop before their answer",
        "Their last call is never answered. `completions/clipped_ratio` does not count them, as their last turn ended.",
    ),
    Diagnosis(
        hacking.repeated_text,
        "The reward is high, the text loops",
        "The reward favours repetition, or at least does not punish it. The penalty counts repeated n-grams.",
    ),
    Diagnosis(
        hacking.many_answers,
        "One completion gives a list of answers",
        "A reward that accepts the right answer anywhere is hacked by listing many. `rewards.accuracy_reward` takes "
        "the last committed answer.",
    ),
    Diagnosis(
        hacking.stuffed_tags,
        "Completions full of `<think>` and `<answer>`",
        "A format reward that counts tags is hacked by writing many. `rewards.format_reward` checks the whole form.",
    ),
    Diagnosis(
        hacking.reward_without_progress,
        "The reward rises, the held-out score does not",
        "The strongest sign of a hacked reward, or of memorised rows. Read the completions with the highest reward in "
        "the report before you train further.",
    ),
    Diagnosis(
        expected.below_expected,
        "The reward is below the band that the report draws",
        "The recipe has a measured result (`expected:`), and the mean of the last three steps has been below its band "
        "for three steps, or the score's whole interval is below it. A setting that differs from the recipe's is named "
        "first; then what else the doctor finds. A band of few seeds is no law: one run in twenty may be outside.",
    ),
)


KEYS = frozenset(row.key for row in TABLE)


def diagnose(evidence: Evidence) -> list[Finding]:
    """Return every finding on both stages, the warm-up's first."""
    return [*diagnose_warmup(evidence), *diagnose_grpo(evidence)]


def diagnose_grpo(evidence: Evidence) -> list[Finding]:
    """Return every finding on GRPO, in the table's order; none before there are a few steps."""
    rows = [row for row in TABLE if row.stage == GRPO] if len(evidence.steps) >= FEWEST else []
    return [finding for row in rows if (finding := row.find(evidence))]


def diagnose_warmup(evidence: Evidence) -> list[Finding]:
    """Return every finding on the warm-up itself, in the table's order."""
    return [finding for row in TABLE if row.stage == WARMUP and (finding := row.find(evidence))]


def nothing_found(evidence: Evidence) -> str:
    """Return the sentence for a run without findings; with too few steps it says that nothing was judged."""
    count = len(evidence.steps)
    if count >= FEWEST:
        return "nothing found wrong in the metrics and the latest completions"
    steps = f"{count or 'no'} step{'s' * (count != 1)}"
    if evidence.warmup_step >= FEWEST:
        return f"nothing found wrong in the warm-up; {steps} of GRPO logged so far, and it needs at least {FEWEST}"
    return f"{steps} logged so far; the doctor needs at least {FEWEST}"


def examine(run: RunDir) -> list[Finding]:
    """Return the findings on a run's folder, finished or not, and those that other stages reported.

    Raises:
        RunDirError: the folder is not a run.
    """
    of_stages = {record["key"]: record for record in stated_findings(run) if record["key"] not in KEYS}
    return [*diagnose(read_evidence(run)), *map(Finding.from_record, of_stages.values())]


def state_finding(run: RunDir, finding: Finding, step: int, show: Show, stage: str = GRPO) -> None:
    """Show a finding and append it to findings.jsonl, for the report and for `doctor RUN`."""
    facts = {"key": finding.key, "sentence": finding.sentence, "override": finding.override}
    _append(run, {"step": step, "stage": stage, **facts}, show)


def state_end(run: RunDir, finding: Finding, last: int, step: int, show: Show, stage: str = GRPO) -> None:
    """Show that a finding is no longer the case, and append that to findings.jsonl.

    Args:
        last: the last step at which it was.
        step: the present one.
    """
    _append(run, {"step": step, "stage": stage, "key": finding.key, "sentence": finding.sentence, "until": last}, show)


def _append(run: RunDir, event: dict[str, Any], show: Show) -> None:
    show(event_line(event))
    with findings_file(run).open("a", encoding="utf-8") as file:
        file.write(json.dumps(event, ensure_ascii=False) + "\n")


def event_line(event: Mapping[str, Any]) -> str:
    """Return a line of findings.jsonl as one line for a screen."""
    if "until" in event:
        return f"doctor: no longer the case, last at step {event['until']}: {event['sentence']}"
    return Finding.from_record(event).line()


def finding_events(run: RunDir) -> list[dict[str, Any]]:
    """Return the lines of findings.jsonl, oldest first: findings, and the ends (`until`) of findings."""
    return read_json_lines(findings_file(run))


def stated_findings(run: RunDir) -> list[dict[str, Any]]:
    """Return what was reported during the run, oldest first: `step`, `stage`, `key`, `sentence`, `override`.

    A finding that has ended, or was reported again with other advice, also has `until`: a step.
    """
    stated: list[dict[str, Any]] = []
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for event in finding_events(run):
        name = (event.get("stage", GRPO), event["key"])
        if before := latest.pop(name, None):
            before["until"] = event.get("until", event["step"])
        if "until" not in event:
            latest[name] = event
            stated.append(event)
    return stated


def forget_findings_after(run: RunDir, step: int, stage: str = GRPO) -> None:
    """Drop a stage's findings of steps after the checkpoint that it resumes from."""
    kept = [record for record in finding_events(run) if record.get("stage", GRPO) != stage or record["step"] <= step]
    if findings_file(run).is_file():
        write_atomic(findings_file(run), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def findings_file(run: RunDir) -> Path:
    """Return the path of a run's findings.jsonl."""
    return run.path / "findings.jsonl"


class OnceUntilItChanges:
    """Passes each finding once, and again if its advice changes or if it returns after an absence.

    Another value for the same keys is no change of advice: values follow the figures from step to step.
    """

    def __init__(self, gone_for: int = 10) -> None:
        self.gone_for = gone_for
        self._reported: dict[str, tuple[Finding, int, int]] = {}  # by key: the latest, at which look and which step
        self._looked = 0

    def news(self, findings: Iterable[Finding], step: int = 0) -> list[Finding]:
        """Return the findings that are new at a step."""
        self._looked += 1
        fresh: list[Finding] = []
        for finding in findings:
            before, looked, _ = self._reported.get(finding.key, (None, -self.gone_for - 1, 0))
            if self._looked - looked > self.gone_for or before is None or _advice(before) != _advice(finding):
                fresh.append(finding)
            self._reported[finding.key] = (finding, self._looked, step)
        return fresh

    def ended(self) -> list[tuple[Finding, int]]:
        """Return each finding that has been absent for long, once, with the last step at which it was the case."""
        gone = [(old, step) for old, looked, step in self._reported.values() if self._looked - looked > self.gone_for]
        for finding, _ in gone:
            del self._reported[finding.key]
        return gone


def _advice(finding: Finding) -> list[str]:
    """Return the keys that a finding advises to change."""
    return [part.partition("=")[0] for part in (finding.override or "").split()]


def troubleshooting() -> str:
    """Return docs/troubleshooting.md."""
    lines = [
        "# Troubleshooting",
        "",
        "Generated from the run doctor's table (`python docs/build.py`). The doctor watches every training run and",
        "reports each of these once, and again if it changes, with the figures and an override to paste. It says",
        "when a finding is no longer the case. The board and `watch` show those that are.",
        "`grpo-lite doctor RUN` examines a run afterwards.",
        "",
    ]
    for row in TABLE:
        lines += [f"## {row.seen}", "", f"`{row.key}`: {row.find.__doc__}", "", row.means, ""]
    return "\n".join(lines)
