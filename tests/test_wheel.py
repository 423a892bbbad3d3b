"""The installed package without its checkout: sdist -> wheel -> an empty folder, where recipes are listed and train."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_CHECKOUT = ("PYTHONPATH", "MAKELEVEL")
BUILD_SDIST = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"

pytestmark = pytest.mark.slow


def pip() -> list[str]:
    """Return the command of pip, with which a wheel can be built here without network; skip where there is none."""
    # By what is installed: finding the module pip makes setuptools warn of a distutils imported before.
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    if int(installed.get("setuptools", "0").partition(".")[0]) < 77:
        pytest.skip("building a wheel without network needs setuptools >= 77 in this environment (pyproject.toml)")
    if "pip" in installed:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # uv makes environments without pip; Python brings one for those that `venv` makes.
    distribution = sysconfig.get_config_var("WHEEL_PKG_DIR") or ""
    places = [Path(os.__file__).parent / "ensurepip" / "_bundled", Path(distribution)]
    if not (wheels := [wheel for place in places for wheel in place.glob("pip-*.whl")]):
        pytest.skip("building a wheel needs pip, and neither this environment nor its Python has one")
    return [sys.executable, str(wheels[0] / "pip"), "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from an sdist, offline."""
    command = [*pip(), "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for folder in ("grpo_lite", "rewards", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-c", BUILD_SDIST, str(out), cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    run(*command, "-w", str(out), str(sdist), cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies are those of the running environment."""
    site = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-compile"]
    run(*pip(), "install", *offline, "--target", str(site), str(wheel), cwd=site)
    return site


def run(*command: str, cwd: Path, expect: int = 0, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in NO_CHECKOUT}
    result = subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=500)
    assert result.returncode == expect, f"{command}\n{result.stdout}{result.stderr}"
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def installed(site: Path, cwd: Path, *arguments: str, expect: int = 0) -> str:
    return run(str(site / "bin" / "grpo-lite"), *arguments, cwd=cwd, expect=expect, PYTHONPATH=str(site))


def test_the_wheel_holds_the_recipes_the_schema_the_page_and_the_starting_project(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"grpo_lite/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_lite").rglob("html/*") if path.is_file()}
    template = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_lite" / "recipe" / "template").glob("*.*")}
    assert len(recipes) > 10
    assert len(pages) > 3
    assert len(template) == 3
    missing = {"grpo_lite/recipes/schema.json", "grpo_lite/py.typed", *recipes, *pages, *template} - names
    assert missing == set()


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grpo_lite").rglob("*.py")}
    assert modules - names == set()


def test_an_empty_folder_has_all_recipes_and_hints_of_its_own(site: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import grpo_lite; print(grpo_lite.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.startswith(str(site))
    assert "\nquickstart " in installed(site, tmp_path, "recipes")
    assert "Shipped recipes: code, countdown," in installed(site, tmp_path, "train", "nothing", expect=1)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "recipe.yaml").write_text(installed(site, tmp_path, "show", "smoke"), encoding="utf-8")
    assert "grpo-lite train RECIPE --run runs/x" in installed(site, tmp_path, "chat", "runs/x", "hello", expect=1)


def test_a_printed_recipe_trains_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(installed(site, tmp_path, "show", "smoke", "name=my"), encoding="utf-8")
    short = ["grpo.max_steps=1", "eval.limit=4", "eval.samples=0"]
    text = installed(site, tmp_path, "train", "my.yaml", *short)
    assert "trained 1 step in" in text
    assert "make " not in text
    assert (tmp_path / "runs" / "my" / "report.html").is_file()


@pytest.mark.weights
def test_a_started_project_passes_its_check(site: Path, tmp_path: Path) -> None:
    installed(site, tmp_path, "init", "mine")
    assert "17" in installed(site, tmp_path / "mine", "check", "recipe.yaml")
