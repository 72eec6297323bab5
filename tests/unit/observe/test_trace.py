"""What is known of one request, and its log line."""

import time
from collections import Counter

import pytest

from serve_app.handoff.types import Prompt
from serve_app.observe.trace import Trace


def test_first_token_is_kept() -> None:
    trace = Trace("r")
    trace.token(1)
    first = trace.first_token
    trace.token(4)
    assert (trace.first_token, trace.output_tokens) == (first, 5)
    assert first is not None and first >= trace.began


def test_replica_is_listed_once_in_the_order_of_its_work() -> None:
    trace = Trace("r")
    for replica in ("b", "a", "b"):
        trace.saw("encoder", replica)
    trace.saw("decode", "d")
    assert trace.replicas == {"encoder": ["b", "a"], "decode": ["d"]}


def test_stage_times_are_steps_whose_sum_is_the_time_to_the_first_token() -> None:
    trace = Trace("r", began=100.0, rendered=101.0, first_token=112.0)
    trace.took("encode", 2.5)
    trace.called("encoder", 2.5, 2.0)
    trace.took("prefill", 4.0)
    trace.called("prefill", 4.0, 3.0)
    trace.called("decode", 1.0, 0.75)
    times = trace.stage_times()
    assert times == {"render": 1, "queue": 1.75, "encode": 2, "prefill": 3, "first_token": 4.25}
    assert sum(times.values()) == 12


def test_transfers_are_steps_of_their_own_within_the_same_sum() -> None:
    trace = Trace("r", began=100.0, rendered=101.0, first_token=112.0)
    trace.took("prefill", 4.0)
    trace.called("prefill", 4.0, 3.0)
    trace.moved("ec_transfer", 0.5)
    trace.called("decode", 3.0, 1.5)  # vLLM counts the pull as waiting
    trace.moved("kv_transfer", 1.25)
    times = trace.stage_times()
    assert times == {
        "render": 1,
        "queue": 1.25,
        "ec_transfer": 0.5,
        "prefill": 2.5,
        "kv_transfer": 1.25,
        "first_token": 5.5,
    }
    assert list(times)[2:] == ["ec_transfer", "prefill", "kv_transfer", "first_token"]
    assert sum(times.values()) == 12


@pytest.mark.parametrize("seconds", [0.0, None])
def test_transfer_that_was_none_is_no_step(seconds: float | None) -> None:
    trace = Trace("r", began=100.0, rendered=101.0, first_token=110.0)
    trace.moved("kv_transfer", seconds)
    assert "kv_transfer" not in trace.stage_times()


def test_of_what_runs_at_the_same_time_the_longest_counts() -> None:
    trace = Trace("r", began=0.0, rendered=1.0)
    for seconds in (2.0, 5.0, 3.0):
        trace.took("prefill", seconds)
    assert trace.stage_times()["prefill"] == 5


def test_encoding_within_rendering_counts_once() -> None:
    trace = Trace("r", began=time.perf_counter() - 3.0)
    trace.took("encode", 2.0)
    trace.generates(Prompt([1]), 1)
    times = trace.stage_times()
    assert times["encode"] == 2
    assert times["render"] == pytest.approx(1.0, abs=0.5)
    assert trace.encoded_in_render == 2


def test_time_of_a_stage_that_there_is_not_goes_to_the_next() -> None:
    trace = Trace("r", began=100.0, rendered=101.0, first_token=110.0)
    assert trace.stage_times() == {"render": 1, "first_token": 9}
    assert Trace("r").stage_times() == {}


def test_line_has_everything_that_is_known() -> None:
    trace = Trace("r", rendered=0.25, items=Counter(image=1, audio=1), began=0.0)
    trace.prompt_tokens, trace.cached_tokens, trace.output_tokens = 9, 3, 4
    trace.took("encode", 0.5)
    trace.saw("encoder", "e1")
    trace.saw("encoder", "e2")
    line = trace.line(200)
    counts = "items=2 prompt_tokens=9 cached_tokens=3 output_tokens=4"
    assert line.startswith(f"request=r status=200 {counts} render=250.0ms encode=500.0ms")
    assert line.endswith("encoder=e1,e2")
    assert " total=" in line


@pytest.mark.parametrize("status", [503, "cancelled"])
def test_line_of_a_request_that_reached_no_stage_ends_cleanly(status: int | str) -> None:
    line = Trace("r").line(status)
    assert f"status={status} " in line
    assert line == line.rstrip()


def test_line_of_a_failure_says_which() -> None:
    trace = Trace("r")
    assert "error" not in trace.line(200)
    trace.error = ValueError("the decode stage is gone")
    assert trace.line(503).endswith(' error="the decode stage is gone"')


def test_rungs_are_in_the_line_in_the_order_in_which_they_ran() -> None:
    trace = Trace("r")
    assert "rungs" not in trace.line(200)
    trace.saw("prefill", "p1")
    for rung in ("encode-again", "prefill-again", "prefill-again"):
        trace.rung(rung)
    assert trace.line(200).endswith(" prefill=p1 rungs=encode-again,prefill-again*2")
    trace.error = ValueError("gone")
    assert trace.line(503).endswith(' rungs=encode-again,prefill-again*2 error="gone"')
