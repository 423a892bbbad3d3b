"""An OpenEnv server on loopback as an environment: the library's own template, and one that lists tools."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from grpo_lite.environments.openenv import environment_at
from grpo_lite.errors import GRPOLiteError
from tests.killing import train
from tests.tool_model import run_cli, write_tool_model

SERVER = Path(__file__).with_name("openenv_server.py")
MISSING = "the extra openenv is not installed (pip install 'grpo-lite[openenv]')"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that starts a server and returns its address."""
    pytest.importorskip("openenv", reason=MISSING)
    started = []

    def start(kind: str, sessions: int = 4) -> str:
        port = free_port()
        command = [sys.executable, "-W", "ignore", str(SERVER), str(port), str(sessions), kind, str(tmp_path / kind)]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert started[-1].poll() is None, "the server ended"
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
                return url
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_tools_that_a_server_lists_are_the_model_s(serve: Callable[..., str]) -> None:
    from transformers.utils import get_json_schema

    url = serve("tools", sessions=2)
    kind = environment_at(url)
    first, second = kind(), kind()
    schema = get_json_schema(first.add)["function"]
    assert schema["description"] == "Add a number to the total."
    assert schema["parameters"]["required"] == ["number"]
    assert schema["parameters"]["properties"]["times"]["type"] == "integer"
    assert first.reset(prompt="ignored", wanted=6) is None
    assert second.reset(wanted=1) is None
    assert first.add(number=2) == "total 2"
    assert first.get_reward() == 0.0
    with pytest.raises(ValueError, match="below 0"):
        first.add(number=-1)
    with pytest.raises(TypeError, match="number"):
        first.add(wrong=1)
    assert first.add(number=2, times=2) == "total 6"
    assert (first.get_reward(), second.get_reward()) == (1.0, 0.0)
    with pytest.raises(ValueError, match="the episode is over"):
        first.add(number=1)
    assert second.add(number=1) == "total 1"
    assert first.reset(wanted=1) is None
    assert first.add(number=1) == "total 1"
    with pytest.raises(RuntimeError, match="at capacity: 2/2"):
        kind().reset()


@pytest.mark.slow
def test_the_library_s_template_has_one_tool_step(serve: Callable[..., str]) -> None:
    environment = environment_at(serve("template"))()
    assert "environment ready" in environment.reset()
    assert environment.step(message="abc") == '{"echoed_message": "abc", "message_length": 3}'
    assert environment.get_reward() == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
        environment.step(message=3)
    assert environment.step(message="ab")
    assert environment.get_reward() == pytest.approx(0.5)  # 0.1 a letter, of all calls
    assert environment.reset()
    assert environment.get_reward() == 0.0


@pytest.mark.slow
def test_a_lost_connection_leaves_the_episode_without_a_reward(serve: Callable[..., str]) -> None:
    environment = environment_at(serve("tools"))()
    environment.reset()
    environment.add(number=2)
    environment._client._run(environment._client._async._ws.close())
    with pytest.raises(ConnectionError, match="was closed"):  # and not a new session, in which nothing was added yet
        environment.add(number=1)
    with pytest.raises(ConnectionError):
        environment.get_reward()
    environment.reset()  # a new session
    assert environment.add(number=1) == "total 1"


@pytest.mark.slow
def test_a_model_trains_against_a_server(serve: Callable[..., str], tmp_path: Path) -> None:
    url = serve("tools", sessions=8)
    command = [*train(tmp_path / "run", "environment"), f"environment=openenv:{url}", "grpo.max_steps=1", "rewards=[]"]
    done = run_cli(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"rewards/OpenEnv/mean"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    command = [*train(tmp_path / "more", "environment"), f"environment=openenv:{serve('tools', sessions=1)}"]
    done = run_cli(*command)
    assert done.returncode == 1
    assert "Server at capacity: 1/1 sessions active" in done.stderr
    assert "In 3 rounds in a row (limits.reward_failures) most of the 16 environments" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_session_ends_with_its_environment(serve: Callable[..., str]) -> None:
    kind = environment_at(serve("tools", sessions=1))
    for _ in range(3):
        environment = kind()
        environment.reset(wanted=1)
        assert environment.add(number=1) == "total 1"
        del environment


@pytest.mark.slow
def test_a_model_is_probed_evaluated_and_asked_with_a_server(serve: Callable[..., str], tmp_path: Path) -> None:
    """Twelve sessions: eight episodes of a round or of the probe, and four that are held out."""
    write_tool_model(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"wanted": {n}}}\n' for n in range(1, 17)))
    recipe = tmp_path / "adding.yaml"
    recipe.write_text(
        f"""
description: adds up
least_gpu: none
model: {{id: {tmp_path}, load_in: 32bit}}
data: {{train: {{path: {rows}}}, prompt: "Add up to {{wanted}}.", answer: null, holdout: 4}}
environment: openenv:{serve("tools", sessions=12)}
rewards: []
grpo:
  {{max_tool_calling_iterations: 3, max_completion_length: 60, num_generations: 4, per_device_train_batch_size: 8,
    gradient_accumulation_steps: 1, max_steps: 1, gradient_checkpointing: false}}
eval: {{samples: 2, batch_size: 4, every: 1}}
merge: false
"""
    )
    run = tmp_path / "run"
    probed = run_cli("probe", str(recipe))
    assert "episode" in probed.stdout, probed.stderr
    assert "at capacity" not in probed.stdout + probed.stderr
    trained = run_cli("train", str(recipe), "--run", str(run))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "at capacity" not in trained.stdout + trained.stderr
    scores = json.loads((run / "metrics.json").read_text())
    assert (scores["n"], scores["unusable_golds"]) == (4, 0)
    assert scores["episodes"]["trained"]["calls"] > 0
    answered = run_cli("chat", str(run), '{"wanted": 3}')
    assert answered.returncode == 0, answered.stdout + answered.stderr
    assert "→ add(" in answered.stdout


def test_an_address_without_a_server_is_one_line() -> None:
    with pytest.raises(GRPOLiteError, match=r"openenv:http://127.0.0.1:\d+: no server answers .*refused.* Start it"):
        environment_at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(GRPOLiteError, match=r"allowed is an address such as openenv:http://127\.0\.0\.1:8000"):
        environment_at("127.0.0.1:8000")
