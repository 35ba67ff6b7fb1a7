#!/usr/bin/env python3
"""Make docs/report.png and docs/patches.png: parts of the sample cache's report, as a browser shows them.

    python dino_cache.py --config config/data/sample.yaml && python docs/make_pictures.py

Needs chromium (or the browser named by --browser) and what requirements-report.txt names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
import PIL.ImageChops

DOCS = Path(__file__).resolve().parent
CACHE = "sample/rendered_rooms/dino_cache_small"  # relative, since the report shows it
WIDTH, TALLEST = 1080, 3000  # px
PARTS = {"report.png": ("", "runs", "rate", "trajectories"), "patches.png": ("patches",)}


def parts_of_page(page: str, names: tuple[str, ...]) -> str:
    """The page with these sections alone; "" is what comes before the first one."""
    style, body = page.split("<body>")
    head, *sections = body.partition("<footer>")[0].split("<section aria-labelledby=")
    kept = [head if "" in names else "<main>"]
    kept += [f"<section aria-labelledby={section}" for section in sections if section.split('"')[1] in names]
    return f"{style}<body>{''.join(kept)}</body></html>"


def screenshot(browser: str, page: Path, picture: Path) -> None:
    """The page at the width of a desktop, without the empty rest below it."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += [f"--user-data-dir={profile}", "--blink-settings=preferredColorScheme=1"]
        command = [browser, *options, f"--window-size={WIDTH},{TALLEST}", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = PIL.Image.open(picture).convert("RGB")
    paper = PIL.Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    bottom = PIL.ImageChops.difference(image, paper).getbbox()[3]
    image.crop((0, 0, WIDTH, bottom + 16)).quantize(256).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures in docs/ from the sample cache's report.")
    parser.add_argument("--browser", default="chromium", help="a Chromium or Chrome (default: chromium)")
    browser = parser.parse_args().browser
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole.html", Path(folder) / "part.html"
        command = [sys.executable, str(DOCS.parent / "progress_utils.py"), "report", "--cache-dir", CACHE]
        subprocess.run([*command, "-o", str(whole)], check=True, cwd=DOCS.parent)
        for name, titles in PARTS.items():
            part.write_text(parts_of_page(whole.read_text(encoding="utf-8"), titles), encoding="utf-8")
            screenshot(browser, part, DOCS / name)
            print(f"{DOCS / name}: {(DOCS / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
