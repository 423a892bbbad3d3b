"""The run doctor: a table of diagnoses over a run's metrics and completions, live and afterwards (`doctor RUN`).

    evidence.py         diagnoses.py, unpaid.py, hacking.py      here                    progress.RunDoctor
    Evidence, Finding   one small function a disease             the table, `diagnose`   live, once until it changes

Any stage may state a finding of its own with `state_finding`; docs/troubleshooting.md is written from the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grpo_lite.files.atomic import write_atomic
from grpo_lite.files.records import read_json_lines
from grpo_lite.report import diagnoses, hacking
from grpo_lite.report.evidence import FEWEST, Evidence, Finding, read_evidence
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show


@dataclass(frozen=True)
class Diagnosis:
    """One row of the table.

    Args:
        find: from evidence to a finding with this function's name as its key.
        seen: what a person sees without the doctor.
        means: what it means, and what the override does.
    """

    find: Callable[[Evidence], Finding | None]
    seen: str
    means: str

    @property
    def key(self) -> str:
        """The finding's key."""
        return self.find.__name__


TABLE = (
    Diagnosis(
        diagnoses.zero_reward,
        "The reward is 0 from the first step on",
        "Nothing is ever paid, so nothing is learnt. The finding names the reason it found: the cap cuts every "
        "completion off, the parser meets no answer, the template has already opened the thinking block, the golds "
        "cannot be used, or the task is too hard: then take a larger model or easier rows.",
    ),
    Diagnosis(
        diagnoses.truncation,
        "The reward stays low, `completions/clipped_ratio` is high",
        "Completions are cut off before they answer. A larger cap costs memory and time; a prompt that asks for "
        "shorter answers costs nothing. Where cut completions earn as much as finished ones, nothing is said.",
    ),
    Diagnosis(
        diagnoses.zero_part,
        "One of several rewards is always 0",
        "Its form never occurs in the completions, or the template writes the part that it looks for.",
    ),
    Diagnosis(
        diagnoses.equal_groups,
        "`loss` and `grad_norm` are 0 or nearly, `frac_reward_zero_std` is near 1",
        "The advantage compares the completions of a group; where all have the same reward there is nothing to "
        "compare. A larger group is more likely to contain both right and wrong answers. If nearly all groups are "
        "wrong, train on easier rows or a stronger model; if nearly all are right, train on harder rows. (A loss near "
        "0 alone is normal with `beta: 0`.)",
    ),
    Diagnosis(
        diagnoses.format_up_accuracy_flat,
        "The reward rises, the answers do not get better",
        "The form is the easier money. The gate pays it only where the answer is right.",
    ),
    Diagnosis(
        diagnoses.length_collapse,
        "Completions become very short",
        "A length penalty or an early end is paid better than thinking. A KL term holds the policy near the base; "
        "look at the length rewards' weights too.",
    ),
    Diagnosis(
        diagnoses.length_growth,
        "Completions become ever longer and no better",
        "Losses that average within a sequence punish long wrong answers less; `dr_grpo` does not. Leaving cut-off "
        "completions out of the loss removes the noise they add.",
    ),
    Diagnosis(
        diagnoses.entropy_collapse,
        "All completions of a prompt look alike",
        "The policy has committed itself early: no exploration is left. Smaller steps keep it open for longer.",
    ),
    Diagnosis(
        diagnoses.kl_blow_up,
        "`kl` explodes, the text turns into garbage",
        "Steps are too large for the leash. Lower the learning rate and raise `beta`.",
    ),
    Diagnosis(
        diagnoses.grad_norm_spikes,
        "Single steps throw the reward back",
        "One batch moves the weights as much as many others. Clipping near the median tames it.",
    ),
    Diagnosis(
        diagnoses.fp16_scale_skips,
        "On a T4 or older, `grad_norm` is often NaN",
        "float16 overflows, and the grad scaler leaves the step out. A few at the start are normal: it is looking for "
        "its scale.",
    ),
    Diagnosis(
        diagnoses.learning_rate_too_low,
        "Nothing moves",
        "1e-6 is TRL's default for full fine-tuning. LoRA needs ten times the rate and more.",
    ),
    Diagnosis(
        diagnoses.unusable_golds,
        "`accuracy_reward/unusable_gold` is above 0",
        "A gold that cannot be read pays nobody. The column may be the wrong one, or some rows are broken.",
    ),
    Diagnosis(
        diagnoses.judge_timeouts,
        "`accuracy_reward/timeout` is above 0",
        "Answers that need computer algebra hit the limit and count as wrong. Often they are not answers at all.",
    ),
    Diagnosis(
        hacking.repeated_text,
        "The reward is high, the text loops",
        "Repetition is paid, or at least not punished. The penalty counts repeated n-grams.",
    ),
    Diagnosis(
        hacking.many_answers,
        "One completion gives a list of answers",
        "A reward that takes the right answer anywhere is beaten by naming them all. `rewards.accuracy_reward` takes "
        "the last one committed to.",
    ),
    Diagnosis(
        hacking.stuffed_tags,
        "Completions full of `<think>` and `<answer>`",
        "A format reward that counts tags is beaten by writing many. `rewards.format_reward` reads the whole form.",
    ),
    Diagnosis(
        hacking.reward_without_progress,
        "The reward rises, the held-out score does not",
        "The strongest sign of a hacked reward (or of rows learnt by heart). Read the best-paid completions in the "
        "report before any further training.",
    ),
)


