"""The HTML page in a browser: charts are drawn, tables sort, nothing is fetched, nothing is logged.

Headless Chromium with an empty profile and no way out: every host name is mapped to nowhere.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from attnproof.reports import html
from attnproof.reports.record import CaseJudged
from tests.reports.synthetic import build_events

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

INSTALL = "apt-get update && apt-get install -y chromium chromium-driver"
REQUIRED = "ATTNPROOF_REQUIRE_CHROMIUM"
SECONDS = 60
"""Longest wait for the page; it is drawn in about two seconds on one idle core."""

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1280,1000",
)

SETTLED = """return [...document.querySelectorAll('.chart')]
    .every(element => element.dataset.drawn || element.closest('details:not([open])'))"""

Browser = Any


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = f"Chromium or its driver is not installed: {INSTALL}"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{missing} ({REQUIRED}=1 forbids to skip)")
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 300 cases, one of which gave NaN."""
    events = list(build_events(300))
    at = next(i for i, event in enumerate(events) if isinstance(event, CaseJudged) and event.outputs)
    event = events[at]
    assert isinstance(event, CaseJudged)
    broken = msgspec.structs.replace(event.outputs["o"], worst_certain=float("nan"))
    events[at] = msgspec.structs.replace(event, outputs={"o": broken})
    return html.render(events, tmp_path_factory.mktemp("page") / "index.html")


def wait(browser: Browser, condition: str) -> None:
    WebDriverWait(browser, SECONDS).until(lambda _: browser.execute_script(condition))


@pytest.fixture(scope="module")
def opened(browser: Browser, page: Path) -> Browser:
    """The page with everything unfolded and every chart drawn; what a test sorts or chooses stays so."""
    show(browser, "light")
    browser.get_log("performance")
    browser.get(page.as_uri())
    wait(browser, SETTLED)
    browser.execute_script("document.querySelectorAll('details').forEach(element => { element.open = true })")
    wait(browser, SETTLED)
    return browser


def show(browser: Browser, scheme: str) -> None:
    """Have the browser prefer a colour scheme, and no motion: a click would miss what moves."""
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_every_chart_is_drawn(opened: Browser) -> None:
    charts = opened.execute_script(
        """const marks = ['rect', 'symbol', 'line', 'area'].map(kind => `.mark-${kind} path`).join();
        return [...document.querySelectorAll('.chart')].map(element => ({
            spec: element.dataset.spec,
            rows: Number(element.dataset.drawn),
            marks: element.querySelectorAll(marks).length,
            width: element.querySelector('svg')?.getBoundingClientRect().width ?? 0,
            failed: element.classList.contains('chart-error'),
        }))"""
    )
    assert len(charts) == 1 + 4 + 18 + 2
    for chart in charts:
        assert not chart["failed"] and chart["rows"] > 0 and chart["width"] > 100, chart
        assert chart["marks"] > (1 if chart["spec"].startswith("series") else 10), chart


def test_nothing_is_logged_and_nothing_fetched(opened: Browser) -> None:
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    requested = [
        message["message"]["params"]["request"]["url"]
        for entry in opened.get_log("performance")
        if (message := msgspec.json.decode(entry["message"]))["message"]["method"]
        == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested), requested


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_take_the_ink_of_the_colour_scheme(opened: Browser, scheme: str) -> None:
    show(opened, scheme)
    label, ink, paper = opened.execute_script(
        """const text = document.querySelector('.chart svg .mark-text text');
        const root = getComputedStyle(document.documentElement);
        return [getComputedStyle(text).fill, root.color, root.backgroundColor]"""
    )
    assert label == ink != paper
    assert (luminance(ink) > luminance(paper)) == (scheme == "dark")
    assert opened.get_log("browser") == []


