"""The page in a real Chromium, in front of a server that replays answers."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from PIL import Image, ImageChops

from serve_app.launch.connectors import free_ports
from serve_app.page import FILES, FOLDER, add_page
from tools.harness.browser import answered, chromium, draw, page_at

TIMING = (
    'render;dur=5.0, queue;dur=2.0, encode;dur=40.0;desc="e1 e2", ec_transfer;dur=1.0;desc="p1", '
    'prefill;dur=20.0;desc="p1", kv_transfer;dur=8.0;desc="d1", first_token;dur=10.0;desc="d1", '
    'encode.1;dur=20.0;desc="e1", encode.2;dur=40.0;desc="e2"'
)
ANSWER = ["The first ", "picture: 3 < 4 & ", "<b>ümlaut</b>."]


def chunk(**delta: str) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"


class Replay:
    """A server with our page, whose API says what a test tells it to."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}/"
        self.key = ""
        self.asked: list[dict[str, Any]] = []
        self.events = [chunk(role="assistant"), *(chunk(content=text) for text in ANSWER), "data: [DONE]\n\n"]
        self.refusal: Response | None = None
        self.goes_on: asyncio.Event | None = None
        self.more_headers: dict[str, str] = {}
        self.decodes = 1
        self.starting = 0

    @property
    def app(self) -> FastAPI:
        app = FastAPI()
        add_page(app)

        def lacks_key(request: Request) -> Response | None:
            given = request.headers.get("authorization", "")
            return JSONResponse({"error": "Unauthorized"}, 401) if self.key and given != f"Bearer {self.key}" else None

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            return lacks_key(request) or JSONResponse({"data": [{"id": "replayed", "max_model_len": 4096}]})

        @app.get("/status")
        async def status() -> list[dict[str, Any]]:
            def stage(name: str, unit: str, *replicas: str, **states: int) -> dict[str, Any]:
                load = {"calls": 3.0, "outstanding": 250.0, "rate": 100.0, "kv_use": 0.5, "slots": 8.0}
                return {
                    "stage": name,
                    "state": "healthy",
                    "replicas": {"RUNNING": len(replicas)} | states,
                    "unit": unit,
                    "loads": [{"replica": replica} | load for replica in replicas],
                }

            ingress = stage("ingress", "requests") | {"loads": [{"replica": "i1", "calls": 1, "outstanding": 1}]}
            decodes = [f"d{index + 1}" for index in range(self.decodes)]
            starting = {"STARTING": self.starting} if self.starting else {}
            return [
                ingress,
                stage("encoder", "media tokens", "e1", "e2"),
                stage("prefill", "prompt tokens", "p1"),
                stage("decode", "sequences", *decodes, **starting),
            ]

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.asked.append(await request.json())
            refused = lacks_key(request) or self.refusal
            return refused or StreamingResponse(
                self.stream(),
                media_type="text/event-stream",
                headers={"server-timing": TIMING, "x-epd-rungs": "encode-again"} | self.more_headers,
            )

        return app

    async def stream(self) -> AsyncIterator[str]:
        for event in self.events:
            yield event[:7]  # wherever a network cuts
            await asyncio.sleep(0)
            yield event[7:]
        if self.goes_on is not None:
            await self.goes_on.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def replay() -> Iterator[Replay]:
    replay = Replay()
    config = uvicorn.Config(replay.app, port=replay.port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield replay
    server.should_exit = True
    thread.join(10)


def content(replay: Replay) -> list[dict[str, Any]]:
    ((message,),) = [body["messages"] for body in replay.asked[-1:]]
    return list(message["content"])


def picture_of(part: dict[str, Any]) -> Image.Image:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


# ---- what is served


@pytest.mark.parametrize("path", FILES)
def test_files_are_served_with_a_policy_that_lets_nothing_in_from_outside(path: str) -> None:
    app = FastAPI()
    add_page(app)
    answer = TestClient(app).get(path)
    assert (answer.status_code, answer.content) == (200, (FOLDER / FILES[path][0]).read_bytes())
    assert answer.headers["content-type"].startswith(FILES[path][1])
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"


def test_files_name_nothing_outside_and_store_nothing() -> None:
    for name, _ in FILES.values():
        text = (FOLDER / name).read_text()
        for word in ("http:", "https:", "//cdn", "localStorage", "sessionStorage", "indexedDB", "cookie", "innerHTML"):
            assert word not in text, (name, word)


# ---- asking


def test_drawn_picture_and_file_are_asked_about_and_the_answer_is_shown_as_text(
    browser: Any, replay: Replay, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 20), "lime").save(tmp_path / "lime.png")
    with page_at(browser, replay.url) as page:
        page.set_input_files("#files", tmp_path / "lime.png")
        page.wait_for_selector("#items img")
        draw(page, ("red", "circle", "top left"), ("blue", "square", "bottom right"))
        assert "red circle, top left; blue square, bottom right" in page.get_attribute("#canvas", "aria-label")
        page.fill("#question", "Which picture?")
        page.click("#send")
        assert answered(page) == "".join(ANSWER)
        assert page.text_content("#problem") == ""
    body = replay.asked[0]
    assert (body["model"], body["stream"], body["temperature"], body["max_tokens"]) == ("replayed", True, 0, 256)
    lime, drawing, question = content(replay)
    assert question == {"type": "text", "text": "Which picture?"}
    assert picture_of(lime).size == (40, 20)
    drawn = picture_of(drawing)
    assert drawn.size == (224, 224)
    red, blue, white = (drawn.getpixel(at) for at in ((54, 54), (170, 170), (112, 112)))
    assert red[0] > 200 > 100 > red[1] and blue[2] > 180 > 120 > blue[0] and white == (255, 255, 255)