def diagnose(evidence: Evidence) -> list[Finding]:
    """Return every finding, in the table's order; none before there are a few steps."""
    if len(evidence.steps) < FEWEST:
        return []
    return [finding for row in TABLE if (finding := row.find(evidence))]


def clean_bill(evidence: Evidence) -> str:
    """Return what may be said where nothing was found: that all is well only where there was enough to look at."""
    count = len(evidence.steps)
    if count >= FEWEST:
        return "nothing found wrong in the metrics and the latest completions"
    return f"{count or 'no'} step{'s' * (count != 1)} logged so far; nothing is said before there are {FEWEST}"


def examine(run: RunDir) -> list[Finding]:
    """Return the findings on a run's folder, finished or not, and those that stages stated themselves.

    Raises:
        RunDirError: the folder is not a run.
    """
    found = diagnose(read_evidence(run))
    keys = {row.key for row in TABLE}
    stated = {record["key"]: record for record in stated_findings(run) if record["key"] not in keys}
    return [*found, *(Finding(r["key"], r["sentence"], r.get("override")) for r in stated.values())]


def state_finding(run: RunDir, finding: Finding, step: int, show: Show) -> None:
    """Show a finding and keep it in findings.jsonl, for the report and for `doctor RUN`."""
    show(finding.line())
    record = {"step": step, "key": finding.key, "sentence": finding.sentence, "override": finding.override}
    with findings_file(run).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def stated_findings(run: RunDir) -> list[dict[str, Any]]:
    """Return what was stated while the run went on, oldest first: `step`, `key`, `sentence`, `override`."""
    return read_json_lines(findings_file(run))


def forget_findings_after(run: RunDir, step: int) -> None:
    """Drop what was stated after the checkpoint that a run resumes from."""
    kept = [record for record in stated_findings(run) if record["step"] <= step]
    if findings_file(run).is_file():
        write_atomic(findings_file(run), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def findings_file(run: RunDir) -> Any:
    """Return the path of a run's findings.jsonl."""
    return run.path / "findings.jsonl"


class OnceUntilItChanges:
    """Lets each finding through once, and again when it advises something else or comes back after being gone.

    Another value for the same keys is not something else: it follows the figures from step to step.
    """

    def __init__(self, gone_for: int = 10) -> None:
        self.gone_for = gone_for
        self._said: dict[str, tuple[list[str], int]] = {}  # finding's key: keys of the override, when last found
        self._looked = 0

    def news(self, found: Iterable[Finding]) -> list[Finding]:
        """Return those of the findings that have not been said yet."""
        self._looked += 1
        fresh = []
        for finding in found:
            keys = [part.partition("=")[0] for part in (finding.override or "").split()]
            said, last = self._said.get(finding.key, ([], -self.gone_for - 1))
            if self._looked - last > self.gone_for or said != keys:
                fresh.append(finding)
            self._said[finding.key] = (keys, self._looked)
        return fresh


def troubleshooting() -> str:
    """Return docs/troubleshooting.md."""
    lines = [
        "# Troubleshooting",
        "",
        "Written from the run doctor's own table (`python docs/build.py`), so the two cannot drift apart. The",
        "doctor watches every training and says each of these at most once until it changes, with figures and the",
        "override to paste; `grpo-lite doctor RUN` looks at a run afterwards.",
        "",
    ]
    for row in TABLE:
        lines += [f"## {row.seen}", "", f"`{row.key}`: {row.find.__doc__}", "", row.means, ""]
    return "\n".join(lines)
