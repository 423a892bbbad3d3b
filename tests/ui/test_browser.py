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

from grpo_lite.runs.run_dir import RunDir, dump_recipe
from tests.finished_run import make_run
from tests.report.test_browser import DESKTOP, PHONE, SMALLEST_TEXT, browser, pytestmark, texts
from tests.run_files import HOSTILE, write_run
from tests.ui.serving import served

__all__ = ["browser", "pytestmark"]  # a fixture, and the same marks
TICK_ALL = "for (const box of document.querySelectorAll('.choose input')) box.click()"
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
    recipe = hostile.load_recipe()
    model = recipe.model.model_copy(update={"id": f"model {HOSTILE}"})
    named = recipe.model_copy(update={"description": f"described {HOSTILE}", "model": model})
    hostile.recipe_file.write_text(dump_recipe(named))
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
    return served(folder)


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


def until(true: Callable[[], Any], seconds: float = 120.0) -> Any:
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


@pytest.mark.parametrize("size, scheme", [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop-light", "phone-dark"])
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
            browser.execute_script(TICK_ALL)
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


# by view: where the hostile text must stand
HOSTILE_PLACES = {
    "": {"a.run p": f"described {HOSTILE}", "a.run p.mono": f"model {HOSTILE}"},
    "run/hostile": {
        ".rows .item pre": HOSTILE,
        ".findings p": f"It wrote {HOSTILE}",
        "p.lead": f"described {HOSTILE}",
        "p.lead .mono": f"model {HOSTILE}",
    },
    "compare": {"#recipes td": f"model {HOSTILE}"},
}


@pytest.mark.parametrize("view", HOSTILE_PLACES)
def test_hostile_completions_and_findings_are_text(browser: Any, site: str, view: str) -> None:
    look(browser, site, view, PHONE)
    if view == "compare":
        until(lambda: texts(browser, ".choose label"))
        browser.execute_script(TICK_ALL)
    for selector, text in HOSTILE_PLACES[view].items():
        shown = until(lambda selector=selector: texts(browser, selector))
        assert any(text in each for each in shown), (selector, shown)
    time.sleep(0.5)
    assert "owned" not in browser.title
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]


# Answers to addresses that begin with a prefix wait until `release(i)`: the i-th that was held.
HOLD_ANSWERS = """
const prefix = arguments[0], real = window.fetch, held = [];
window.held = held;
window.release = (i) => held[i]();
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (path.startsWith(prefix)) await new Promise((go) => held.push(go));
  return answer;
};
"""


def hold_answers(browser: Any, prefix: str) -> Callable[[int], None]:
    """Hold the answers to a path; return what waits until a number of them are held."""
    browser.execute_script(HOLD_ANSWERS, prefix)

    def wait_for(count: int) -> None:
        until(lambda: browser.execute_script("return held.length") == count)

    return wait_for


def test_compare_shows_the_runs_asked_for_last(browser: Any, site: str) -> None:
    look(browser, site, "compare")
    until(lambda: texts(browser, ".choose label"))
    held = hold_answers(browser, "/api/compare")
    tick = "document.querySelector(`.choose input[value=${arguments[0]}]`).click()"
    browser.execute_script(tick, "good")
    browser.execute_script(tick, "hostile")
    held(1)
    browser.execute_script(tick, "live")
    held(2)
    browser.execute_script("release(1)")
    until(lambda: len(texts(browser, ".sides h2")) == 3)
    browser.execute_script("release(0)")  # good and hostile: too late
    time.sleep(0.3)
    assert texts(browser, ".sides h2") == ["good", "hostile", "live"]
    browser.execute_script(tick, "live")
    held(3)
    browser.execute_script(tick, "good")
    browser.execute_script("release(2)")
    time.sleep(0.3)
    assert texts(browser, ".sides h2") == []  # one run is ticked


def test_a_run_that_answers_late_does_not_name_the_view_asked_for_since(browser: Any, site: str) -> None:
    look(browser, site, "plan")
    held = hold_answers(browser, "/api/run?")
    browser.execute_script("location.hash = '#/run/good'")
    held(1)
    browser.execute_script("location.hash = '#/plan'")
    until(lambda: texts(browser, "main h1") == ["Plan"])
    browser.execute_script("release(0)")
    time.sleep(0.3)
    assert browser.title == "grpo_lite runs"


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


MOVE = """
const input = document.querySelector(`[name=${arguments[0]}]`);
input.value = arguments[1]; input.dispatchEvent(new Event('input', {bubbles: true}));
"""


def test_the_sliders_of_the_plan_change_its_number(browser: Any, site: str) -> None:
    look(browser, site, "plan")
    big = until(lambda: texts(browser, ".hero .big"))
    assert re.fullmatch(r"\d+\.\d GiB of 14\.6 GiB", big[0])
    browser.execute_script(MOVE, "completion", 4096)
    longer = until(lambda: (now := texts(browser, ".hero .big")) != big and now)
    assert float(longer[0].split()[0]) > float(big[0].split()[0])
    assert "4096 tokens" in texts(browser, ".form label b")
    browser.execute_script(MOVE, "group", 0)
    until(lambda: any("grpo.num_generations=2 " in text for text in texts(browser, "#command code")))
    browser.execute_script(MOVE, "card", "rtx4060-8")
    until(lambda: "7.6 GiB" in texts(browser, ".hero .big")[0])
    browser.execute_script(MOVE, "recipe", "smoke")
    until(lambda: texts(browser, "#command code") == ["grpo-lite train smoke"])


def test_another_card_alone_leaves_the_recipe_of_the_plan_as_it_is(browser: Any, site: str) -> None:
    look(browser, site, "plan")
    until(lambda: texts(browser, ".hero .big"))
    browser.execute_script(MOVE, "completion", 4096)  # of the recipe before
    browser.execute_script(MOVE, "recipe", "quickstart")
    until(lambda: texts(browser, "#command code") == ["grpo-lite train quickstart"])
    browser.execute_script(MOVE, "card", "rtx4060-8")
    until(lambda: "7.6 GiB" in texts(browser, ".hero .big")[0])
    assert texts(browser, "#command code") == ["grpo-lite train quickstart"]
    assert "48 tokens" in texts(browser, ".form label b")  # no step of the slider
    browser.execute_script(MOVE, "group", 0)
    until(lambda: texts(browser, "#command code") == ["grpo-lite train quickstart grpo.num_generations=2"])


def test_a_question_can_be_asked_once_the_one_before_is_answered(browser: Any, site: str, folder: Path) -> None:
    look(browser, site, "ask/asked%2Frun")
    until(lambda: browser.execute_script("return document.querySelector('[name=run]').value") == "asked/run")
    busy = """
    const real = window.fetch;
    window.fetch = (path, options) => path !== '/api/ask' ? real(path, options) : new Promise((done) => {
      window.refuse = () => done(new Response('{"error": "busy with another question"}', {status: 409}));
    });
    window.option = document.querySelector('[name=run] option');
    document.querySelector('textarea').value = '2+3';
    document.querySelector('form button').click();
    """
    browser.execute_script(busy)
    disabled = "return document.querySelector('form button').disabled"
    assert browser.execute_script(disabled)
    polls = """
    const changed = (e) => e.responseStatus === 200 && e.name.endsWith('/api/runs');
    return performance.getEntriesByType('resource').filter(changed).length;
    """
    before = browser.execute_script(polls)
    os.utime(folder / "live" / "metrics.jsonl")  # the next poll finds something new
    until(lambda: browser.execute_script(polls) > before)
    time.sleep(0.3)
    assert browser.execute_script(disabled)
    assert browser.execute_script("return window.option.isConnected")
    browser.execute_script("window.refuse()")
    until(lambda: texts(browser, ".answers .error") == ["busy with another question"])
    assert not browser.execute_script(disabled)


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
