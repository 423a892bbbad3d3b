"""The notebooks: written from their one source, and every cell of each really runs, with the tiny model put in."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
import nbformat

from grpo_lite import PROJECT_URL, bootstrap

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("build_notebooks", ROOT / "notebooks" / "build.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

TINY = ["model.id=tiny/random-llama", "grpo.max_steps=2", "eval.limit=4", "eval.samples=0", "check.rows=4"]
GSM8K = [
    *TINY, "data.max_prompt_tokens=null", "grpo.gradient_accumulation_steps=2", "grpo.max_completion_length=8",
    "grpo.learning_rate=1e-2",
]  # fmt: skip


def code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def output_of(notebook: Any, code_begins: str) -> str:
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith(code_begins)]
    return "".join(output.get("text", "") for output in cell.outputs)


def outputs(notebook: Any) -> str:
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + str(output.get("data", "")) for output in shown)


@pytest.mark.parametrize("name", build.NOTEBOOKS)
def test_the_notebook_is_the_one_source_s(name: str) -> None:
    written = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(written)
    fresh = build.build(name)
    assert [(cell.cell_type, cell.source) for cell in written.cells] == [
        (cell.cell_type, cell.source) for cell in fresh.cells
    ]


@pytest.mark.parametrize("name", ["colab_gsm8k", "kaggle_gsm8k"])
def test_a_gpu_notebook_shows_the_plan_as_it_is_today_and_no_other_output(name: str) -> None:
    written = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    fresh = build.with_plan(build.build(name))
    shown = [cell.outputs for cell in written.cells if cell.cell_type == "code"]
    assert shown == [cell.outputs for cell in fresh.cells if cell.cell_type == "code"]
    plan = output_of(written, 'grpo_lite("plan"')
    assert "peak allocation" in plan
    assert f"budget: {'3h' if name == 'colab_gsm8k' else '8h'} for everything" in plan
    assert "estimated from the card's published speeds, not measured on a GPU" in plan
    (before,) = [cell.source for cell in written.cells if "How its memory will be used" in cell.source]
    assert "no run on a\nGPU" in before


def test_a_badge_leads_to_the_platform_once_the_project_has_an_address() -> None:
    github = "https://github.com/me/grpo_lite"
    assert build.address("colab_gsm8k", github) == (
        "https://colab.research.google.com/github/me/grpo_lite/blob/main/notebooks/colab_gsm8k.ipynb"
    )
    assert build.address("kaggle_gsm8k", github).startswith(
        "https://kaggle.com/kernels/welcome?src=https://github.com/me"
    )
    for elsewhere in ("", "https://codeberg.org/me/grpo_lite"):
        assert build.address("colab_gsm8k", elsewhere) == "notebooks/colab_gsm8k.ipynb"


def test_badges_notebooks_and_metadata_name_the_one_address() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in build.NOTEBOOKS:
        assert f"({build.address(name)})" in readme, name
    for name in ("colab_gsm8k", "kaggle_gsm8k"):
        assert f'CLONE = "{PROJECT_URL}"' in "\n".join(code(build.build(name)))
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    assert all(PROJECT_URL and url.startswith(PROJECT_URL) for url in urls.values())


def test_each_platform_gets_its_own_cells_only() -> None:
    colab, kaggle, quickstart = ("\n".join(code(build.build(name))) for name in build.NOTEBOOKS)
    assert "google.colab" in colab
    assert "google.colab" not in kaggle + quickstart
    assert "/kaggle/working" in kaggle
    assert "/kaggle/working" not in colab + quickstart
    for text in (colab, kaggle, quickstart):
        for stage in ("install_here", '"doctor"', '"check"', '"train"', '"report"', '"chat"', '"export"', '"push"'):
            assert stage in text, stage


def a_repository(folder: Path) -> Path:
    """Commit this working tree's code to a git repository that a notebook can clone."""
    folder.mkdir()
    for part in ("grpo_lite", "rewards", "recipes", "pyproject.toml"):
        source, copy = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def a_drive(folder: Path) -> None:
    """Put a `google.colab` where the kernel starts: its drive only says that it was asked for."""
    package = folder / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "drive.py").write_text("def mount(place):\n    print('mounted at', place)\n")


def run(name: str, tmp_path: Path, **parameters: Any) -> Any:
    notebook = build.overridden(build.build(name), **{"SOURCE": str(ROOT), "RUN": str(tmp_path / "run"), **parameters})
    return build.execute(notebook, tmp_path, timeout_s=300)


