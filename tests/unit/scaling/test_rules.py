"""Replicas from work, and who gets the next GPU."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from serve_app.scaling.rules import (
    DecodeLoad,
    DecodeTargets,
    Load,
    Targets,
    Wish,
    replicas_for_requests,
    replicas_for_sequences,
    replicas_for_work,
    share,
)

TARGETS = Targets(target_queue_s=1.0, max_utilization=0.7)
IDLE = Load(outstanding=0, calls=0, queued_calls=0, mean_work=100, carried=0, rate=1000)
QUIET = DecodeLoad(outstanding=0, calls=0, queued_calls=0, mean_work=1, carried=0, rate=10, slots=32, kv_use=0)


def test_more_replicas_when_work_waits_longer_than_the_target() -> None:
    assert replicas_for_work(replace(IDLE, outstanding=2900, calls=29), 1, TARGETS) == pytest.approx(2.9)
    assert replicas_for_work(replace(IDLE, queued_calls=29), 1, TARGETS) == pytest.approx(2.9)


def test_work_within_the_target_changes_nothing() -> None:
    load = replace(IDLE, outstanding=1900, calls=19, carried=1500)
    assert replicas_for_work(load, 2, TARGETS) == 2
    assert replicas_for_work(replace(load, outstanding=2150, calls=21), 2, TARGETS) == 2  # over it, not clearly


def test_one_large_item_is_no_reason_for_a_second_replica() -> None:
    assert replicas_for_work(replace(IDLE, outstanding=60_000, calls=1, carried=900), 1, TARGETS) == 1


def test_a_short_queue_does_not_take_replicas_from_a_load_that_needs_them() -> None:
    """Two replicas keep the queue short because they are two."""
    busy = replace(IDLE, outstanding=200, calls=2, carried=1200)
    assert replicas_for_work(busy, 2, TARGETS) == 2
    assert ceil(replicas_for_work(replace(busy, carried=600), 2, TARGETS) or 0) == 1


def test_a_stage_without_work_wishes_for_none() -> None:
    assert replicas_for_work(IDLE, 1, TARGETS) == 0
    assert ceil(replicas_for_work(replace(IDLE, carried=1), 1, TARGETS) or 0) == 1


def test_a_stage_at_zero_wants_one_as_soon_as_a_call_waits() -> None:
    assert 0 < (replicas_for_work(replace(IDLE, queued_calls=1), 0, TARGETS) or 0) <= 1


def test_without_a_rate_another_rule_has_to_decide() -> None:
    assert replicas_for_work(replace(IDLE, rate=None, calls=9), 1, TARGETS) is None
    assert replicas_for_sequences(replace(QUIET, slots=0), 1, DecodeTargets()) is None


@given(
    st.floats(0, 1e6),
    st.integers(0, 1000),
    st.integers(1, 50),
    st.floats(1, 1e5),
    st.floats(0.05, 10),
    st.floats(0.5, 1.0),
)
def test_a_steady_load_comes_to_rest(
    arriving: float, calls: int, current: int, rate: float, target_s: float, utilization: float
) -> None:
    """Whatever one step decides for a load that stays, the next step leaves as it is."""
    targets = Targets(target_queue_s=target_s, max_utilization=utilization)

    def step(replicas: int) -> int:
        load = Load(arriving, calls, 0, 1, min(arriving, replicas * rate), rate)
        return max(ceil(replicas_for_work(load, replicas, targets) or 0), 1)

    seen = [current]
    for _ in range(8):
        seen.append(step(seen[-1]))
    assert seen[-1] == seen[-2], seen


@pytest.mark.parametrize("arriving", [300, 600, 900, 1300, 1600, 2400])
def test_random_arrivals_do_not_make_replicas_go_up_and_down(arriving: float) -> None:
    """An hour of one stage under Ray's delays, with calls that come at random: it finds its number of replicas."""
    config = AutoscalingConfig(min_replicas=1, max_replicas=8, upscale_delay_s=10, downscale_delay_s=60)
    random, state = np.random.default_rng(int(arriving)), {}
    replicas, waiting, changes, seen = 1, 0.0, 0, [(0.0, 0.0)]
    for second in range(3600):
        waiting += 100 * random.poisson(arriving / 100)
        done = min(waiting, replicas * 1000)
        waiting -= done
        seen = [*seen[-29:], (waiting, done)]
        outstanding, carried = np.mean(seen, axis=0)
        load = Load(outstanding, outstanding / 100, 0, 100, carried, 1000)
        wished = ceil(replicas_for_work(load, replicas, TARGETS) or 0)
        now, state = _apply_delay_logic(min(max(wished, 1), 8), replicas, config, state, _now=second)
        changes, replicas = changes + (now != replicas), now
    assert waiting <= replicas * 1000 * 2
    assert changes <= 4, (arriving, replicas)