def luminance(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def column(browser: Browser, name: str) -> list[str]:
    """The texts of a column of the kernels' table, in the order of its rows."""
    return list(
        browser.execute_script(
            """const table = document.getElementById('kernel-table');
            const headers = [...table.tHead.rows[0].cells];
            const at = headers.findIndex(cell => cell.textContent.trim() === arguments[0]);
            return [...table.tBodies[0].rows].map(row => row.cells[at].textContent.trim())""",
            name,
        )
    )


def header(browser: Browser, name: str) -> Any:
    return browser.find_element("xpath", f"//table[@id='kernel-table']//th[normalize-space()='{name}']")


def click(browser: Browser, name: str) -> None:
    header(browser, name).find_element("tag name", "button").click()


def number(text: str) -> tuple[int, float]:
    """The order that a reader expects: NaN above infinity, infinity above numbers."""
    return (1, 0.0) if text == "NaN" else (0, float(text.replace(",", "")))


@pytest.mark.parametrize(
    ("name", "key", "first"),
    [
        ("worst error/certain", number, "descending"),
        ("unjudged elements", number, "descending"),
        ("kernel", str, "ascending"),
    ],
)
def test_a_click_on_a_header_sorts(opened: Browser, name: str, key: Callable[[str], Any], first: str) -> None:
    click(opened, "verdict")
    before = column(opened, name)
    second = {"ascending": "descending", "descending": "ascending"}[first]
    orders = []
    for direction in (first, second):
        click(opened, name)
        assert header(opened, name).get_attribute("aria-sort") == direction
        orders.append(column(opened, name))
        values = [key(text) for text in orders[-1]]
        assert values == sorted(values, reverse=direction == "descending")
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(before)
    assert orders[0] != orders[1]
    sorted_by = "return document.querySelectorAll('#kernel-table th:not([aria-sort=none])[aria-sort]').length"
    assert opened.execute_script(sorted_by) == 1


def test_sorting_is_by_number_and_what_is_not_finite_is_the_largest(opened: Browser) -> None:
    click(opened, "verdict")
    click(opened, "worst error/certain")
    figures = column(opened, "worst error/certain")
    assert figures[:2] == ["NaN", "inf"]
    assert sorted(figures[2:], reverse=True) != figures[2:], "sorting as text would give this order too"


def test_tables_sort_by_keyboard(opened: Browser) -> None:
    button = header(opened, "cases").find_element("tag name", "button")
    opened.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    assert header(opened, "cases").get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.SPACE)
    assert header(opened, "cases").get_attribute("aria-sort") == "ascending"


def test_controls_change_the_charts(opened: Browser) -> None:
    def drawn(spec: str) -> str:
        return str(
            opened.execute_script(f"return document.querySelector('[data-spec={spec}] svg').innerHTML")
        )

    for spec, value in (("overview", "float16"), ("length", "row")):
        before = drawn(spec)
        opened.find_element("css selector", f"input[value='{value}']").click()
        deadline = time.monotonic() + SECONDS
        while drawn(spec) == before:
            assert time.monotonic() < deadline, f"the chart {spec} did not change"
            time.sleep(0.05)


def test_scripts_can_be_copied(opened: Browser) -> None:
    button = opened.find_element("css selector", "#failures details[open] button.copy")
    assert button.is_displayed() and button.text == "Copy"
    opened.execute_script(
        "window.copied = []; navigator.clipboard.writeText = async text => { copied.push(text) }"
    )
    button.click()
    wait(opened, "return copied.length === 1")
    shown = opened.execute_script(
        "return document.querySelector('#failures details[open] .code code').textContent"
    )
    assert opened.execute_script("return copied[0]") == shown
    assert "check(attention" in shown


def test_a_link_to_a_kernel_opens_it(opened: Browser) -> None:
    opened.execute_script("document.getElementById('kernel-9').open = false")
    opened.find_element("css selector", "#kernel-table tbody a[href='#kernel-9']").click()
    wait(opened, "return document.getElementById('kernel-9').open")


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_no_wider_than_the_window(opened: Browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        over = opened.execute_script(
            """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre')
                && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert over == []
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
