"""The packages, and the recipes of a wheel. Everything else about the distribution is in pyproject.toml.

The folder `rewards` is installed as `grpo_lite.rewards`, since PyPI has another `rewards`, and `recipes` as
grpo_lite/recipes.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

RECIPES = Path(__file__).resolve().parent / "recipes"


class BuildWithRecipes(build_py):
    """Copies `recipes/` beside the modules. An editable install reads the checkout's folder and needs no copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "grpo_lite", "recipes")
        shutil.rmtree(target, ignore_errors=True)  # an earlier build's, with recipes that are gone
        target.mkdir(parents=True)
        for file in [*RECIPES.glob("**/*.yaml"), RECIPES / "schema.json"]:
            copy = target / file.relative_to(RECIPES)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


setup(
    packages=[
        *find_packages(include=["grpo_lite", "grpo_lite.*"]),
        *(f"grpo_lite.{package}" for package in find_packages(include=["rewards", "rewards.*"])),
    ],
    package_dir={"grpo_lite.rewards": "rewards"},
    cmdclass={"build_py": BuildWithRecipes},
)