def test_decode_grows_when_its_batch_or_its_cache_is_full() -> None:
    targets = DecodeTargets(target_running=32)
    assert replicas_for_sequences(replace(QUIET, calls=32), 1, targets) == 1
    assert replicas_for_sequences(replace(QUIET, calls=48), 1, targets) == pytest.approx(
        2.6
    )  # 16 wait, 10 a second end
    assert replicas_for_sequences(replace(QUIET, calls=48, rate=None), 1, targets) == pytest.approx(1.5)
    assert replicas_for_sequences(replace(QUIET, calls=8, kv_use=1.0), 1, targets) == pytest.approx(1 / 0.8)
    assert replicas_for_sequences(replace(QUIET, calls=24), 1, DecodeTargets(target_running=6)) == pytest.approx(4)


def test_decode_is_full_with_a_quarter_of_its_slots_where_no_number_is_named() -> None:
    assert replicas_for_sequences(replace(QUIET, calls=8), 1, DecodeTargets()) == 1
    assert replicas_for_sequences(replace(QUIET, calls=24), 1, DecodeTargets()) == pytest.approx(3)


def test_decode_shrinks_when_the_others_have_room_to_spare() -> None:
    targets = DecodeTargets(target_running=32)
    assert replicas_for_sequences(replace(QUIET, calls=30), 2, targets) == 2
    assert ceil(replicas_for_sequences(replace(QUIET, calls=20), 2, targets) or 0) == 1
    assert replicas_for_sequences(replace(QUIET, calls=20, kv_use=0.6), 2, targets) == 2


# ---- GPUs that are short


def wish(replicas: float, current: int = 1, minimum: int = 1, gpus: float = 1.0) -> Wish:
    return Wish(replicas, current, minimum, gpus)


def test_enough_gpus_give_every_stage_its_wish() -> None:
    assert share({"E": wish(1.2), "P": wish(3), "D": wish(2)}, 7) == {"E": 2, "P": 3, "D": 2}


def test_short_gpus_keep_the_stages_in_the_proportion_of_their_wishes() -> None:
    assert share({"E": wish(2), "P": wish(4), "D": wish(8)}, 7) == {"E": 1, "P": 2, "D": 4}


def test_the_next_card_goes_to_the_stage_that_waits_longest() -> None:
    waits = {"E": wish(2.5), "P": wish(6.0), "D": wish(1.0)}
    assert share(waits, 4) == {"E": 1, "P": 2, "D": 1}
    assert share(waits, 5) == {"E": 1, "P": 3, "D": 1}
    assert share(waits, 6) == {"E": 2, "P": 3, "D": 1}


def test_minimum_is_kept_however_short_they_are() -> None:
    assert share({"E": wish(0, minimum=1), "P": wish(9, minimum=2), "D": wish(9)}, 1) == {"E": 1, "P": 2, "D": 1}


def test_a_stage_that_wishes_for_none_gets_none() -> None:
    assert share({"E": wish(0, minimum=0), "P": wish(3), "D": wish(3)}, 4) == {"E": 0, "P": 2, "D": 2}


def test_a_card_does_not_move_for_a_little() -> None:
    assert share({"P": wish(4.0, current=2), "D": wish(4.2, current=1)}, 3) == {"P": 2, "D": 1}
    assert share({"P": wish(4.0, current=2), "D": wish(4.6, current=1)}, 3) == {"P": 1, "D": 2}


def test_shares_of_a_card_count_as_shares_and_stages_without_cards_for_nothing() -> None:
    wishes = {"E": wish(5, gpus=0.1), "P": wish(2, gpus=0.45), "D": wish(2, gpus=0.45)}
    assert share(wishes, 2) == {"E": 5, "P": 2, "D": 1}
    assert share({"E": wish(5, gpus=0), "D": wish(5)}, 0) == {"E": 5, "D": 1}


@given(
    st.dictionaries(
        st.sampled_from("EPD"),
        st.builds(Wish, st.floats(0, 50), st.integers(0, 50), st.integers(0, 3), st.sampled_from([0.1, 0.5, 1.0, 2.0])),
        min_size=1,
    ),
    st.floats(0, 60),
)
def test_nobody_gets_more_than_the_wish_and_cards_are_not_left_while_somebody_waits(
    wishes: dict[str, Wish], gpus: float
) -> None:
    given_out = share(wishes, gpus)
    used = sum(wishes[name].gpus * count for name, count in given_out.items())
    minimum = sum(wish.gpus * wish.minimum for wish in wishes.values())
    assert used <= max(gpus, minimum) + 1e-3
    for name, each in wishes.items():
        assert each.minimum <= given_out[name] <= max(each.minimum, ceil(each.replicas))
        assert given_out[name] >= ceil(each.replicas) or each.gpus > gpus - used - 1e-3


@pytest.mark.parametrize(
    ("requests", "current", "replicas"),
    [(0, 1, 0), (64, 1, 1), (70, 1, 1), (72, 1, 2), (640, 2, 10), (90, 2, 2), (89, 2, 2)],
)
def test_ingress_grows_with_its_requests(requests: int, current: int, replicas: int) -> None:
    assert ceil(replicas_for_requests(requests, current, 64)) == replicas


def test_ingress_gives_a_replica_up_only_when_those_that_stay_have_room() -> None:
    assert replicas_for_requests(46, 2, 64) == 2
    assert ceil(replicas_for_requests(44, 2, 64)) == 1