@pytest.mark.slow
def test_every_cell_of_the_cpu_notebook_runs(tmp_path: Path) -> None:
    notebook = run("quickstart_cpu", tmp_path, RECIPE="smoke", OVERRIDES=["eval.samples=0", "limits.max_minutes=30"])
    shown = outputs(notebook)
    assert "everything is installed already" in shown
    assert "step 3/3" in shown
    assert "held-out lenient score" in shown
    assert "image/png" in shown  # the curves
    assert "README.md" in shown  # what a push would send
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colab_gsm8k", pytest.param("kaggle_gsm8k", marks=pytest.mark.matrix)])
def test_every_cell_of_a_gpu_notebook_runs_with_model_and_data_put_in(name: str, tmp_path: Path) -> None:
    rows = "".join(f'{{"question": "What is {i} + {i}?", "answer": "So #### {2 * i}"}}\n' for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "varied.py").write_text(  # a random model earns no accuracy reward, so that nothing would be merged
        "def varied(completions, **kwargs):\n    return [len(c[0]['content']) % 3 / 3 for c in completions]\n"
    )
    own = [f"data.train.path={tmp_path / 'rows.jsonl'}", f"rewards[0].function={tmp_path / 'varied.py'}:varied",
           "rewards[0].kwargs={}", "check.enabled=false"]  # fmt: skip
    project = tmp_path / "project"
    extra: dict[str, Any] = {"SOURCE": str(project), "CLONE": str(a_repository(tmp_path / "remote"))}
    if name == "colab_gsm8k":
        a_drive(tmp_path)
        extra["DRIVE"] = True
    notebook = run(name, tmp_path, OVERRIDES=[*GSM8K, *own], GGUF="", PROBE=2, BUDGET="30m", **extra)
    shown = outputs(notebook)
    assert ("mounted at /content/drive" in shown) == (name == "colab_gsm8k")
    assert (project / "grpo_lite" / "train.py").is_file()  # cloned
    assert "t4" in output_of(notebook, 'grpo_lite("plan"').lower()
    assert "peak allocation" in output_of(notebook, 'grpo_lite("plan"')
    assert "pass@1" in output_of(notebook, 'grpo_lite("probe"')
    assert "srcdoc" in shown  # the report, inline
    assert "step 2/2" in shown
    trained = output_of(notebook, "from grpo_lite.runs.run_dir import RunDir")
    assert "budget: 30m for everything, set-up of packages apart; times measured by the probe" in trained
    assert "budget: training: 2 steps" in trained
    assert (tmp_path / "run" / "merged").is_dir()


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.timeout(3000)
def test_the_cpu_notebook_runs_end_to_end_with_the_real_quickstart(tmp_path: Path) -> None:
    fewer = ["eval.limit=50", "eval.also={}"]  # prompts to score: the training is the recipe's own
    notebook = build.overridden(
        build.build("quickstart_cpu"), SOURCE=str(ROOT), RUN=str(tmp_path / "run"), OVERRIDES=fewer
    )
    shown = outputs(build.execute(notebook, tmp_path, timeout_s=3000))
    assert "step 6/6" in shown
    assert "significant gain" in shown


def test_a_second_run_of_the_cells_trains_nothing_again(tmp_path: Path) -> None:
    from tests.run_files import write_run

    write_run(tmp_path / "run")
    notebook = build.build("quickstart_cpu")
    notebook.cells = [c for c in notebook.cells if "RunDir(RUN)" in c.source]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"RUN = {str(tmp_path / 'run')!r}"))
    assert "is finished already" in outputs(build.execute(notebook, ROOT, timeout_s=120))


def test_installing_keeps_torch_and_numpy_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    kept: list[str] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        kept.append(Path(command[command.index("-c") + 1]).read_text())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bootstrap, "missing_requirements", lambda root: ["trl>=1.14", "peft>=0.18"])
    monkeypatch.setattr(bootstrap, "_version", {"torch": "2.9.0+cu126", "numpy": "2.0.2"}.get)
    monkeypatch.setattr(bootstrap.subprocess, "run", fake)
    assert bootstrap.install_here() == 0
    assert ran[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert ran[0][-2:] == ["trl>=1.14", "peft>=0.18"]
    assert kept == ["torch==2.9.0+cu126\nnumpy==2.0.2\n"]


def test_what_is_missing_or_too_old_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["a>=2", "b<3", "c", "torch>=2.6"]\n')
    monkeypatch.setattr(bootstrap, "_version", {"a": "1.9", "b": "2.1", "torch": "2.9.0+cu126"}.get)
    assert bootstrap.missing_requirements(tmp_path) == ["a>=2", "c"]
