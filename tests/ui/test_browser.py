"""The page in a real browser: it follows a run, shows completions as text, fits a phone; no other site can read it."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from grpo_lite.runs.run_dir import RunDir
from grpo_lite.ui.server import serve
from tests.finished_run import make_run
from tests.report.test_browser import DESKTOP, PHONE, SMALLEST_TEXT, browser, pytestmark, texts
from tests.run_files import HOSTILE, write_run

__all__ = ["browser", "pytestmark"]  # a fixture, and the same marks
VIEWS = ["", "run/live", "run/hostile", "compare", "plan", "ask"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "runs"
    write_run(folder / "good")
    hostile = write_run(folder / "hostile", solved=(5, 6), overrides=("grpo.learning_rate=1e-7",))
    for file in (hostile.path / "completions").glob("step_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        told = [{"role": "user", "content": f"{HOSTILE} {rows[0]['step']}"}]
        file.write_text("".join(json.dumps({**row, "completion": HOSTILE, "prompt": told}) + "\n" for row in rows))
    stated = {"step": 3, "stage": "grpo", "key": "k", "sentence": f"It wrote {HOSTILE}", "override": f"a={HOSTILE}"}
    (hostile.path / "findings.jsonl").write_text(json.dumps(stated) + "\n")
    live = write_run(folder / "live", steps=6)
    live.scores_file.unlink()
    live.run_file.unlink()
    live.update_run(started_at="2026-01-01T00:00:00Z", max_steps=12, first_step=0)
    make_run(folder / "asked", after=15)
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> str:
    """The address of the page over the folder, token included."""
    address: list[str] = []
    announced = threading.Event()

    def announce(line: str) -> None:
        address.append(line)
        announced.set()

    threading.Thread(target=serve, args=(folder, 0, announce), daemon=True).start()
    assert announced.wait(20)
    return address[0]


@pytest.fixture(autouse=True)
def a_new_page(browser: Any) -> Iterator[None]:
    yield
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get("about:blank")


def look(browser: Any, site: str, view: str = "", size: tuple[int, int, bool] = DESKTOP) -> None:
    width, height, mobile = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get(f"{site}#/{view}")
    until(lambda: texts(browser, "#link") == ["live"])


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
    return value


def grow(run: RunDir, steps: int) -> None:
    """Write further steps as a training does: the step's completions, then its line of metrics."""
    last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    for step in range(last["step"] + 1, last["step"] + 1 + steps):
        rows = [json.loads(line) for line in (run.path / "completions" / "step_000006.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**row, "step": step, "completion": f"new in {step}"}) + "\n" for row in rows)
        (run.path / "completions" / f"step_{step:06d}.jsonl").write_text(text)
        with run.metrics_file.open("a") as file:
            file.write(json.dumps({**last, "step": step, "reward": 0.5}) + "\n")


def test_a_run_is_followed_while_it_grows(browser: Any, site: str, folder: Path) -> None:
    look(browser, site, "run/live")
    until(lambda: texts(browser, ".hero .big") == ["step 6/12"])
    assert texts(browser, ".headrow .state") == ["running"]
    line = "return document.querySelector('[data-chart=reward] polyline').getAttribute('points').split(' ').length"
    assert browser.execute_script(line) == 6
    grow(RunDir(folder / "live"), 3)
    until(lambda: texts(browser, ".hero .big") == ["step 9/12"])
    assert browser.execute_script(line) == 9
    assert "new in 9" in texts(browser, ".rows .item")[0]
    assert browser.title.startswith("step 9/12")
    browser.execute_script("location.hash = '#/'")
    until(lambda: any("step 9/12" in text for text in texts(browser, "a.run")))
    grow(RunDir(folder / "live"), 1)
    until(lambda: any("step 10/12" in text for text in texts(browser, "a.run")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_view_fits_the_screen_without_errors_and_from_here_alone(
    browser: Any, site: str, size: tuple[int, int, bool], scheme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get_log("browser")
    for view in VIEWS:
        look(browser, site, view, size)
        until(lambda: texts(browser, "main h1"))
        if view == "compare":
            until(lambda: texts(browser, ".choose label"))
            browser.execute_script("for (const box of document.querySelectorAll('.choose input')) box.click()")
            until(lambda: texts(browser, "#figures table"))
        if view == "plan":
            until(lambda: texts(browser, "#phases"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0], view
        assert browser.execute_script(SMALLEST_TEXT) >= 8.5, view  # pixels
        sources = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert {urlsplit(source).netloc for source in sources} == {urlsplit(site).netloc}
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", paper)))
        assert (brightness < 200) == (scheme == "dark"), paper
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("view", ["", "run/hostile", "compare"])
def test_hostile_completions_and_findings_are_text(browser: Any, site: str, view: str) -> None:
    look(browser, site, view)
    if view == "run/hostile":
        items = until(lambda: texts(browser, ".rows .item pre"))
        assert any(HOSTILE in item for item in items)
        assert any(HOSTILE in item for item in texts(browser, ".findings p"))
    until(lambda: texts(browser, "main h1"))
    time.sleep(0.5)
    assert "owned" not in browser.title
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0


def test_the_full_report_works_in_its_own_origin(browser: Any, site: str) -> None:
    look(browser, site, "run/hostile")
    address = until(lambda: browser.execute_script("return document.querySelector('.actions a')?.href"))
    browser.get_log("browser")
    browser.get(address)
    assert len(texts(browser, "[data-rows=completions] .item")) == 10  # its script runs
    assert "owned" not in browser.title
    assert browser.get_log("browser") == []
    reached = browser.execute_async_script(
        "const done = arguments[0]; fetch('/api/runs').then(a => done(a.status), () => done('refused'))"
    )
    assert reached == "refused"


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_page_of_another_origin_reads_nothing_even_with_the_token(browser: Any, site: str, elsewhere: str) -> None:
    browser.get(elsewhere)
    root, token = site.partition("/?")[0], site.partition("token=")[2]
    fetching = """
    const [address, token, done] = arguments;
    const tries = [
      fetch(address + '/api/runs', {headers: {Authorization: 'Bearer ' + token}}),
      fetch(address + '/?token=' + token),
      fetch(address + '/api/ask', {method: 'POST', body: '{"run": "asked", "question": "1+1="}'}),
    ];
    Promise.allSettled(tries).then(all => done(all.map(one => one.status)));
    """
    assert browser.execute_async_script(fetching, root, token) == ["rejected"] * 3
    opaque = """
    const [address, done] = arguments;
    fetch(address, {mode: 'no-cors'}).then(a => done(a.type), () => done('blocked'));
    """
    assert browser.execute_async_script(opaque, f"{root}/page/ui.js") == "blocked"  # Cross-Origin-Resource-Policy
    framed = """
    const [address, done] = arguments, frame = document.createElement('iframe');
    frame.onload = () => done(frame.contentDocument ? 'open' : 'hidden');
    frame.src = address; document.body.append(frame);
    """
    assert browser.execute_async_script(framed, site) == "hidden"


def test_the_sliders_of_the_plan_change_its_number(browser: Any, site: str) -> None:
    look(browser, site, "plan")
    big = until(lambda: texts(browser, ".hero .big"))
    assert re.fullmatch(r"\d+\.\d GiB of 14\.6 GiB", big[0])
    move = """
    const input = document.querySelector(`[name=${arguments[0]}]`);
    input.value = arguments[1]; input.dispatchEvent(new Event('input', {bubbles: true}));
    """
    browser.execute_script(move, "completion", 4096)
    longer = until(lambda: (now := texts(browser, ".hero .big")) != big and now)
    assert float(longer[0].split()[0]) > float(big[0].split()[0])
    assert "4096 tokens" in texts(browser, ".form label b")
    browser.execute_script(move, "group", 0)
    until(lambda: any("grpo.num_generations=2 " in text for text in texts(browser, "#command code")))
    browser.execute_script(move, "card", "rtx4060-8")
    until(lambda: "7.6 GiB" in texts(browser, ".hero .big")[0])
    browser.execute_script(move, "recipe", "smoke")
    until(lambda: texts(browser, "#command code") == ["grpo-lite train smoke"])


def test_base_and_trained_answer_side_by_side(browser: Any, site: str) -> None:
    look(browser, site, "ask/asked%2Frun")
    until(lambda: browser.execute_script("return document.querySelector('[name=run]').value") == "asked/run")
    browser.execute_script("document.querySelector('textarea').value = '<b>2+3</b>'")
    browser.execute_script("document.querySelector('form button').click()")
    sides = until(lambda: texts(browser, ".answers .sidepair small"), seconds=120)
    assert sides == ["base", "trained"]
    assert texts(browser, ".answers .prompt") == ["<b>2+3</b>"]
    assert len(texts(browser, ".answers .sidepair pre")) == 2
    assert texts(browser, ".error") == []
    assert os.environ.get("HF_HUB_OFFLINE")
