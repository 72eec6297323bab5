"""benchmarks.questions.pictures: what is asked, and what is told of it."""

import json
from io import BytesIO
from typing import Any

import pybase64
import pytest
from PIL import Image

from benchmarks.questions import photos, pictures
from benchmarks.questions.pictures import (
    E_P_D,
    E_PD,
    ONE,
    QUESTION,
    REFERENCE,
    Load,
    make,
    stored_bytes,
    summary,
    times_sent,
)


def run(system: str, round_: int = 0, **changes: Any) -> dict[str, Any]:
    plain = {
        "system": system,
        "round": round_,
        "picture": "1080p JPEG",
        "by": "data URL",
        "asked": 60,
        "answered": 60,
        "failed": "",
        "seconds": 6.0,
        "ttft_p50": 0.4,
        "ttft_p99": 0.6,
        "picture_bytes": 400_000,
        "texts": "aaaa bbbb",
        "tcp_bytes": 60 * 400_000,
        "stored_bytes": 0,
        "cpu_s": {"engines": 3.0, "API servers": 3.0},
    }
    return plain | changes


def test_pictures_come_in_the_request_or_by_their_address() -> None:
    inside, outside = (make("1080p JPEG", 2, address, 7) for address in ("", "http://127.0.0.1:1"))

    def urls(asks: list[Any]) -> list[str]:
        bodies = [json.loads(each.body) for each in asks]
        return [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]

    assert urls(outside) == [f"http://127.0.0.1:1/1080p%20JPEG/{number}" for number in (7, 8)]
    kind, _, data = urls(inside)[0].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(BytesIO(pybase64.b64decode(data))).size == (1920, 1080)
    assert len(set(urls(inside))) == 2


def test_a_run_keeps_what_was_answered() -> None:
    row = {"at": 0.0, "ttft": 0.5, "took": 1.0, "text": "0123abcd"}
    rows = [row, row | {"at": 1.0, "took": 3.0, "ttft": 0.7}, row | {"at": 2.0, "failed": "503 full"}]
    measured = {"requests": rows, "cpu_s": {"engines": 1.0}, "client_cpu_s": 0.1, "other_cores": 0.0, "speed_ms": 1.6}
    told = summary(measured, Load("1080p JPEG", 3))
    assert (told["answered"], told["failed"], told["seconds"], told["by"]) == (2, "503 full", 4.0, "data URL")
    assert (told["ttft_p50"], told["ttft_p99"]) == (0.5, 0.7)
    assert told["texts"] == "abcd abcd"


def test_bytes_are_told_in_sizes_of_the_picture() -> None:
    assert times_sent(run(E_PD, tcp_bytes=60 * 400_000, stored_bytes=60 * 800_000)) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "picture", "stored"), [(E_PD, "1080p JPEG", 0), (E_PD, "12 MP JPEG", 2), (REFERENCE, "12 MP JPEG", 0)]
)
def test_large_pictures_go_through_the_object_store_of_those_that_have_one(
    name: str, picture: str, stored: int
) -> None:
    load = Load(picture, 2)
    assert stored_bytes(name, load) == stored * len(photos.picture(picture, 0))


def test_the_target_is_a_ratio_within_rounds() -> None:
    runs = [run(REFERENCE), run(E_PD, seconds=3.0), run(REFERENCE, 1, seconds=10.0), run(E_PD, 1, seconds=10.0)]
    (target,) = QUESTION.targets
    found = target.found({"runs": runs})
    assert found is not None and (found.least, found.most) == (1.0, 2.0)
    assert target.found({"runs": runs[:1]}) is None


def test_an_answer_names_its_figures_and_what_failed() -> None:
    runs = [
        run(REFERENCE),
        run(ONE, seconds=4.0),
        run(E_PD, seconds=3.0, answered=59, texts="aaaa cccc"),
        run(E_PD, picture="12 MP JPEG", asked=24, answered=24, seconds=12.0),
        {"system": E_P_D, "round": 0, "error": "AssertionError: the server did not start"},
    ]
    told = QUESTION.answer({"runs": runs})
    assert "1 of 204 requests failed" in told
    assert "1 of 60 are one engine's" in told
    assert "| 12 MP JPEG, data URL | – | – | 2.0; 400, 600 |" in told
    assert len(told.splitlines()) <= 12


def test_a_round_that_failed_is_told_without_figures() -> None:
    assert QUESTION.answer({"runs": [{"system": E_PD, "round": 0, "error": "x"}]})


def test_quick_is_the_headline_of_two_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[Any] = []
    monkeypatch.setattr(pictures, "visit", lambda *args: visits.append(args) or iter(()))
    assert list(QUESTION.measure(1, True)) == []
    assert visits == [(name, 1, [("1080p JPEG", "data URL")]) for name in (E_PD, REFERENCE)]
