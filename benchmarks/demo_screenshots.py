"""Pictures of the demo for its page: every tab after a run, and one on a phone.

    python benchmarks/demo_screenshots.py

Writes docs/images/demo_*.jpg. Needs what the browser tests need: pip install '.[demo]' playwright, and Chromium.
"""

import io
import sys
from pathlib import Path

from PIL import Image

from scaling_perception.support.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "demo"))

from browsing import browser, choose_tab, demo, inner_tab, lacking, opened, run, take_example, turn  # noqa: E402

# Name -> task, width, scheme, example, key pressed on the dial, view, tab below the result
SHOTS = {
    "depth": ("depth", 1280, "light", 1, "End", "", "3-D"),
    "flow": ("flow", 1280, "dark", 0, "", "arrows", "Members"),
    "amodal": ("amodal", 1280, "light", 0, "End", "", "Members"),
    "normals": ("normals", 1280, "light", 2, "", "", "Files"),
    "phone": ("depth", 390, "dark", 0, "End", "", "Members"),
}


def take(page, name: str) -> None:
    task, _, _, example, key, view, below = SHOTS[name]
    choose_tab(page, task)
    take_example(page, task, example)
    page.wait_for_timeout(1500)
    if key:
        turn(page, task, key)
    run(page, task)
    if view:
        page.locator(f"#view-{task} input").click()
        page.get_by_role("option", name=view, exact=True).click()
    inner_tab(page, task, below)
    page.mouse.move(2, 2)
    page.wait_for_timeout(25_000 if below == "3-D" else 3000)  # points are drawn without a graphics card here
    data = page.screenshot(full_page=True, timeout=180_000)
    for quality in (85, 75, 65, 55):
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(jpeg, "JPEG", quality=quality, optimize=True)
        if jpeg.tell() < 150_000:
            break
    with atomic_path(ROOT / "docs" / "images" / f"demo_{name}.jpg") as path:
        path.write_bytes(jpeg.getvalue())
    print(name, jpeg.tell(), "bytes", flush=True)


def main(*names: str) -> None:
    if lacking():
        sys.exit(lacking())
    with demo() as address, browser() as chromium:
        for name in names or SHOTS:
            with opened(chromium, address, SHOTS[name][1], 900, SHOTS[name][2]) as page:
                take(page, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
