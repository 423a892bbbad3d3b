"""Every command of README.md and docs/commands.md runs; the Hub's recipes run with another model and other data."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_server import program

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")

# What a Hub recipe is given so that it runs here: the tiny model, rows of its own columns, few steps.
TINY = (
    "model.id=tiny/random-llama data.train.path=rows.jsonl data.max_prompt_tokens=null grpo.max_steps=2 eval.limit=4 "
    "grpo.learning_rate=1e-2 "
    "eval.samples=0 grpo.gradient_accumulation_steps=2 grpo.max_completion_length=8"
)
# A random model never earns an accuracy reward, so one that varies stands in for it while training.
VARIED = " rewards[0].function=varied.py:varied rewards[0].kwargs={} check.enabled=false"


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("make ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Makefile and recipes whose environment is the one the tests run in."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "Makefile", place)
    shutil.copy(ROOT / "pyproject.toml", place)
    shutil.copytree(ROOT / "recipes", place / "recipes")
    program(place / "env" / "bin" / "grpo-lite")
    for stamp in (".ready", ".ready-dev"):
        (place / "env" / stamp).touch()
    (place / "varied.py").write_text(
        "def varied(completions, **kwargs):\n    return [len(c[0]['content']) % 3 / 3 for c in completions]\n"
    )
    rows = "".join(f'{{"question": "What is {i} + {i}?", "answer": "So #### {2 * i}"}}\n' for i in range(40))
    (place / "rows.jsonl").write_text(rows)
    return place


def shell(place: Path, command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VENV": "env"}
    command = command.replace("make ", "make VENV=env ", 1) if command.startswith("make ") else command
    result = subprocess.run(
        ["bash", "-ec", command], cwd=place, capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def overridden(command: str) -> str:
    """Give a Hub recipe's command the overrides, behind its own ARGS."""
    parts = shlex.split(command)
    own = next((part.removeprefix("ARGS=") for part in parts if part.startswith("ARGS=")), "")
    parts = [part for part in parts if not part.startswith("ARGS=")]
    varied = VARIED if parts[1] == "train" else ""
    return shlex.join([*parts, f"ARGS={TINY}{varied} {own}".replace("data.train.path=my.jsonl", "").strip()])


def test_the_readme_begins_with_train_report_and_chat() -> None:
    verbs = [command.split()[1] for command in commands(README)]
    assert verbs == ["train", "report", "chat", "train", "test"]


def test_the_example_of_ones_own_data_runs_as_written(workplace: Path) -> None:
    small = "model.id=tiny/random-llama grpo.max_steps=1 eval.limit=4 eval.samples=0 merge=false"
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) if "mine.csv" in block]
    shell(workplace, block.replace('ARGS="', f'ARGS="{small} ').replace("make ", "make VENV=env "))
    assert (workplace / "mine.csv").read_text().splitlines()[:2] == ["question,answer", "1+1,2"]
    assert (workplace / "runs" / "mine" / "report.html").is_file()


@pytest.mark.slow
def test_the_other_commands_of_the_readme_run_in_its_order(workplace: Path) -> None:
    tiny = "model.id=tiny/random-llama warmup.steps=2 grpo.max_steps=1 eval.limit=4 eval.also={} merge=false"
    for command in commands(README)[:3]:
        command = f'{command} ARGS="{tiny}"' if command == "make train" else command
        shell(workplace, f"echo 2+3 | {command}".replace("make ", "make VENV=env "))


def test_the_readme_fits_two_screens() -> None:
    assert len(README.splitlines()) <= 110


def test_every_command_of_the_page_is_one_that_runs_below() -> None:
    looks = "recipes|check|check-rewards|doctor|watch|ui|report|compare|reproduce|show|plan|probe"
    known = rf"make (train|warmup|eval|merge|export|push|verify|chat|{looks})\b"
    for command in commands(COMMANDS):
        assert re.match(known, command), command


def test_make_alone_prints_every_target(workplace: Path) -> None:
    out = shell(workplace, "make ")
    for target in ("setup", "train", "eval", "merge", "export", "recipes", "test", "lint", "clean"):
        assert f"make {target} " in out, target


@pytest.mark.slow
def test_the_gsm8k_commands_run_in_the_order_of_the_page(workplace: Path) -> None:
    ran = []
    for command in commands(COMMANDS):
        if "gsm8k" not in command or command in ran or "GGUF=" in command:
            continue  # a GGUF needs a real tokenizer: export/test_gguf.py
        if "--lm-eval" in command:
            continue  # arc_easy lies on the Hub; a task of a file is scored in evaluation/test_lm_eval.py
        if "anchors/" in command:
            continue  # hours on a GPU; report/test_expected.py reproduces a small one
        if "GPUS=" in command:
            continue  # needs two cards: trainer/test_parallel.py
        if "BUDGET=" in command:
            continue  # the same run again, which is finished: session/test_budget.py trains within a budget
        if command.startswith("make train") and "ARGS" in command:
            # the same recipe again, longer: into a folder of its own
            shell(workplace, overridden(command).replace("grpo.max_steps=50", "grpo.max_steps=2") + " RUN=runs/again")
        elif command.split()[1] in ("train", "probe", "check", "check-rewards", "show"):
            shell(workplace, overridden(command))
        else:
            shell(workplace, command)
        ran.append(command)
    assert (workplace / "runs" / "gsm8k" / "merged" / "model.safetensors").is_file()
    assert (workplace / "runs" / "again" / "merged" / "model.safetensors").is_file()
    assert len(ran) >= 7


def test_scoring_other_tasks_installs_its_extra() -> None:
    dry = ["make", "-n", "VENV=nowhere", "eval", "RUN=runs/gsm8k", "ARGS=--lm-eval arc_easy"]
    shown = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bootstrap.py nowhere lm-eval" in shown
    assert shown.rstrip().endswith("--lm-eval arc_easy")


def test_ui_installs_its_extra_and_serves_the_runs() -> None:
    shown = subprocess.run(["make", "-n", "VENV=nowhere", "ui"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bootstrap.py nowhere ui" in shown.stdout
    assert shown.stdout.rstrip().endswith("nowhere/bin/grpo-lite watch --web")


def test_doctor_runs(workplace: Path) -> None:
    assert "sandbox for model-written code" in shell(workplace, "make doctor")


def test_recipes_lists_what_the_readme_s_table_lists(workplace: Path) -> None:
    shown = shell(workplace, "make recipes").partition("\n\n")[0]  # then come the anchors
    listed = {line.split()[0] for line in shown.splitlines()[1:]}
    assert listed == set(re.findall(r"^\| `([a-z0-9.-]+)` \|", README, flags=re.MULTILINE))
