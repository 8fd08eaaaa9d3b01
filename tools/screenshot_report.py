"""An image of a report's first screen, for the README: `python tools/screenshot_report.py report.html report.jpg`."""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-modeling", "--no-first-run"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("report", type=Path)
parser.add_argument("out", type=Path, help="a .jpg file")
parser.add_argument("--width", type=int, default=1280, help="pixels")
parser.add_argument("--height", type=int, default=1000, help="pixels")
options = parser.parse_args()

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
with sync_playwright() as tool:
    browser = tool.chromium.launch(executable_path=program, args=ARGUMENTS)
    size = {"width": options.width, "height": options.height}
    page = browser.new_page(viewport=size, color_scheme="light")
    page.goto(options.report.resolve().as_uri())
    page.evaluate("() => Promise.all([...document.images].map((image) => image.decode()))")
    page.screenshot(path=options.out, type="jpeg", quality=85)
    browser.close()
print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")
