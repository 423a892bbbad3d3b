"""The report in a real browser: headless Chromium, at desktop and at phone width."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.report.page import write_comparison, write_report
from tests.run_files import HOSTILE, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver here (apt-get install chromium chromium-driver)"
    ),
]
# the smallest text on the page in pixels; text in a chart is scaled with it
SMALLEST_TEXT = """
const size = (node) => {
  const own = parseFloat(getComputedStyle(node).fontSize), svg = node.ownerSVGElement;
  return svg ? own * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : own;
};
const nodes = [...document.querySelectorAll('main p, main li, main td, main th, main pre, svg text')];
return Math.min(...nodes.filter(n => n.getBoundingClientRect().height > 0 && n.textContent.trim()).map(size));
"""
DESKTOP, PHONE = (1280, 900, False), (390, 844, True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    sick = write_run(folder / "sick", steps=30, solved=(5, 6), overrides=("grpo.learning_rate=1e-7",))
    equal_and_far_off = re.sub('"kl": [0-9.e-]+', '"kl": 3.0', sick.metrics_file.read_text())
    equal_and_far_off = equal_and_far_off.replace('"frac_reward_zero_std": 0.25', '"frac_reward_zero_std": 0.95')
    sick.metrics_file.write_text(equal_and_far_off)
    good = write_run(folder / "good")
    return {
        "report": write_report(good),
        "sick": write_report(sick),
        "warm": write_report(write_run(folder / "warm", solved=(2, 9, 15), also=True)),
        "compare": write_comparison([good, sick], folder / "compare.html"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium")
    assert selenium
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def visit(browser: Any, page: Path, size: tuple[int, int, bool] = DESKTOP) -> None:
    width, height, mobile = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.resolve().as_uri())


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(n => n.innerText)", selector)


def fill(browser: Any, form: str, name: str, value: str) -> None:
    browser.execute_script(
        "const f = document.querySelector(`[data-browser=${arguments[0]}]`).elements[arguments[1]];"
        "f.value = arguments[2]; f.dispatchEvent(new Event('input', {bubbles: true}));", form, name, value,
    )  # fmt: skip


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["report", "sick", "warm", "compare"])
def test_it_loads_without_errors_fetches_nothing_and_fits_the_screen(
    browser: Any, pages: dict[str, Path], name: str, size: tuple[int, int, bool]
) -> None:
    browser.get_log("browser")
    visit(browser, pages[name], size)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert "owned" not in browser.title
    widest = browser.execute_script("return document.documentElement.scrollWidth")
    assert widest <= size[0]
    smallest = browser.execute_script(SMALLEST_TEXT)
    assert smallest >= 8.5  # pixels


def test_completions_are_filtered_by_text_step_and_reward_and_ordered(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["report"])
    items = "[data-rows=completions] .item"
    assert len(texts(browser, items)) == 10  # a page of them
    fill(browser, "completions", "from", "12")
    assert len(texts(browser, items)) == 8  # the last step's
    fill(browser, "completions", "from", "")
    fill(browser, "completions", "text", "document.title")
    found = texts(browser, items)
    assert found
    assert all(HOSTILE in text for text in found)
    fill(browser, "completions", "text", "")
    fill(browser, "completions", "high", "0.5")
    assert all(text.startswith("reward 0") for text in texts(browser, items))
    fill(browser, "completions", "high", "")
    fill(browser, "completions", "order", "best")
    assert texts(browser, items)[0].startswith("reward 1")
    fill(browser, "completions", "order", "worst")
    assert texts(browser, items)[0].startswith("reward 0")
    fill(browser, "completions", "text", "no such text anywhere")
    assert texts(browser, items) == []
    assert texts(browser, "[data-browser=completions] output") == ["0 of 96"]


def test_the_most_improved_prompts_come_first_and_more_can_be_shown(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["report"])
    fill(browser, "completions", "order", "improved")
    first = texts(browser, "[data-rows=completions] .item .prompt")[0]
    assert first in {"1+3=", "2+3=", "3+3=", "4+3="}
    browser.execute_script("document.querySelector('[data-more=completions]').click()")
    assert len(texts(browser, "[data-rows=completions] .item")) == 20


def test_base_and_trained_answers_are_filtered_by_what_became_of_them(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["report"])
    for kind, expected in (("all", 20), ("improved", 10), ("worse", 0), ("both", 5), ("none", 5)):
        fill(browser, "heldout", "kind", kind)
        assert texts(browser, "[data-browser=heldout] output") == [f"{expected} of 20"], kind
        assert len(texts(browser, "[data-rows=heldout] .item")) == min(10, expected), kind
    fill(browser, "heldout", "kind", "improved")
    assert "base · wrong" in texts(browser, "[data-rows=heldout] .item")[0]
    assert "trained · right" in texts(browser, "[data-rows=heldout] .item")[0]


def test_after_a_warm_up_three_answers_are_filtered_by_what_grpo_changed(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["warm"])
    for kind, expected in (("all", 20), ("improved", 6), ("worse", 0), ("both", 9), ("none", 5)):  # 9 -> 15 of 20
        fill(browser, "heldout", "kind", kind)
        assert texts(browser, "[data-browser=heldout] output") == [f"{expected} of 20"], kind
    fill(browser, "heldout", "kind", "improved")
    first = texts(browser, "[data-rows=heldout] .item")[0]
    assert re.findall(r"(base|warm|trained) · (right|wrong)", first) == [
        ("base", "wrong"), ("warm", "wrong"), ("trained", "right"),
    ]  # fmt: skip


def test_a_pointer_over_a_curve_says_its_values(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["report"])
    browser.execute_script(
        "const p = document.querySelector('[data-chart=kl] .plot'), b = p.getBoundingClientRect();"
        "p.dispatchEvent(new PointerEvent('pointermove', {clientX: b.right - 2, clientY: b.top + 20, bubbles: true}));"
    )
    assert texts(browser, "[data-chart=kl] .tip") == ["step 12: 0.12"]


def test_the_override_can_be_copied(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["sick"])
    button = browser.execute_script("return document.querySelector('#doctor button')")
    assert button is not None
    browser.execute_script("arguments[0].click()", button)
    browser.implicitly_wait(1)
    assert "grpo.beta=" in browser.execute_script("return arguments[0].dataset.copy", button)
    assert browser.execute_script("return arguments[0].textContent", button) == "copied"


def test_an_episode_is_shown_turn_by_turn_and_found_by_the_words_of_a_tool(browser: Any, tmp_path: Path) -> None:
    from tests.report.test_episodes import episodes_in

    visit(browser, episodes_in(tmp_path / "run"))
    assert browser.title != "owned"
    card = browser.find_elements("css selector", "[data-rows=completions] .item")[0]
    kinds = [node.get_attribute("className") for node in card.find_elements("css selector", ".turns > li")]
    assert kinds == ["call", "result", "failed", "said"]
    assert HOSTILE in card.find_element("css selector", ".result pre").get_attribute("textContent")
    fill(browser, "completions", "text", "{'error': 'no'}")
    assert texts(browser, "[data-rows=completions] .item")
    fill(browser, "completions", "text", "nowhere to be found")
    assert not texts(browser, "[data-rows=completions] .item")
