"""The rewards under both names, `rewards` and `grpo_lite.rewards`: in a checkout, from a wheel, and alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_wheel import pip

ROOT = Path(__file__).resolve().parents[2]
REWARDS_ONLY = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")  # what pip installs for it

WITHOUT_EDITABLE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
"""

BOTH_NAMES = """
import sys
import {first}, {second}
import grpo_lite.rewards.judge.client, rewards.judge.client, rewards.sandbox.run
from grpo_lite.rewards.sandbox.run import isolation
from rewards.facts import named
from grpo_lite.task.rewards import import_function
assert sys.modules["rewards"] is sys.modules["grpo_lite.rewards"] is rewards is grpo_lite.rewards
assert rewards.judge.client is grpo_lite.rewards.judge.client
assert rewards.sandbox.run.isolation is isolation
assert rewards.sandbox.run.__spec__.name == rewards.sandbox.run.__name__
paths = "rewards.accuracy_reward", "grpo_lite.rewards.accuracy_reward", "rewards.accuracy.accuracy_reward"
assert {{import_function(path, "rewards[0]") for path in paths}} == {{rewards.accuracy_reward}}
assert {{named(path) for path in paths}} == {{rewards.accuracy_reward}}
files = [m.__file__ for m in {{id(m): m for m in list(sys.modules.values())}}.values() if getattr(m, "__file__", None)]
assert len([f for f in files if "rewards" in f]) == len({{f for f in files if "rewards" in f}})
print(rewards.__name__)
"""

FOREIGN = """
import rewards
assert rewards.whose == "foreign"
import grpo_lite.rewards
from grpo_lite.task.rewards import import_function
assert import_function("rewards.accuracy_reward", "rewards[0]") is grpo_lite.rewards.accuracy_reward
assert import_function("rewards.accuracy.accuracy_reward", "rewards[0]") is grpo_lite.rewards.accuracy_reward
assert import_function("rewards.foreign_reward", "rewards[0]") is rewards.foreign_reward
assert grpo_lite.rewards.accuracy_reward([r"\\boxed{\\sqrt{8}}"], [r"2\\sqrt{2}"]) == [1.0]
print(grpo_lite.rewards.__name__)
"""

AT_WORK = """
import sys
from grpo_lite.rewards import accuracy_reward, unit_test_reward
assert accuracy_reward([r"\\boxed{x+x}", "#### 4"], solution=["$2x$", "5"]) == [1.0, 0.0]
program = "```python\\ndef f():\\n    return 4\\n```"
assert unit_test_reward([program, program], test_list=[["assert f() == 4"], ["assert f() == 5"]]) == [1.0, 0.0]
assert not {"torch", "transformers", "trl"} & set(sys.modules)
print(sys.modules["grpo_lite.rewards"].__file__)
"""


def run(code: str, *path: Path, cwd: Path, flags: tuple[str, ...] = ()) -> str:
    """Run a program with these folders first on its path and no editable install, and return its output."""
    code = f"{WITHOUT_EDITABLE}sys.path[:0] = {[str(folder) for folder in path]!r}\n{code}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with another package called `rewards`, as PyPI has one."""
    package = tmp_path / "foreign" / "rewards"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        'whose = "foreign"\n\n\ndef foreign_reward(completions, **kwargs):\n    return [0.0 for _ in completions]\n'
    )
    return package.parent


@pytest.mark.parametrize("names", [("rewards", "grpo_lite.rewards"), ("grpo_lite.rewards", "rewards")])
def test_a_checkout_has_the_same_modules_under_both_names(names: tuple[str, str], tmp_path: Path) -> None:
    code = BOTH_NAMES.format(first=names[0], second=names[1])
    assert run(code, ROOT, cwd=tmp_path) == "rewards"


@pytest.mark.parametrize("names", [("rewards", "grpo_lite.rewards"), ("grpo_lite.rewards", "rewards")])
def test_an_editable_install_has_both_names_outside_the_checkout(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "grpo_lite").symlink_to(ROOT / "grpo_lite")  # found as by setuptools' finder: the folder alone
    code = f"import grpo_lite\n{BOTH_NAMES.format(first=names[0], second=names[1])}"
    assert run(code, tmp_path, cwd=tmp_path) == "rewards"


def test_a_checkout_beside_a_foreign_rewards_uses_its_own(foreign: Path, tmp_path: Path) -> None:
    assert run(FOREIGN, foreign, ROOT, cwd=tmp_path) == "grpo_lite.rewards"


def build(project: Path, out: Path) -> Path:
    """Build a wheel offline from a copy of the checkout, so that nothing is left in it, and return its contents."""
    command = [*pip(), "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(out)]
    source = out / "source"
    for folder in ("grpo_lite", "rewards", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    done = subprocess.run([*command, str(source / project)], cwd=out, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Path(), tmp_path_factory.mktemp("grpo_lite"))


@pytest.fixture(scope="module")
def rewards_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution grpo-lite-rewards and what it depends on, and nothing else."""
    site = build(Path("rewards"), tmp_path_factory.mktemp("rewards_only"))
    for name in REWARDS_ONLY:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (site / name).symlink_to(Path(spec.origin).parent)
    for metadata in Path(spec.origin).parent.parent.glob("antlr4_python3_runtime-*.dist-info"):
        (site / metadata.name).symlink_to(metadata)
    return site


@pytest.mark.slow
def test_a_wheel_has_no_top_level_rewards_and_every_module_of_it(site: Path, rewards_only: Path) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rewards").rglob("*.py")}
    assert len(modules) > 30
    for place in (site, rewards_only):
        assert not (place / "rewards").exists()
        assert {path.relative_to(place / "grpo_lite").as_posix() for path in place.rglob("rewards/**/*.py")} == modules
    assert not (rewards_only / "grpo_lite" / "__init__.py").exists()


@pytest.mark.slow
def test_the_rewards_alone_are_typed_and_carry_their_licence(rewards_only: Path) -> None:
    assert (rewards_only / "grpo_lite" / "rewards" / "py.typed").is_file()
    (licence,) = rewards_only.glob("grpo_lite_rewards-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_a_wheel_has_the_same_modules_under_both_names(site: Path, tmp_path: Path) -> None:
    code = BOTH_NAMES.format(first="grpo_lite.rewards", second="rewards")
    assert run(code, site, cwd=tmp_path) == "grpo_lite.rewards"


@pytest.mark.slow
def test_a_wheel_beside_a_foreign_rewards_uses_its_own(site: Path, foreign: Path, tmp_path: Path) -> None:
    assert run(FOREIGN, foreign, site, cwd=tmp_path) == "grpo_lite.rewards"


@pytest.mark.slow
def test_a_wheel_s_rewards_work_without_torch(site: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')\n")
    assert run(AT_WORK, tmp_path, site, cwd=tmp_path).startswith(str(site))


@pytest.mark.slow
def test_the_rewards_alone_work_with_their_own_dependencies(rewards_only: Path, tmp_path: Path) -> None:
    where = run(AT_WORK, rewards_only, cwd=tmp_path, flags=("-I", "-S"))
    assert where.startswith(str(rewards_only))