def test_every_figure_fills_its_middle(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        for shape in ("circle", "square", "triangle", "star"):
            draw(page, ("black", shape, "middle"))
            page.select_option("#background", "yellow")
            page.click("#add")
        page.click("#send")
        answered(page)
    pictures = [picture_of(part) for part in content(replay)[:-1]]
    assert len(pictures) == 4
    for drawn in pictures:
        assert drawn.getpixel((112, 112)) == (32, 32, 32)
        assert drawn.getpixel((2, 2))[2] < 60  # yellow
        assert 1500 < sum(pixel == (32, 32, 32) for pixel in drawn.getdata()) < 4700
    assert len({drawn.tobytes() for drawn in pictures}) == 4


def test_drawings_are_as_the_demo_model_has_seen_them(browser: Any, replay: Replay) -> None:
    drawing = pytest.importorskip("serve_app.demo.drawing")
    shapes = [(str(colour), shape) for colour, shape in zip(drawing.COLOURS, 2 * drawing.SHAPES, strict=True)]
    with page_at(browser, replay.url) as page:
        for colour, shape in shapes:
            draw(page, (colour, shape, "middle"))
            page.click("#add")
        page.click("#send")
        answered(page)
    for (colour, shape), part in zip(shapes, content(replay), strict=False):
        expected = drawing.draw([drawing.Figure(colour, shape, 0.5, 0.5, 0.17)])
        differs = ImageChops.difference(picture_of(part), expected).convert("L").point(lambda value: 255 * (value > 64))
        assert sum(differs.histogram()[1:]) < 300, (colour, shape)  # of its edge


def test_figure_is_placed_where_one_clicks_and_as_large_as_one_drags(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        page.locator("#draw summary").click()
        page.locator("#canvas").scroll_into_view_if_needed()
        box = page.locator("#canvas").bounding_box()
        page.mouse.move(box["x"] + 150, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 190, box["y"] + 60)
        page.mouse.up()
        page.click("#add")
        page.click("#undo", force=True)
        page.click("#send")
        answered(page)
    drawn = picture_of(content(replay)[0])
    assert drawn.getpixel((150, 95)) != (255, 255, 255) == drawn.getpixel((150, 105))


def test_removed_picture_is_not_sent(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        for colour in ("red", "green"):
            draw(page, (colour, "star", "middle"))
            page.click("#add")
        page.get_by_role("button", name="Remove drawing: red star").click()
        page.click("#send")
        answered(page)
    assert [part["type"] for part in content(replay)] == ["image_url", "text"]
    assert picture_of(content(replay)[0]).getpixel((112, 112))[1] > 150


def test_dropped_file_that_is_no_media_is_named(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        page.evaluate(
            """() => {
                const transfer = new DataTransfer();
                transfer.items.add(new File(["x"], "notes.txt", {type: "text/plain"}));
                document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, cancelable: true}));
            }"""
        )
        assert page.text_content("#problem") == "notes.txt is no image, audio or video."


def test_answer_streams_and_can_be_stopped(browser: Any, replay: Replay) -> None:
    replay.events.pop()
    replay.goes_on = asyncio.Event()
    with page_at(browser, replay.url) as page:
        page.click("#send")
        page.get_by_text("".join(ANSWER), exact=True).wait_for()
        assert page.is_visible("#waterfall") and page.is_disabled("#send")
        page.click("#stop")
        page.wait_for_selector("#answer[aria-busy=false]")
        assert page.text_content("#problem") == "Stopped."
        assert page.is_enabled("#send") and not page.is_visible("#stop")


def test_thoughts_of_a_reasoning_model_are_apart(browser: Any, replay: Replay) -> None:
    replay.events.insert(1, chunk(reasoning="Let me look."))
    with page_at(browser, replay.url) as page:
        page.click("#send")
        assert answered(page) == "".join(ANSWER)
        assert page.text_content("#thinking") == "Let me look."


# ---- failures, as sentences


def refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "code": status}}, status)


def test_refusal_is_a_sentence(browser: Any, replay: Replay) -> None:
    replay.refusal = refuse(503, "The decode stage is gone")
    with page_at(browser, replay.url, refused=True) as page:
        page.click("#send")
        page.wait_for_selector("#problem:not(:empty)")
        assert page.text_content("#problem") == "The server answers 503: The decode stage is gone"
        assert page.get_attribute("#problem", "role") == "alert"
        replay.refusal = None
        page.click("#send")
        assert answered(page) == "".join(ANSWER)
        assert page.text_content("#problem") == ""


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ('data: {"error": {"message": "decode died"}}\n\n', "The answer broke off: decode died"),
        ("", "The answer broke off."),
    ],
)
def test_stream_that_breaks_off_says_so_and_keeps_what_came(
    browser: Any, replay: Replay, last: str, sentence: str
) -> None:
    replay.events = [chunk(content="Half"), last]
    with page_at(browser, replay.url) as page:
        page.click("#send")
        assert answered(page) == "Half"
        assert page.text_content("#problem") == sentence


