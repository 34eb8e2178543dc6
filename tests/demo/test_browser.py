"""The demo in a real browser: upload, dial, run, downloads; phone and desktop; keyboard alone; one bad file."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from browsing import browser as chromium  # noqa: E402
from browsing import choose_tab, demo, inner_tab, lacking, opened, result, run, take_example, text_of, turn  # noqa: E402

from scaling_perception.cli import main  # noqa: E402
from scaling_perception.demo import dial  # noqa: E402
from scaling_perception.inference.budgets import choose, load_budgets  # noqa: E402
from scaling_perception.interop.find import find_model  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(lacking()), reason=lacking() or "-"),
]


@pytest.fixture(scope="module")
def address():
    with demo("--megapixels", "1", "--megabytes", "4") as one:
        yield one


@pytest.fixture(scope="module")
def browser(address):
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    from scaling_perception.demo.parts import example

    path = tmp_path_factory.mktemp("photo") / "my photo.png"
    Image.open(example("room", ".jpg")).resize((200, 150)).save(path)
    return path


def test_upload_dial_run_and_downloads_are_those_of_predict(browser, address, photo, tmp_path, monkeypatch, capsys):
    with opened(browser, address) as page:
        page.locator("#picture-depth input[type=file]").set_input_files(photo)
        page.wait_for_selector("#picture-depth img")
        least, more = dial.stops(load_budgets(find_model("mini")), "depth")[:2]
        turn(page, "depth", "Home")
        page.wait_for_function("document.querySelector('#promise-depth').innerText.includes('1 step × 1 member')")
        assert f"AbsRel {least.choice.error:.3g} 95 % interval" in text_of(page, "#promise-depth")
        first, shown = run(page, "depth"), result(page, "depth")
        promise = turn(page, "depth")
        assert (more.choice.steps, more.choice.ensemble, more.choice.cache) == (2, 1, "taylorseer")
        assert "2 steps × 1 member" in promise and f"AbsRel {more.choice.error:.3g} 95 % interval" in promise
        second = run(page, "depth")
        assert "2 steps × 1 member" in second and "Uncertainty" not in first + second
        assert "200 × 150" in second and f"{more.choice.error:.3g}" in second
        page.wait_for_function(
            "(old) => document.querySelectorAll('#result-depth img')[1].getAttribute('src') !== old", arg=shown[1]
        )
        before = result(page, "depth")[1]
        page.locator("#view-depth input").click()
        page.get_by_role("option", name="gray", exact=True).click()
        page.wait_for_function(
            "(old) => document.querySelectorAll('#result-depth img')[1].getAttribute('src') !== old", arg=before
        )
        inner_tab(page, "depth", "Files")
        links = page.locator("#files-depth a[download]:visible")
        links.first.wait_for()
        downloads = {}
        for at in range(links.count()):
            with page.expect_download() as expected:
                links.nth(at).click()
            downloads[expected.value.suggested_filename] = Path(expected.value.path()).read_bytes()
        inner_tab(page, "depth", "Command")
        page.wait_for_selector("#command-depth .cm-content")
        command = shlex.split(" ".join(text_of(page, "#command-depth .cm-content").split()))
    monkeypatch.chdir(tmp_path)
    assert command[:2] == ["scaling-perception", "predict"]
    assert main(command[1:]) == 0, capsys.readouterr().err
    stems = {"depth_16bit.png", "depth.npy", "depth_color.png", "depth.ply"}
    assert {f"my_photo_{end}" for end in stems} <= set(downloads)
    for name, data in downloads.items():
        if not name.endswith(".json"):  # the record names its own folder
            assert data == (tmp_path / "out" / name).read_bytes(), name
    # and of the plain command, of the person's own file
    words = ["--task", "depth", "--steps", "2", "--ensemble", "1", "--cache", "taylorseer", "--out", "plain"]
    words.append(str(photo))
    assert main(["predict", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "plain" / "my photo_depth_16bit.png").read_bytes() == downloads["my_photo_depth_16bit.png"]


def test_flow_and_amodal_give_their_files(browser, address):
    with opened(browser, address) as page:
        choose_tab(page, "flow")
        take_example(page, "flow")
        page.wait_for_selector("#second-flow img")
        page.locator("#dial-flow input[type=range]").press("Home")  # the cheapest, where it may stand already
        assert "EPE" in run(page, "flow")
        inner_tab(page, "flow", "Files")
        page.locator("#files-flow a[download]:visible").first.wait_for()
        assert "table_flow.flo" in "".join(text_of(page, "#files-flow").split())
        choose_tab(page, "amodal")
        take_example(page, "amodal", 1)
        page.get_by_label("Box", exact=True).first.click()
        page.locator("#box textarea, #box input").first.fill("150,200 380,380")
        page.keyboard.press("Tab")
        assert "1 − IoU" in run(page, "amodal")
        inner_tab(page, "amodal", "Files")
        page.locator("#files-amodal a[download]:visible").first.wait_for()
        assert "room_amodal_mask.png" in "".join(text_of(page, "#files-amodal").split())


def test_a_bad_file_is_one_line(browser, address, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    large = tmp_path / "large.png"
    Image.new("L", (1200, 1000)).save(large)
    cases = ((tmp_path / "broken.png", "broken.png is"), (large, "large.png has 1.2 megapixels"))
    for path, words in cases:
        with opened(browser, address) as page:
            page.locator("#picture-depth input[type=file]").set_input_files(path)
            page.wait_for_selector("#picture-depth img")
            page.locator("#run-depth").click()
            toast = page.locator("[data-testid=toast-body]").filter(has_text=words)
            toast.wait_for(timeout=30_000)
            said = toast.inner_text()
            assert "Traceback" not in said and "/tmp" not in said and 'File "' not in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, address, scheme):
    with opened(browser, address, 390, 844, scheme) as page:
        for task in ("depth", "flow", "amodal", "normals"):
            choose_tab(page, task)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, task
        choose_tab(page, "depth")
        take_example(page, "depth")
        run(page, "depth")
        page.wait_for_selector("#members-depth img")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        picture = page.locator("#result-depth").bounding_box()
        assert picture["x"] >= 0 and picture["x"] + picture["width"] <= 390


def test_smoke_serves_one_request_and_ends():
    done = subprocess.run(
        [sys.executable, "-m", "scaling_perception", "demo", "--smoke"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    members = choose(load_budgets(find_model("mini")), "depth", name="best").ensemble  # what the dial begins with
    files = 5 if members == 1 else 7  # with the uncertainty, twice
    said = rf"smoke: http://127.0.0.1:\d+ served its page and depth of 1 picture: {files} files .*\n"
    assert re.fullmatch(said, done.stdout)


def focus_by_keys(page, selector, most=80):
    """Press Tab until the focus is on the element (or within it)."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(where) => !!document.activeElement?.closest(where)", selector):
            return
    raise AssertionError(f"{selector} is not reached by the Tab key")


def test_keyboard_alone(browser, address):
    with opened(browser, address) as page:
        focus_by_keys(page, "#examples-depth button")
        page.keyboard.press("Enter")
        page.wait_for_selector("#picture-depth img")
        focus_by_keys(page, "#dial-depth input[type=range]")
        page.keyboard.press("Home")
        page.wait_for_function("document.querySelector('#promise-depth').innerText.includes('1 step × 1 member')")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#promise-depth').innerText.includes('2 steps × 1 member')")
        focus_by_keys(page, "#run-depth")
        seen = run(page, "depth", lambda: page.keyboard.press("Enter"))
        assert "2 steps × 1 member" in seen
