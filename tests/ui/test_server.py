"""The page's server: who is refused, what each route answers, and that nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from grpo_lite.errors import DataError
from grpo_lite.ui.ask import Asker, Busy
from grpo_lite.ui.server import HOST, _Json, _listening, build_app, report_key
from grpo_lite.ui.views import runs_in
from tests.command_line import in_process
from tests.run_files import write_run
from tests.ui.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette asks for httpx2, which huggingface_hub 1 does not use
    from starlette.testclient import TestClient

TOKEN = "a-token"
SITE = "http://127.0.0.1:8642"
DATA = ["/api/runs", "/api/run?run=good", "/api/compare?run=good&run=warm", "/api/plan?recipe=gsm8k", "/api/choices"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "runs"
    write_run(folder / "good")
    write_run(folder / "sweep" / "warm", solved=(2, 9, 15))
    shutil.copytree(folder / "sweep" / "warm", folder / "warm")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("model: [\n")
    return folder


@pytest.fixture
def client(folder: Path) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield TestClient(build_app(folder, TOKEN), base_url=SITE, headers={"Authorization": f"Bearer {TOKEN}"})


def test_cards_have_state_progress_verdict_and_curve(client: Any) -> None:
    answer = client.get("/api/runs")
    runs = {run["name"]: run for run in answer.json()["runs"]}
    assert set(runs) == {"good", "warm", "sweep/warm", "broken"}
    assert runs["good"]["state"] == "finished"
    assert runs["good"]["count"] == "step 12/12"
    assert runs["good"]["headline"]["label"] == "significant gain"
    assert len(runs["good"]["curve"]) == 12
    assert runs["good"]["trained"] is False
    assert runs["broken"]["state"] == "unreadable"
    assert "recipe.yaml" in runs["broken"]["error"]


def test_a_damaged_run_is_named_and_hides_no_other(client: Any, folder: Path) -> None:
    shutil.copytree(folder / "good", folder / "damaged")
    try:
        (folder / "damaged" / "metrics.json").write_text('{"lenient": 1}')
        runs = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
        assert runs["damaged"]["state"] == "unreadable"
        assert "damaged" in runs["damaged"]["error"]
        assert runs["good"]["state"] == "finished"
        calm = TestClient(client.app, SITE, raise_server_exceptions=False, headers={"Authorization": f"Bearer {TOKEN}"})
        answer = calm.get("/api/run?run=damaged")
        assert answer.status_code == 500
        assert "AttributeError" in answer.json()["error"]
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    finally:
        shutil.rmtree(folder / "damaged")


def test_a_name_that_is_no_text_and_a_number_that_json_lacks_are_sent_all_the_same() -> None:
    body = _Json({"name": "\udcff", "score": float("nan")}).body
    assert json.loads(body) == {"name": "\udcff", "score": None}


def test_a_second_question_is_told_to_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = Asker()
    monkeypatch.setattr("grpo_lite.ui.ask.require_trained", lambda run: None)
    with asker._lock, pytest.raises(Busy, match="another question is being answered"):
        asker.ask(runs_in(folder)["good"], "1+1=")


def test_an_idle_model_leaves_memory_and_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    class Loaded:
        def __init__(self, run: Any, sampling: Any, compare: bool) -> None:
            loaded.append(weakref.ref(self))

        def ask(self, question: str) -> dict[str, str]:
            return {"base": "1", "trained": "2"}

    monkeypatch.setattr("grpo_lite.ui.chat.Chat", Loaded)
    monkeypatch.setattr("grpo_lite.ui.ask.require_trained", lambda run: None)
    run = runs_in(folder)["good"]
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    try:
        asker = Asker()
        for _ in range(2):
            assert asker.ask(run, "1+1=")["answers"] == {"base": "1", "trained": "2"}
        assert len(loaded) == 1  # ten minutes have not passed
        monkeypatch.setattr("grpo_lite.ui.ask.IDLE_S", 0.05)
        asker.ask(run, "1+1=")
        ends = time.monotonic() + 20
        while loaded[0]() is not None and time.monotonic() < ends:
            time.sleep(0.02)
        assert loaded[0]() is None
        asker.ask(run, "1+1=")
        assert len(loaded) == 2
    finally:
        shutil.rmtree(run.adapter)


def test_a_folder_without_runs_is_an_empty_page(tmp_path: Path) -> None:
    client = TestClient(build_app(tmp_path / "none", TOKEN), SITE, headers={"Authorization": f"Bearer {TOKEN}"})
    assert client.get("/api/runs").json()["runs"] == []


def test_a_run_has_curves_findings_and_its_latest_completions(client: Any) -> None:
    run = client.get("/api/run?run=good").json()
    keys = [chart["key"] for chart in run["charts"]]
    assert keys[:3] == ["reward", "heldout", "parts"]
    reward = run["charts"][0]["lines"][0]
    assert reward["x"] == list(range(1, 13))
    assert len(reward["low"]) == len(reward["high"]) == 12
    assert "nothing found wrong" in run["clean"]
    assert [row["step"] for row in run["completions"]] == [12] * 8 + [11] * 8 + [10] * 8  # the newest first


def test_a_run_says_where_it_stands_in_its_recipe_s_band(client: Any, folder: Path) -> None:
    assert client.get("/api/run?run=good").json()["expected"] is None
    banded = folder / "banded"
    shutil.copytree(folder / "good", banded)
    recipe = yaml.safe_load((banded / "recipe.yaml").read_text())
    recipe["expected"] = {"source": "a paper", "model": "m", "hardware": "h", "points": [[1, 5.0, 6.0], [20, 5.0, 6.0]]}
    (banded / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = client.get("/api/run?run=banded").json()
    shutil.rmtree(banded)
    assert run["expected"].startswith("outside the band, ")
    assert "below: reward" in run["expected"]
    assert [line["name"] for line in run["charts"][0]["lines"]] == ["reward", "expected"]


def test_an_unchanged_run_is_not_sent_again_and_a_grown_one_is(client: Any, folder: Path) -> None:
    shutil.copytree(folder / "good", folder / "growing")
    try:
        tag = client.get("/api/run?run=growing").headers["etag"]
        assert client.get("/api/run?run=growing", headers={"If-None-Match": tag}).status_code == 304
        last = json.loads((folder / "growing" / "metrics.jsonl").read_text().splitlines()[-1])
        with (folder / "growing" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**last, "step": 13}) + "\n")
        answer = client.get("/api/run?run=growing", headers={"If-None-Match": tag})
        assert answer.status_code == 200
        assert answer.json()["charts"][0]["lines"][0]["x"][-1] == 13
        everything = client.get("/api/runs").headers["etag"]
        assert client.get("/api/runs", headers={"If-None-Match": everything}).status_code == 304
    finally:
        shutil.rmtree(folder / "growing")


def test_runs_are_compared(client: Any) -> None:
    compared = client.get("/api/compare?run=good&run=sweep/warm").json()
    assert compared["names"] == ["good", "warm"]
    assert [len(chart["lines"]) for chart in compared["charts"] if chart["key"] == "reward"] == [2]
    assert any(key == "warmup.source" or key == "warmup" for key, _ in compared["differences"])
    alone = client.get("/api/compare?run=good")
    assert (alone.status_code, alone.json()) == (404, {"error": "compare: choose two or more runs."})


def test_the_plan_follows_group_and_length(client: Any) -> None:
    def needed(**values: Any) -> int:
        answer = client.get("/api/plan", params={"recipe": "gsm8k", "card": "t4", **values})
        assert answer.status_code == 200, answer.text
        return answer.json()["needed"]

    assert needed(completion=2048) > needed() > needed(completion=128)
    plan = client.get("/api/plan?recipe=gsm8k&card=2GiB").json()
    assert plan["fits"] is False
    assert "would make it fit" in plan["advice"]
    assert plan["groups"] == [2, 4, 8, 16, 32, 64]  # a round of gsm8k has 128 completions
    changed = client.get("/api/plan?recipe=gsm8k&card=t4&group=16").json()
    assert changed["command"] == "grpo-lite train gsm8k grpo.num_generations=16"
    assert {phase["name"] for phase in changed["phases"]} == {"rollout", "training", "evaluation"}


@pytest.mark.parametrize(
    "query, message",
    [
        ("recipe=../secret", "no shipped recipe"),
        ("recipe=gsm8k&group=3", "not a multiple of num_generations = 3"),
        ("recipe=gsm8k&group=x", "whole numbers"),
        ("recipe=gsm8k&card=x", "gpu: 'x' is given"),
    ],
)
def test_a_plan_that_cannot_be_says_why(client: Any, query: str, message: str) -> None:
    answer = client.get(f"/api/plan?{query}")
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_the_report_comes_in_an_origin_of_its_own_and_is_not_written(client: Any, folder: Path) -> None:
    key = client.get("/api/run?run=good").json()["report_key"]
    answer = client.get(f"/report?run=good&key={key}")
    assert answer.status_code == 200
    assert "GRPO run report" in answer.text
    assert "sandbox allow-scripts" in answer.headers["content-security-policy"]
    assert not (folder / "good" / "report.html").exists()


def test_the_address_of_a_report_opens_nothing_else(client: Any, folder: Path) -> None:
    """It is passed on by people, and stays in a browser's history."""
    key = client.get("/api/run?run=good").json()["report_key"]
    assert key != client.get("/api/run?run=warm").json()["report_key"]
    stranger = TestClient(build_app(folder, TOKEN), base_url=SITE, headers={"Authorization": f"Bearer {key}"})
    assert stranger.get("/report", params={"run": "good", "key": key}).status_code == 200
    for path, query in {"/report": {"run": "warm", "key": key}, "/": {"token": key}, "/api/runs": {}}.items():
        assert stranger.get(path, params=query).status_code == 403, path
    assert client.get("/report", params={"run": "good", "token": TOKEN}).status_code == 403


