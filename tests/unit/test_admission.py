"""serve_app.admission: what an ingress replica takes on at a time, and that every place is given back."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.admission import Admission, size_of
from serve_app.config import AdmissionConfig
from serve_app.errors import Overloaded
from serve_app.handoff import Item


def item(size_bytes: int = 0) -> Item:
    data = {"pixel_values": SimpleNamespace(data=SimpleNamespace(nbytes=size_bytes)), "grid": SimpleNamespace(data=[1])}
    return Item("image", "hash", 0, 4, None, data)


def admission(**limits: Any) -> Admission:
    return Admission(AdmissionConfig(**limits))


def test_requests_beyond_the_limit_are_refused_until_one_ends() -> None:
    gate = admission(max_requests=2)
    with gate.admit(()):
        with gate.admit(()):
            with pytest.raises(Overloaded, match="2 requests under way and takes 2"):
                gate.check_request()
            with pytest.raises(Overloaded), gate.admit(()):
                pytest.fail("a third request was let in")
        gate.check_request()
    assert (gate.requests, gate.items, gate.size_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("limits", "items", "what"),
    [({"max_items": 2}, (item(), item()), "media items"), ({"max_media_bytes": 100}, (item(60),), "bytes of media")],
)
def test_text_keeps_flowing_when_media_are_at_their_limit(
    limits: dict[str, int], items: tuple[Item, ...], what: str
) -> None:
    gate = admission(**limits)
    with gate.admit(items):
        with pytest.raises(Overloaded, match=what), gate.admit(items):
            pytest.fail("more media were let in")
        with gate.admit(()):
            assert gate.requests == 2
    with gate.admit(items):
        assert gate.items == len(items)


def test_one_request_larger_than_a_limit_passes_when_nothing_else_is_there() -> None:
    gate = admission(max_items=1, max_media_bytes=10)
    with gate.admit((item(50), item(50))):
        assert (gate.items, gate.size_bytes) == (2, 100)


def test_places_are_given_back_when_a_request_fails() -> None:
    gate = admission()
    with pytest.raises(KeyError), gate.admit((item(7),)):
        raise KeyError
    assert (gate.requests, gate.items, gate.size_bytes) == (0, 0, 0)


def test_size_counts_tensors_only() -> None:
    assert size_of(item(12).data) == 12
    assert size_of(None) == 0
