"""The report in Chromium: sliders, values under the pointer, phone, dark, print, no script, no network."""

import json
import shutil

import numpy as np
import pytest
from test_report import with_pictures

from scaling_perception.report import write_report

pytestmark = pytest.mark.browser
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium, such as Debian's package")
    with api.sync_playwright() as found:
        chromium = found.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name in ("one", "two"):
        evaluation = with_pictures(folder)
        (folder / f"{name}.json").write_text(json.dumps({**evaluation, "model": name}))
    return write_report(folder, folder / "report.html", "What compute bought").as_uri()


@pytest.fixture
def opened(browser, address):
    """Open the page in a window; what goes wrong in it, and what it asks the network for, fails the test."""
    contexts, wrong = [], []

    def go(width=1200, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text))
        page.on("request", lambda one: wrong.append(one.url) if one.url.split(":")[0] not in ("file", "data") else None)
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def test_sliders_switch_the_answers_of_all_models(opened):
    page = opened()
    panel = page.locator(".panel").first
    shown = panel.locator(".answer:visible")
    assert shown.count() == 2 and "10 steps × 5 members" in shown.first.inner_text()
    before = shown.first.locator("img").first.get_attribute("src")
    panel.get_by_label("members for").focus()
    page.keyboard.press("ArrowLeft")
    assert "10 steps × 1 member" in shown.first.inner_text() and shown.count() == 2
    assert shown.first.locator("img").first.get_attribute("src") != before
    panel.get_by_label("steps for").fill("0")
    assert "1 step × 1 member" in shown.first.inner_text() and panel.locator("output").all_inner_texts() == ["1", "1"]


def test_values_show_under_the_pointer_and_by_keys(opened):
    page = opened()
    chart, tip = page.locator("svg.chart").nth(1), page.locator(".tip")
    assert not tip.is_visible()
    chart.scroll_into_view_if_needed()
    dot = chart.locator(".dot").first
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible() and tip.inner_text() == dot.get_attribute("data-text") and "[" in tip.inner_text()
    place = tip.bounding_box()
    assert 0 <= place["x"] and place["x"] + place["width"] <= 1200
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == chart.locator(".dot").nth(1).get_attribute("data-text")
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_phone_scrolls_tables_and_not_the_page(opened):
    page = opened(390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.locator(".table.wide")
    assert wide.count() and all(wide.nth(i).locator(".hint").is_visible() for i in range(wide.count()))
    rows = page.locator("td").evaluate_all("cells => cells.map(c => c.getClientRects().length && c.innerText)")
    assert any("[" in str(text) and "\n" not in str(text) for text in rows)
    assert opened().locator(".table .hint:visible").count() == 0, "on a wide screen nothing scrolls"


def test_dark_and_light_follow_the_reader(opened):
    colours = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        found = page.evaluate("['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])")
        text, back = (np.mean([int(part) for part in one[4:-1].split(",")]) for one in found)
        colours[scheme] = page.locator(".line").first.evaluate("one => getComputedStyle(one).stroke")
        assert abs(text - back) > 150 and (back > text) == (scheme == "light")
    assert colours["light"] != colours["dark"]


def test_without_script_the_most_compute_is_shown(opened):
    page = opened(java_script_enabled=False)
    shown = page.locator(".answer:visible")
    assert shown.count() == 2 and "10 steps × 5 members" in shown.first.inner_text()
    assert not page.locator(".dial").first.is_visible() and page.locator("svg.chart title").count() > 10


def test_a_caption_is_printed_with_its_picture(opened, tmp_path):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    kept = page.locator("figure, .panel").evaluate_all("all => all.map(one => getComputedStyle(one).breakInside)")
    assert kept and set(kept) == {"avoid"} and not page.locator(".dial:visible").count()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pages = page.pdf(path=tmp_path / "report.pdf", format="A4").count(b"/Type /Page\n")
    assert 1 <= pages <= 5
