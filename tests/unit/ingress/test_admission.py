"""What an ingress replica takes on at a time, and that every place is given back."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.config import AdmissionConfig
from serve_app.handoff.errors import BadRequest, Overloaded
from serve_app.handoff.types import Item, Media
from serve_app.ingress.admission import Admission, Intake


def item(size_bytes: int = 0) -> Item:
    data = {"pixel_values": SimpleNamespace(data=SimpleNamespace(nbytes=size_bytes)), "grid": SimpleNamespace(data=[1])}
    return Item("image", "hash", 0, 4, None, data)


def media(size_bytes: int) -> Media:
    return Media("image", b"x" * size_bytes, None, 1, "digest")


def admission(**limits: Any) -> Admission:
    return Admission(AdmissionConfig(**limits), embed_bytes=10)


def held(gate: Admission) -> tuple[int, int, int, int]:
    return gate.requests, gate.items, gate.media_bytes, gate.embed_bytes


def test_requests_beyond_the_limit_are_refused_until_one_ends() -> None:
    gate = admission(max_requests=2)
    with gate.admit(()):
        with gate.admit(()):
            with pytest.raises(Overloaded, match="2 requests under way and takes 2"):
                gate.check_request()
            with pytest.raises(Overloaded), gate.admit(()):
                pytest.fail("a third request was let in")
        gate.check_request()
    assert held(gate) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("limits", "items", "what"),
    [
        ({"max_items": 2}, (item(), item()), "media items"),
        ({"max_media_bytes": 100}, (item(60),), "bytes of media"),
        ({"max_embed_bytes": 79}, (item(),), "bytes of embeddings"),
    ],
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
        assert held(gate) == (1, 2, 100, 80)


def test_media_that_is_encoded_before_its_request_is_rendered_has_places_of_its_own() -> None:
    gate = admission(max_items=2, max_media_bytes=100)
    with gate.admit_media([media(60)]):
        assert held(gate) == (0, 1, 60, 0)
        with pytest.raises(Overloaded, match="bytes of media"), gate.admit_media([media(41)]):
            pytest.fail("more media were let in")
        with gate.admit_media([media(40)]), pytest.raises(Overloaded, match="media items"), gate.admit((item(),)):
            pytest.fail("more items were let in")
    assert held(gate) == (0, 0, 0, 0)


def test_places_are_given_back_when_a_request_fails() -> None:
    gate = admission()
    with pytest.raises(KeyError), gate.admit((item(7),)):
        raise KeyError
    assert held(gate) == (0, 0, 0, 0)


def test_media_that_arrives_is_counted_until_it_leaves() -> None:
    admission = Admission(AdmissionConfig(max_media_bytes=100, max_items=3), 10)
    large, small, third = Intake(admission), Intake(admission), Intake(admission)
    large.begin()
    for _ in range(3):
        large.add(70)  # alone it may be as large as an item may be
    small.begin()
    with pytest.raises(Overloaded, match="210 bytes of media under way and takes 100"):
        small.add(1)
    large.close()
    large.add(1)  # from a thread that goes on
    large.close()
    small.begin()
    small.add(60)
    third.begin()
    with pytest.raises(Overloaded, match="3 media items"):
        Intake(admission).begin()
    third.add(40)
    with pytest.raises(Overloaded, match="bytes of media"):
        third.add(1)
    for intake in (small, third):
        intake.close()
    assert (admission.arrived_items, admission.arrived_bytes) == (0, 0)


def test_request_that_alone_has_more_media_than_fits_is_told_so() -> None:
    admission = Admission(AdmissionConfig(max_media_bytes=100, max_items=2), 10)
    request = Intake(admission)
    request.begin()
    request.begin()
    with pytest.raises(BadRequest, match="3 media items or more, and this server takes 2"):
        request.begin()
    request.add(100)
    with pytest.raises(BadRequest, match="101 bytes of media"):
        request.add(1)
    request.close()
    assert (admission.arrived_items, admission.arrived_bytes) == (0, 0)
