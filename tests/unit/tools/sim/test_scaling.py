"""A measured run of the scaling loop, played again."""

from typing import Any

import pytest

from benchmarks.autoscale import deployments
from serve_app.stage import Stage
from tests.unit.tools.sim.parts import times
from tools.sim import scaling

SERVICE = times(encode_s=0.1, prefill_token_s=0.0001, decode_step_s=0.003)


def document(cpu_s: float) -> dict[str, Any]:
    return {
        "machine": {"cpus": 2},
        "workers": 8,
        "images": {"per request": 3, "size": [448, 448], "tokens": 256},
        "prompt_tokens": {"text": 80, "image": 830},
        "output_tokens": {"text": 8, "image": 4},
        "deployments": deployments(),
        "phases": [["quiet", 5.0], ["text", 20.0], ["image", 60.0], ["text", 60.0], ["quiet", 10.0]],
        "starts": [{"stage": "encoder", "at_s": 60.0, "cpu_s": cpu_s}],
    }


def test_images_bring_a_second_encoder_and_text_lets_it_go() -> None:
    seen = scaling.simulated(document(10.0), SERVICE, cores=2.0)

    assert [(stage, count) for stage, _, count in seen.decided] == [("encoder", 2), ("encoder", 1)]
    assert [count for _, count in seen.changes[Stage.ENCODER]] == [1, 2, 1]
    up, down = (at for _, at, _ in seen.decided)
    assert 25.0 < up < 85.0 < down
    assert [each.kind for each in seen.phases] == ["text", "image", "text"]
    assert all(each.requests > 8 and each.ttft_p50_s > 0 for each in seen.phases)


def test_a_start_takes_its_work_on_the_cores_that_all_share() -> None:
    def took(cores: float) -> float:
        seen = scaling.simulated(document(10.0), SERVICE, cores)
        return seen.changes[Stage.ENCODER][1][0] - seen.decided[0][1]

    assert took(20.0) == pytest.approx(10.0, abs=scaling.LOOK_S)
    assert took(1.5) > 12.0


def test_what_was_measured_is_read_in_the_same_form() -> None:
    told = document(1.0) | {
        "seen": [{"kind": "text", "from_s": 5.0, "to_s": 25.0, "requests": 9, "ttft_p50_s": 0.1, "ttft_p90_s": 0.2}],
        "decisions": [["Encoder", 1, 2]],
        "decided_at_s": [31.5],
        "changes": {"encoder": [[0.1, 1], [50.0, 2]]},
    }
    seen = scaling.measured(told)

    assert seen.decided == [("encoder", 31.5, 2)] and seen.changes["encoder"][1] == (50.0, 2)
    assert seen.phases[0].requests == 9


def test_the_cores_that_a_run_had_are_told_by_its_first_requests() -> None:
    played = scaling.simulated(document(10.0), SERVICE, cores=0.8)
    seen = [{"kind": "text", "from_s": 5.0, "to_s": 25.0, "ttft_p50_s": 0.1, "ttft_p90_s": 0.2}]
    told = {
        "seen": [seen[0] | {"requests": played.phases[0].requests}],
        "decisions": [],
        "decided_at_s": [],
        "changes": {},
    }

    assert scaling.cores_left(document(10.0) | told, SERVICE, most=2.0) == pytest.approx(0.8, abs=0.05)