@pytest.mark.parametrize("path", [*DATA, f"/?token={TOKEN}", "/page/ui.js", "/page/page.css"])
def test_every_answer_has_the_headers_that_keep_the_page_tight(client: Any, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [*DATA, "/", "/report?run=good"])
@pytest.mark.parametrize("given", [None, "", "A-token", "a-token-and-more"])
def test_without_the_token_nothing_is_said(folder: Path, path: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    client = TestClient(build_app(folder, TOKEN), base_url=SITE, headers=headers)
    answer = client.get(path)
    assert answer.status_code == 403
    assert "token" in answer.text


@pytest.mark.parametrize("path", DATA)
def test_the_token_in_an_address_opens_no_data(folder: Path, path: str) -> None:
    """A form or an image of another site can send an address, but no header."""
    client = TestClient(build_app(folder, TOKEN), base_url=SITE)
    assert client.get(path, params={"token": TOKEN}).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example:8642", "[::1]:8642", "", "127.0.0.1:1/page/?"]
)
def test_another_host_name_is_refused(client: Any, host: str) -> None:
    """DNS rebinding: a name of the attacker's that now leads to 127.0.0.1."""
    for path in (*DATA, f"/?token={TOKEN}", "/page/ui.js"):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8642", "file://", ""]
)
def test_another_origin_is_refused(client: Any, origin: str) -> None:
    for path in (*DATA, f"/?token={TOKEN}"):
        assert client.get(path, headers={"Origin": origin}).status_code == 403
    assert client.post("/api/ask", json={}, headers={"Origin": origin}).status_code == 403
    assert client.get("/api/runs", headers={"Origin": SITE}).status_code == 200


