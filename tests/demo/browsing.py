"""A page of the demo in headless Chromium: fixtures of the tests, and of the pictures in docs/images."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlparse

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # 3-D without a graphics card
)


def lacking() -> str:
    """What is not here of what a browser test needs, or ''."""
    for module, name in (("gradio", "Gradio"), ("playwright", "Playwright")):
        if importlib.util.find_spec(module) is None:
            return f"needs {name}: pip install 'scaling-perception[demo]' playwright"
    return "" if CHROMIUM else "needs Chromium: apt-get install chromium, or set CHROMIUM"


@contextlib.contextmanager
def demo(*words):
    """The verb as a person starts it; yields its address, and ends it as Ctrl-C does."""
    command = [sys.executable, "-m", "scaling_perception", "demo", "--port", "0", *words]
    folder = Path(tempfile.mkdtemp())
    place = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=place) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line
            yield re.search(r"http://[\d.:]+", line)[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert process.returncode == 130
    assert not list(folder.glob("scaling-perception-demo-*")), "the demo's files stay after Ctrl-C"
    shutil.rmtree(folder)


@contextlib.contextmanager
def browser():
    """Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield one
        finally:
            one.close()


@contextlib.contextmanager
def opened(browser, address, width=1280, height=900, scheme="light"):
    """A page of the demo, ready for use; at its end, that it asked no other host and raised no error of its own."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(address)
        page.wait_for_selector("[id^=run-]", timeout=60_000)
        yield page
        hosts = {urlparse(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}, hosts
        assert not errors, errors
    finally:
        page.close()


def choose_tab(page, task):
    page.get_by_role("tab", name=task.capitalize(), exact=True).click()
    page.wait_for_selector(f"#run-{task}:visible")


def take_example(page, task, number=0):
    page.locator(f"#examples-{task} button:visible").nth(number).click()
    page.wait_for_selector(f"#picture-{task} img")


def turn(page, task, keys="ArrowRight", times=1):
    """Move the dial; returns what is predicted."""
    before = text_of(page, f"#promise-{task}")
    knob = page.locator(f"#dial-{task} input[type=range]")
    knob.focus()
    for _ in range(times):
        knob.press(keys)
    page.wait_for_function(CHANGED, arg=[f"#promise-{task}", before])
    return text_of(page, f"#promise-{task}")


# while an answer is awaited, the seconds so far stand before the old text
CHANGED = """([where, before]) => {
  const text = (words) => words.replace(/^[0-9.]+s\\s*/, "");
  return text(document.querySelector(where).innerText) !== text(before);
}"""


def text_of(page, where):
    return page.locator(where).inner_text()


def run(page, task, press=None):
    """Press Run, wait for the result; returns its numbers."""
    where = f"#numbers-{task}"
    page.evaluate("(where) => document.querySelector(where + ' dl')?.setAttribute('data-old', '1')", where)
    (press or page.locator(f"#run-{task}").click)()
    page.wait_for_selector(f"{where} dl:not([data-old])", timeout=120_000)
    return text_of(page, where)


def result(page, task):
    """The addresses of the two pictures of the slider."""
    page.wait_for_selector(f"#result-{task} img")
    return [image.get_attribute("src") for image in page.locator(f"#result-{task} img").all()]


def inner_tab(page, task, name):
    page.locator(f"#tab-{task}").get_by_role("tab", name=name, exact=True).click()
