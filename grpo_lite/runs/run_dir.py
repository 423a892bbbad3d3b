"""RunDir: the paths and records of a run, and whether it can be started or resumed, or must be left alone."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from grpo_lite.commands import either, hint, hint_run
from grpo_lite.errors import RunDirError
from grpo_lite.files import lock
from grpo_lite.files.atomic import read_record, write_atomic
from grpo_lite.files.redact import planted_secret, redact, secret_in
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.checkpoints import checkpoint_folders

SCORE_COLUMNS = ("base", "warm", "trained")  # of metrics.json: the models that a run compares; warm after a warm-up
# Merged models by their keys in metrics.json.
MERGED_MODELS = {
    "merged": "merged 16-bit model",
    "merged_onto_original": "merged onto the original 16-bit base (not kept)",
}


class RunDir:
    """One run's folder: recipe.yaml, run.json, metrics.jsonl, completions/, checkpoint-*, adapter/, merged/ …"""

    def __init__(self, path: str | Path) -> None:
        """Raise RunDirError for a path that the libraries below, which write in UTF-8, could not write."""
        self.path = Path(path)
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise RunDirError(
                f"run directory {os.fsencode(path)!r}: cannot be written in UTF-8. Choose another name with "
                f"{hint_run()}, or, if it reads well in your terminal, set LC_ALL=C.UTF-8."
            ) from None

    name = property(lambda self: self.path.name or self.path.resolve().name)  # of `.` too
    recipe_file = property(lambda self: self.path / "recipe.yaml")
    run_file = property(lambda self: self.path / "run.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    scores_file = property(lambda self: self.path / "metrics.json")
    adapter = property(lambda self: self.path / "adapter")
    report_file = property(lambda self: self.path / "report.html")
    merged = property(lambda self: self.path / "merged")
    warmup = property(lambda self: self.path / "warmup")  # its checkpoints while it trains, its adapter when it is done
    warm_adapter = property(lambda self: self.warmup / "adapter")
    evaluation = property(lambda self: self.path / "evaluation")
    tasks_file = property(lambda self: self.evaluation / "lm_eval.json")  # scores of lm-evaluation-harness

    def prepare(self, recipe: Recipe) -> Literal["new", "resume", "finish", "report"]:
        """Create the folder, or recognise an interrupted run of the same recipe.

        Returns:
            "new"; "resume" from a checkpoint; "finish": trained but not yet evaluated and merged; or "report":
            finished, but killed before its report was written.

        Raises:
            RunDirError: the run is finished, of another recipe, or not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunDirError(
                f"run directory {self.path}: not writable ({error.strerror}). Choose another with {hint_run()}."
            ) from None
        _clear_scraps(self.path)
        plain = recipe.model_dump(mode="json")
        where = planted_secret(plain)
        if name := secret_in(dump_recipe(recipe) + json.dumps(plain)) or (where and f"what looks like one: {where}"):
            raise RunDirError(
                f"{recipe.name}: the recipe or an override holds the value of a secret ({name}), and a run keeps its "
                "recipe in plain text. Leave it out, and let the reward read it from os.environ."
            )
        if not self.recipe_file.is_file():
            self._refuse_strangers()
            write_atomic(self.recipe_file, dump_recipe(recipe))
            return "new"
        self._refuse_changed(recipe)
        record = self.read_run()
        if record.get("trained_at") and not record.get("finished_at"):
            return "finish"
        if record.get("trained_at") and not self.report_file.is_file():
            return "report"
        if record.get("trained_at"):
            raise RunDirError(
                f"run directory {self.path}: holds a finished run, and it is not overwritten. Keep it and choose "
                f"another with {hint_run()}, or remove it: rm -r {self.path}"
            )
        return "resume" if self.last_checkpoint() or self.last_of_warmup() else "new"

    def _refuse_strangers(self) -> None:
        strange = sorted(
            p.name for p in self.path.iterdir() if not p.name.startswith((".lock", ".writable", ".saving-"))
        )
        if strange:
            raise RunDirError(
                f"run directory {self.path}: is not empty ({', '.join(strange[:5])}) and holds no recipe.yaml, so it "
                f"is not a run. Choose another with {hint_run()}"
            )

    def _refuse_changed(self, recipe: Recipe) -> None:
        from grpo_lite.recipe.load import drop_removed_keys, read_yaml

        first, new = read_yaml(self.recipe_file), dump_recipe(recipe)  # the file may come from another machine
        if faults := drop_removed_keys(first):  # it trained with what is gone
            raise RunDirError(f"{self.recipe_file}: this run cannot be continued. {faults[0]}")
        old = self.recipe_file.read_text(encoding="utf-8")
        if old == new:
            return
        record = self.read_run()
        never_began = not record.get("started_at") and not self.last_checkpoint()  # it was refused
        if never_began or fixed_keys(first) == fixed_keys(yaml.safe_load(new)):
            write_atomic(self.recipe_file, new)  # the next session may be longer, and log less
            return
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "recipe of this run", "now", n=0, lineterm="")
        changed = "\n".join(f"  {line}" for line in lines if not line.startswith("@@"))
        again = f"It was started with {either('BUDGET=', '--budget ')}; give that again. " if "budget" in record else ""
        raise RunDirError(
            f"run directory {self.path}: was started with another recipe, and a run has one recipe:\n{changed}\n"
            f"{again}Undo the change to resume it, or choose another directory with {hint_run()}"
        )

    @property
    def is_trained(self) -> bool:
        """Whether the run has an adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    def last_checkpoint(self) -> Path | None:
        """Return the newest completed checkpoint, if any; `checkpoints.last_usable` also checks its files."""
        complete = [path for path in checkpoint_folders(self.path) if (path / "trainer_state.json").is_file()]
        return complete[-1] if complete else None

    def last_of_warmup(self) -> Path | None:
        """Return what the warm-up saved last: its adapter if it is complete, else its newest checkpoint, if any."""
        if self.warm_adapter.is_dir():
            return self.warm_adapter
        folders = checkpoint_folders(self.warmup)
        return folders[-1] if folders else None

    def read_run(self) -> dict[str, Any]:
        """Return run.json, or an empty mapping before there is one."""
        try:
            record = json.loads(self.run_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise RunDirError(f"{self.run_file}: is not valid JSON ({error}). Restore or remove it.") from None
        if not isinstance(record, dict):
            raise RunDirError(f"{self.run_file}: holds a {type(record).__name__}, not an object. Restore or remove it.")
        return record

    def read_warmup(self) -> dict[str, Any]:
        """Return what run.json holds about the warm-up, or an empty mapping."""
        return self.read_run().get("warmup") or {}

    def read_scores(self) -> dict[str, Any]:
        """Return metrics.json, the held-out scores, or an empty mapping where the run is not scored."""
        try:
            return dict(json.loads(self.scores_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunDirError(
                f"{self.scores_file}: is not valid JSON ({error}). Remove it and measure again: "
                f"{hint('eval', run=self.path)}"
            ) from None

    def write_scores(self, scores: Mapping[str, Any]) -> None:
        """Write metrics.json, atomically."""
        write_atomic(self.scores_file, json.dumps(scores, indent=2) + "\n")

    def read_tasks(self) -> list[dict[str, Any]]:
        """Return the results of `eval --lm-eval`, one entry a task and filter; none if the run has trained further."""
        record = read_record(self.tasks_file)
        return list(record.get("tasks") or []) if record.get("steps") == self.read_run().get("steps") else []

    def merged_adapter(self) -> str | None:
        """Return the sha256 of the adapter that was merged; a paused run that resumed has a newer adapter."""
        sha256 = read_record(self.merged / "merge.json").get("adapter_sha256")
        return None if sha256 is None else str(sha256)

    def update_run(self, **values: Any) -> None:
        """Merge values into run.json, atomically."""
        write_atomic(self.run_file, redact(json.dumps({**self.read_run(), **values}, indent=2, default=str)) + "\n")

    def load_recipe(self) -> Recipe:
        """Return the recipe this run was started with, its base at the commit that was trained on.

        Raises:
            RunDirError: the folder is not a run.
        """
        from grpo_lite.recipe.load import build_recipe, drop_removed_keys, read_yaml

        if not self.recipe_file.is_file():
            raise RunDirError(f"{self.path}: is not a run (no recipe.yaml). Give the folder that `train` wrote.")
        raw = read_yaml(self.recipe_file)
        drop_removed_keys(raw)  # what it trained with is no matter to what reads it
        return self.with_base_commit(build_recipe(raw, str(self.recipe_file), for_training=False))

    def with_base_commit(self, recipe: Recipe) -> Recipe:
        """Return the recipe with its base at the commit that this run started from, if one is recorded."""
        if not (commit := self.read_run().get("base_revision")):
            return recipe
        return recipe.with_section("model", revision=commit)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock: a second process in the same folder is refused.

        Raises:
            RunDirError: another process holds it, or the folder is not writable.
        """
        with lock.locked(self.path):
            yield

    def in_use(self) -> bool | None:
        """Return whether a process of this machine works in the folder; None where there is no lock to tell."""
        return lock.in_use(self.path)


def fixed_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that a resumed run must not change: those its result depends on."""
    # Keys that runs of earlier versions lack, with what they trained with; inside a section that is the default.
    since: dict[str, Any] = {"reference": "base", "warmup": None, "algorithm": "trl", "tools": [], "environment": None}
    free = ("limits", "log", "push_checkpoints", "expected", "merge_onto")
    fixed = {key: value for key, value in {**since, **recipe}.items() if key not in free}
    for name in ("model", "sampling", "memory", "eval"):
        defaults = Recipe.model_fields[name].annotation.model_construct().model_dump(mode="json")  # type: ignore[union-attr]
        fixed[name] = {**defaults, **(fixed.get(name) or {})}
    return fixed


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every key of ours written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that escapes YAML's other line ends; PyYAML writes them as they are and reads a line break."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the text's node, in double quotes where it holds such a character."""
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _clear_scraps(folder: Path) -> None:
    """Remove what a killed `write_atomic` left, except the files of processes that are still running."""
    for place in (folder, folder / "completions", folder / "evaluation"):
        for path in place.glob(".*.tmp"):
            owner = path.name.split(".")[-2]
            if owner.isdecimal() and (int(owner) == os.getpid() or not _is_alive(int(owner))):
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's process
    return True


def require_trained(run: RunDir) -> Recipe:
    """Return the recipe of a run that has been trained.

    Raises:
        RunDirError: it has no adapter yet.
    """
    recipe = run.load_recipe()
    if not run.is_trained:
        raise RunDirError(f"{run.path}: is not trained yet (no adapter/). Run: {hint('train', run=run.path)}")
    return recipe