@pytest.mark.parametrize("name", ["", "nothing", "../runs/good", "good/../good", "/etc", "good/completions"])
def test_only_runs_of_the_folder_are_read(client: Any, name: str) -> None:
    for answer in (
        client.get("/api/run", params={"run": name}),
        client.get("/report", params={"run": name, "key": report_key(TOKEN, name)}),
        client.post("/api/ask", json={"run": name, "question": "1+1="}),
    ):
        assert answer.status_code == 404
        assert "there is none" in answer.json()["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(client: Any, method: str) -> None:
    for path in DATA:
        assert client.request(method, path).status_code == 405
    assert client.get("/api/ask").status_code == 405


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"run": "good"}', b'{"run": "good", "question": "x", "temperature": "hot"}']
)
def test_a_malformed_question_is_refused(client: Any, body: bytes) -> None:
    answer = client.post("/api/ask", content=body)
    assert answer.status_code == 400
    assert "run, question" in answer.json()["error"]


def test_a_question_without_end_is_not_read(client: Any) -> None:
    assert client.post("/api/ask", content=b"x" * 1_000_000).status_code == 413


def test_a_run_without_an_adapter_cannot_be_asked(client: Any) -> None:
    answer = client.post("/api/ask", json={"run": "good", "question": "1+1="})
    assert answer.status_code == 404
    assert "not trained yet" in answer.json()["error"]


