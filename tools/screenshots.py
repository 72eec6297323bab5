"""``python -m tools.screenshots [URL]``: the pictures of the page in docs/, of a server that runs."""

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tools.harness.browser import answered, chromium, draw, page_at

DOCS = Path(__file__).parents[1] / "docs"

Figure = tuple[str, str]
"""Colour and shape."""


def shoot(browser: Any, url: str, name: str, width: int, scheme: str, first: Figure, second: Figure) -> None:
    with page_at(browser, url, width=width, color_scheme=scheme) as page:
        page.locator("#draw summary").click()
        page.select_option("#size", "large")
        draw(page, (*first, "middle"))
        page.click("#add")
        draw(page, (*second, "middle"))
        page.fill("#question", f"Which picture has the {' '.join(first)}?")
        page.fill("#max-tokens", "24")
        page.click("#send")
        answered(page)
        page.wait_for_selector(".replicas .worked")
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    shot.quantize(256, Image.Quantize.FASTOCTREE).save(DOCS / name, optimize=True)


if __name__ == "__main__":
    url = (sys.argv[1:] or ["http://127.0.0.1:8000"])[0].rstrip("/") + "/"
    with chromium() as browser:
        # Not the same pictures twice: what an engine remembers takes no time.
        shoot(browser, url, "page.png", 1180, "light", ("red", "circle"), ("blue", "star"))
        shoot(browser, url, "page-phone.png", 380, "dark", ("orange", "square"), ("green", "triangle"))
