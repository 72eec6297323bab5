"""``python -m tests.screenshots [URL]``: the pictures of the page in the README, of a server that runs."""

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.browser import answered, chromium, draw, page_at

DOCS = Path(__file__).parents[1] / "docs"


def shoot(browser: Any, url: str, name: str, width: int, scheme: str) -> None:
    with page_at(browser, url, width=width, color_scheme=scheme) as page:
        draw(page, ("red", "circle", "top left"), ("blue", "square", "bottom right"))
        page.click("#add")
        draw(page, ("yellow", "triangle", "top left"), ("green", "star", "bottom right"))
        page.fill("#question", "Which picture has the red circle?")
        page.fill("#max-tokens", "24")
        page.click("#send")
        answered(page)
        page.wait_for_selector(".replicas .worked")
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    shot.quantize(256, Image.Quantize.FASTOCTREE).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    url = (sys.argv[1:] or ["http://127.0.0.1:8000"])[0].rstrip("/") + "/"
    with chromium() as browser:
        shoot(browser, url, "page.png", 1180, "light")
        shoot(browser, url, "page-phone.png", 380, "dark")
