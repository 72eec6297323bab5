"""A real Chromium, headless, for tests of the page. What the page says on its console is an error."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser by Playwright. Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: install the extra `dev`")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium: `apt-get install chromium` as root, or scripts/chromium.sh")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@contextmanager
def page_at(browser: Any, url: str, width: int = 1100, height: int = 1000, **context: Any) -> Iterator[Any]:
    """The page, loaded, in a context of its own; at the end its console must be silent and all it asked for local.

    ``refused``: what Chromium itself notes on the console of a response that is an error is part of a test of errors.
    """
    refused = context.pop("refused", False)
    with browser.new_context(viewport={"width": width, "height": height}, **context) as own:
        page = own.new_page()
        page.set_default_timeout(20_000)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#stages li")
        yield page
        if refused:
            said = [text for text in said if not re.match("error: Failed to load resource", text)]
        strangers = [address for address in asked if not address.startswith((url, "data:"))]
        assert not said and not strangers, (said, strangers)


def draw(page: Any, *figures: tuple[str, str, str]) -> None:
    """Place figures with the keyboard alone: ``(colour, shape, place)``."""
    page.locator("#draw").evaluate("details => { details.open = true }")
    for colour, shape, place in figures:
        for name in (colour, shape):
            page.get_by_role("radio", name=name, exact=True).focus()
            page.keyboard.press("Space")
        page.get_by_role("button", name=f"Place it {place}", exact=True).focus()
        page.keyboard.press("Enter")


def answered(page: Any) -> str:
    """The answer, once it is whole."""
    page.wait_for_selector("#answer[aria-busy=false]")
    return str(page.text_content("#answer"))