@pytest.mark.parametrize("question", ["", "  \n", "x" * 20_001])
def test_a_question_has_some_characters_and_not_too_many(folder: Path, question: str) -> None:
    with pytest.raises(DataError, match="1 to 20,000 characters"):
        Asker().ask(runs_in(folder)["good"], question)


def test_secrets_are_left_out(client: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "do-not-show-this-1")
    shutil.copytree(folder / "good", folder / "secret")
    try:
        file = next((folder / "secret" / "completions").glob("step_000012.jsonl"))
        row = json.loads(file.read_text().splitlines()[0])
        token = "hf_" + "A" * 34  # known by its form, also at the beginning of a line
        file.write_text(json.dumps({**row, "completion": f"the key is do-not-show-this-1\n{token}"}) + "\n")
        text = client.get("/api/run?run=secret").text
        assert "the key is" in text
        assert "do-not-show-this-1" not in text
        assert token not in text
    finally:
        shutil.rmtree(folder / "secret")


def test_it_listens_on_this_machine_only_and_takes_another_port_where_one_is_in_use() -> None:
    with _listening(0) as first:
        host, port = first.getsockname()
        assert host == HOST == "127.0.0.1"
        with _listening(port) as second:
            assert second.getsockname()[0] == HOST
            assert second.getsockname()[1] != port


def test_serve_announces_an_address_that_opens_the_page(folder: Path) -> None:
    address = served(folder)
    with httpx.Client(trust_env=False, timeout=20) as client:
        answer = client.get(address)
        assert answer.status_code == 200
        assert "<title>grpo_lite runs</title>" in answer.text
        assert client.get(address.partition("?")[0]).status_code == 403


def test_a_missing_server_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "uvicorn" else find(name, *more)
    )
    text = in_process("watch", "--web", expect=1)
    assert "needs starlette and uvicorn" in text
    assert "make ui" in text
    assert "grpo-lite[ui]" in text


def test_watch_needs_a_run_or_the_web(tmp_path: Path) -> None:
    assert "--web" in in_process("watch", expect=2)


def test_the_command_serves_the_folder_of_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Path, int]] = []

    def instead(folder: Path, port: int, announce: Any) -> None:
        served.append((folder, port))
        announce("http://127.0.0.1:1/?token=t")

    monkeypatch.setattr("grpo_lite.ui.server.serve", instead)
    text = in_process("watch", "--web", "--port", "0", str(folder / "good"))
    assert served == [(folder.resolve(), 0)]
    assert "http://127.0.0.1:1/?token=t#/run/good" in text
    monkeypatch.chdir(folder.parent)
    in_process("watch", "--web")
    assert served[1] == (Path(os.getcwd()) / "runs", 8642)