def test_key_is_asked_for_and_kept_in_the_field_alone(browser: Any, replay: Replay) -> None:
    replay.key = "secret"
    with page_at(browser, replay.url, refused=True) as page:
        page.wait_for_selector("#key", state="visible")
        assert "asks for an API key" in page.text_content("#model")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        page.get_by_text("Model: replayed").wait_for()
        page.click("#send")
        assert answered(page) == "".join(ANSWER)
        assert (
            page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])") == '["",{},{}]'
        )
        page.reload()
        assert page.input_value("#key") == ""


# ---- waterfall and stages


def test_waterfall_has_every_step_with_its_replica_one_after_the_other(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        page.click("#send")
        answered(page)
        rows = page.locator("#steps tr").evaluate_all(
            """rows => rows.map(row => {
                const bar = row.querySelector(".span").getBoundingClientRect();
                const [step, ms, , who] = Array.from(row.children).map(cell => cell.textContent);
                return [step, ms, who, bar.left, bar.width];
            })"""
        )
        assert page.text_content("#rungs") == "Failed and done otherwise: encode-again"
    told = [tuple(row[:3]) for row in rows]
    assert told[:-1] == [
        ("Render", "5.0", ""),
        ("Queue", "2.0", ""),
        ("Encode item 1", "20.0", "e1"),
        ("Encode item 2", "40.0", "e2"),
        ("EC transfer", "1.0", "p1"),
        ("Prefill", "20.0", "p1"),
        ("KV transfer", "8.0", "d1"),
        ("Decode: first token", "10.0", "d1"),
    ]
    assert (told[-1][0], told[-1][2]) == ("Decode: the rest", "d1")
    lefts, widths = [row[3] for row in rows], [row[4] for row in rows]
    assert lefts == sorted(lefts) and lefts[2] == lefts[3] < lefts[4]
    assert widths[3] == pytest.approx(2 * widths[2], rel=0.1) and widths[3] == pytest.approx(2 * widths[5], rel=0.1)


def test_cached_tokens_of_each_request_are_shown(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        for told, shown in (
            ("1184/1200", "1184 of 1200 prompt tokens were in a cache."),
            ("0/7", "0 of 7 prompt tokens were in a cache."),
            (None, ""),  # another server
        ):
            replay.more_headers = {"x-epd-cached-tokens": told} if told else {}
            page.click("#send")
            answered(page)
            assert page.text_content("#cached") == shown


def test_stages_are_shown_with_their_load_and_scaling_as_it_happens(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        names = page.locator("#stages b").all_text_contents()
        assert names == ["ingress", "encoder", "prefill", "decode"]
        prefill = page.locator("#stages > li").nth(2).text_content()
        assert all(words in prefill for words in ("1 replica", "3 calls", "250 prompt tokens", "2.50 s", "KV 50 %"))
        replay.starting = 1
        page.wait_for_selector("#stages .moving")
        replay.starting, replay.decodes = 0, 2
        page.get_by_text("d2", exact=True).wait_for()
        changes = page.locator("#changes li").all_text_contents()
        assert ["decode: 2 running; healthy" in changes[0], "1 running, 1 starting" in changes[1]] == [True, True]
        assert len(changes) == 2


# ---- for everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window(browser: Any, replay: Replay, scheme: Any) -> None:
    with page_at(browser, replay.url, color_scheme=scheme) as page:
        draw(page, ("red", "star", "middle"))
        page.click("#send")
        answered(page)
        for width in (1280, 360):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            lefts = "all => all.map(one => one.getBoundingClientRect().left)"
            ask, stages = page.locator("main > section").evaluate_all(lefts)
            assert (ask == stages) if width == 360 else (ask < stages)
        brightness = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (min(brightness) > 200) if scheme == "light" else (max(brightness) < 60)


def test_every_control_has_a_name_and_is_reached_by_tab(browser: Any, replay: Replay) -> None:
    with page_at(browser, replay.url) as page:
        page.locator("#draw").evaluate("details => { details.open = true }")
        page.click("h1")
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate(
                "(document.activeElement.labels?.[0]?.textContent || document.activeElement.ariaLabel || "
                "document.activeElement.textContent).trim()"
            )
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            if page.evaluate("document.activeElement === document.body"):
                break
            assert name and outline != "none"
            reached.add(name.split("\n")[0])
        assert {"red", "circle", "Place it top left", "Place it bottom right", "Question", "Ask"} <= reached, reached


def test_text_has_enough_contrast() -> None:
    """WCAG AA: 4.5 to 1 for every colour of text on the cards, in both schemes."""
    css = (FOLDER / "page.css").read_text()
    schemes = [
        dict(pair.split(": ") for pair in block.replace("\n", " ").split("; ") if ": #" in pair)
        for block in (
            css.split("color-scheme: light dark;")[1].split("}")[0],
            css.split("(prefers-color-scheme: dark)")[1].split("}")[0],
        )
    ]

    def luminance(colour: str) -> float:
        digits = colour.strip().lstrip("#").rstrip(";")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in schemes:
        colours = {name.strip().removeprefix(":root {").strip(): value for name, value in scheme.items()}
        card = luminance(colours["--card"])
        for name in ("--text", "--soft", "--bad", "--good", "--accent"):
            lighter, darker = sorted((luminance(colours[name]), card), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (name, colours[name])
