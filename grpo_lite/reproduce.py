"""reproduce: the differences between a run's machine and this one, and between a run and its repetition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_lite.errors import ModelError, RunDirError
from grpo_lite.report.evidence import read_steps
from grpo_lite.report.scores import rates_text
from grpo_lite.runs.provenance import changed_files, environment_record, file_sums
from grpo_lite.runs.run_dir import RunDir

SAME = 1e-6  # relative difference of metrics that are called the same


def differences(run: RunDir) -> list[str]:
    """Return what differs from the run's own record, one line each: files, versions, platform, commit, device.

    Raises:
        RunDirError: the run has no run.json to compare with.
    """
    from grpo_lite.models.device import detect_device

    record = run.read_run()
    if not record.get("versions"):
        raise RunDirError(f"{run.path}: has no record of its versions (run.json), so it never started.")
    here = environment_record()
    lines = changed_files(record.get("files"), file_sums(run.load_recipe()))
    lines += [f"while the run was resumed, {line}" for line in record.get("changed_files", [])]
    lines += _start(record)
    lines += _versions(record["versions"], here["versions"])
    for key in ("python", "platform", "grpo_lite", "git_commit"):
        if record.get(key) != here.get(key):
            lines.append(f"{key}: {record.get(key)} then, {here.get(key)} now")
    then, now = record.get("device") or {}, detect_device().to_json()
    for key in ("kind", "name", "compute_capability", "bfloat16", "memory_bytes"):
        if key in then and _plain(then[key]) != _plain(now.get(key)):
            lines.append(f"device {key}: {then[key]} then, {now.get(key)} now")
    if str(record.get("git_commit") or "").endswith("-dirty"):
        lines.append("the run's code had uncommitted changes, so its exact code is unknown")
    return lines


def _start(record: Mapping[str, Any]) -> list[str]:
    """Return a line where the adapter that the run started from is another one now, or is not here any more."""
    from grpo_lite.models.adapter import weights_sha256

    then = record.get("init_from")
    if not isinstance(then, dict):
        return []
    try:
        now = weights_sha256(str(then.get("address")))
    except (ModelError, OSError) as error:
        return [f"the adapter it started from is not here: {error}"]
    if now == then.get("sha256"):
        return []
    return [f"lora.init_from: {then['address']} has changed since (sha256 {str(then.get('sha256'))[:12]} then, "
            f"{now[:12]} now)"]  # fmt: skip


def _versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = sorted({*then, *now})
    pairs = [(name, then.get(name, "not installed"), now.get(name, "not installed")) for name in names]
    return [f"{name}: {old} then, {new} now" for name, old, new in pairs if old != new]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def result_lines(run: RunDir, again: RunDir) -> list[str]:
    """Return how far a repetition agrees: the reward of each step, and the held-out scores."""
    first, second = (_rewards(r) for r in (run, again))
    steps = sorted(first.keys() & second.keys())
    apart = [s for s in steps if abs(first[s] - second[s]) > SAME * max(1.0, abs(first[s]))]
    if not steps:
        lines = ["reward: no steps in common"]
    elif not apart:
        lines = [f"reward: the same in all {len(steps)} steps"]
    else:
        lines = [
            f"reward: the same for {steps.index(apart[0])} steps, then apart by up to "
            f"{max(abs(first[s] - second[s]) for s in apart):.3f} (step {apart[0]}: {first[apart[0]]:.3f} then, "
            f"{second[apart[0]]:.3f} now)"
        ]
    old, new = (r.read_scores() for r in (run, again))
    for kind in ("lenient", "strict"):
        if kind in old and kind in new:
            before, after = (rates_text(s[kind]) for s in (old, new))
            same = "the same" if before == after else "differs"
            lines.append(f"held-out {kind}: {before} then, {after} now: {same}")
    return lines


def _rewards(run: RunDir) -> dict[int, float]:
    return {record["step"]: record["reward"] for record in read_steps(run) if record["reward"] is not None}
