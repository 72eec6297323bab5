"""What of a card's memory each engine on it gets."""

from typing import Any

import pytest
import ray._private.thirdparty.pynvml as nvml

from serve_app.launch import card_memory
from serve_app.launch.card_memory import (
    CONTEXT_GIB,
    cards_gib,
    share_of,
    shares_of_one,
    smallest_card_gib,
    visible_card_gib,
)
from serve_app.stage import Stage

TOPOLOGIES = [list(Stage), [Stage.ENCODER, Stage.DECODE], [Stage.PREFILL, Stage.DECODE]]


@pytest.mark.parametrize("card_gib", [14.6, 22.0, 23.5, 31.3, 39.4, 44.4, 79.1, 139.8, None])
@pytest.mark.parametrize("stages", TOPOLOGIES)
def test_all_engines_at_their_caps_and_their_contexts_fit_the_card(stages: list[Stage], card_gib: float | None) -> None:
    claims = shares_of_one(stages, card_gib)
    assert list(claims) == stages
    assert sum(claims.values()) == pytest.approx(1)
    card = card_gib or 22.0
    shares = [share_of(stage, claim, card_gib) for stage, claim in claims.items()]
    assert sum(share.cap for share in shares) * card + CONTEXT_GIB * len(stages) <= card
    for stage, share in zip(stages, shares, strict=True):
        assert 0 < share.utilization <= share.cap < claims[stage]


@pytest.mark.parametrize(("card_gib", "slack_gib"), [(22.0, 1.0), (79.1, 0.05 * 0.425 * 79.1)])
def test_the_allocator_has_room_to_round_in(card_gib: float, slack_gib: float) -> None:
    share = share_of(Stage.DECODE, 0.425, card_gib)
    assert (share.cap - share.utilization) * card_gib == pytest.approx(slack_gib, abs=0.1)


def test_a_share_too_small_for_a_context_is_still_a_share() -> None:
    assert share_of(Stage.DECODE, 0.01, 22.0) == (0.01, 0.01)


class FakeNvml:
    """Two cards, as NVML tells of them."""

    NVMLError = nvml.NVMLError

    def __init__(self, *gib: float, broken: str = "") -> None:
        self.gib, self.broken, self.inits = gib, broken, 0

    def nvmlInit(self) -> None:
        if self.broken == "init":
            raise nvml.NVMLError(nvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self.inits -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gib)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if self.broken == "memory":
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        return type("Memory", (), {"total": int(self.gib[handle] * card_memory.GIB)})


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> None:
    for name in dir(fake):
        if name.startswith("nvml"):
            monkeypatch.setattr(nvml, name, getattr(fake, name))


def test_cards_are_known_by_index_and_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(24.0, 80.0)
    use(monkeypatch, fake)
    assert cards_gib() == {"0": 24, "GPU-0": 24, "1": 80, "GPU-1": 80}
    assert fake.inits == 0
    assert smallest_card_gib([]) == 24
    named = {None: 24, "1": 80, "GPU-1": 80, "1,0": 24, " 1": 80, "": None, "MIG-1": None}
    assert {visible: visible_card_gib(visible) for visible in named} == named


@pytest.mark.parametrize("broken", ["init", "memory"])
def test_without_cards_that_tell_their_memory_it_is_not_known(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    fake = FakeNvml(24.0, broken=broken)
    use(monkeypatch, fake)
    assert cards_gib() == {} and fake.inits == 0
    assert visible_card_gib("0") is None
    assert (smallest_card_gib(["H100"]), smallest_card_gib(["H100", "L4"])) == (None, 22.0)
