"""Killed and resumed equals never killed, bit for bit: adapter, metrics, completions, merged weights (CPU, float32)."""

from __future__ import annotations

import importlib
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import Server
from tests.finished_run import make_run
from tests.killing import CONFIGURATIONS, EXPORT_MOMENTS, MOMENTS, export, exported, outcome, train


@pytest.fixture(scope="module")
def references(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the outcome of a configuration's run that nobody disturbs."""
    made: dict[str, dict[str, Any]] = {}

    def reference(configuration: str) -> dict[str, Any]:
        if configuration not in made:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            log = run.with_name("log")
            assert server.run(train(run, configuration), log) == 0, log.read_text()
            made[configuration] = outcome(run)
        return made[configuration]

    return reference


def survives(server: Server, run: Path, configuration: str, expected: dict[str, Any], *kills: tuple[str, int]) -> str:
    """Kill a run at each of the moments in turn, resuming in between; it must end as the undisturbed one did."""
    log = run.with_name("log")
    command = train(run, configuration)
    for moment, call in kills:
        status = server.run(command, log, moment, call)
        assert status == -9, f"{moment} {call} was never reached ({status}):\n{log.read_text()}"
    assert server.run(command, log) == 0, log.read_text()
    found = outcome(run)
    assert found["strangers"] == []
    assert found["metrics"] == expected["metrics"]
    assert found == expected
    return log.read_text()


KILLS: list[tuple[str, list[tuple[str, int]]]] = [
    # In the warm-up, before its adapter is written, after that, between the stages, and in GRPO.
    (
        "warm-up",
        [("backward", 4), ("warm-up: ended", 2), ("warm-up: adapter", 1), ("warm-up: done", 1), ("backward", 3)],
    ),
    ("all at once", [("backward", 17), ("checkpoint: tensors written", 2)]),
    # Between the turns of an episode, in a call of a tool, in the optimizer step after it, and before a reward.
    (
        "environment",
        [("between turns", 5), ("tool call", 40), ("after backward", 5), ("optimizer step", 2), ("reward", 2)],
    ),
    ("to the merge", [("checkpoint: older removed", 3), ("adapter written", 1), ("merge: a block", 5), ("report", 1)]),
]


@pytest.mark.slow
@pytest.mark.parametrize("configuration, kills", KILLS, ids=[name for name, _ in KILLS])
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(
    server: Server, references: Any, tmp_path: Path, configuration: str, kills: list[tuple[str, int]]
) -> None:
    text = survives(server, tmp_path / "run", configuration, references(configuration), *kills)
    if ("report", 1) in kills:  # by then the run is recorded as finished
        assert "the run is finished; its report is written now" in text
    else:
        assert "resuming from step" in text


@pytest.mark.parametrize("moments", [MOMENTS, EXPORT_MOMENTS], ids=["training", "export"])
def test_every_moment_is_a_function_that_is_there(moments: dict[str, tuple[str, str]]) -> None:
    """The matrices below run for hours and seldom: a function that was renamed is seen here."""
    for name, (target, _) in moments.items():
        module, _, path = target.partition(":")
        assert callable(attrgetter(path)(importlib.import_module(module))), name


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_moment_of_every_configuration(
    server: Server, references: Any, tmp_path: Path, configuration: str, moment: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    for call in (1, 4, None):  # a moment that a configuration does not have leaves the run undisturbed
        if server.run(train(run, configuration), log, moment if call else None, call or 0) == 0:
            break
    assert outcome(run) == references(configuration), log.read_text()


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, merged run of a model that llama.cpp could read; copies of it are exported."""
    return make_run(tmp_path_factory.mktemp("merged"), hidden_size=64, intermediate_size=128, head_dim=16).path


@pytest.fixture(scope="module")
def undisturbed_export(server: Server, merged_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(merged_run, run)
    log = run.with_name("log")
    assert server.run(export(run), log) == 0, log.read_text()
    return exported(run)


@pytest.mark.slow
def test_a_killed_export_is_completed_by_the_next(
    server: Server, merged_run: Path, undisturbed_export: Any, tmp_path: Path
) -> None:
    """Both folders: before the swap of the second, and between the GGUF's record and its checksum."""
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(merged_run, run)
    for moment, call in (("nf4: in its place", 1), ("export: swap", 1), ("gguf: record", 1)):
        assert server.run(export(run), log, moment, call) == -9, log.read_text()
    assert server.run(export(run), log) == 0, log.read_text()
    assert exported(run) == undisturbed_export
    assert "gguf.json: corrupted" in log.read_text()


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("moment", EXPORT_MOMENTS)
def test_every_moment_of_the_exports(
    server: Server, merged_run: Path, undisturbed_export: Any, tmp_path: Path, moment: str, call: int
) -> None:
    """An export that had been made before is replaced: what lay there is never lost half way."""
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(merged_run, run)
    for repeat in (False, True):
        command = [*export(run), *(["--overwrite"] if repeat else [])]
        server.run(command, log, moment, call)
        assert server.run(export(run), log) == 0, log.read_text()
        assert exported(run) == undisturbed_export


@pytest.mark.slow
def test_the_newest_checkpoint_is_passed_over_by_name_when_it_is_damaged(
    server: Server, references: Any, tmp_path: Path
) -> None:
    run, log, configuration = tmp_path / "run", tmp_path / "log", "all at once"
    assert server.run(train(run, configuration), log, "backward", 25) == -9
    weights = run / "checkpoint-12" / "optimizer.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    text = survives(server, run, configuration, references(configuration))
    assert "skipped a damaged checkpoint: checkpoint-12: optimizer.pt: corrupted" in text
    assert "resuming from step 9" in text
