"""The page in headless Chromium, cut off from any network: it renders, the plots are there, the console is empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from teleport_fast.report.plots import COLOURS

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
CONSOLE = re.compile(r"CONSOLE[:(]\d*\)?\] (.*)")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


def looked_at(page: Path, picture: Path, folder: Path) -> list[str]:
    """Takes a picture of the page; what came to the console."""
    assert BROWSER
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1140,2400", "--no-first-run",
        "--enable-logging=stderr", f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={picture}",
    ]  # fmt: skip
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=400)
    assert picture.exists(), done.stderr[-2000:]
    return CONSOLE.findall(done.stderr)


def pixels_of(picture: Path, colour: str) -> int:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    return int((abs(imread(picture)[..., :3] - to_rgb(colour)) < 0.02).all(-1).sum())


def test_it_renders_without_a_network_and_the_plots_are_there(page_file: Path, tmp_path: Path) -> None:
    assert looked_at(page_file, tmp_path / "page.png", tmp_path / "profile") == []
    # lines of all arms; a card's edge alone has about 1,000 pixels of its colour
    assert all(pixels_of(tmp_path / "page.png", colour) > 1_500 for colour in COLOURS[1:4])


def test_the_control_a_page_that_complains_is_heard_and_one_without_plots_has_none(tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text('<!DOCTYPE html><title>x</title><script>console.error("planted")</script>')
    told = looked_at(page, tmp_path / "wrong.png", tmp_path / "profile")
    assert told and "planted" in told[0]
    assert pixels_of(tmp_path / "wrong.png", COLOURS[1]) == 0
