"""Adds the recipes to a wheel, as grpo_lite/recipes. Everything else about the package is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
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
        for file in [*RECIPES.glob("*.yaml"), RECIPES / "schema.json"]:
            shutil.copyfile(file, target / file.name)


setup(cmdclass={"build_py": BuildWithRecipes})
