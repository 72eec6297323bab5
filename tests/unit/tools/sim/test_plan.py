"""How many replicas a plan asks for: against a queue whose answer is known; and what is wrong with a traffic file."""

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

from serve_app.stage import Stage
from tests.unit.tools.sim.parts import times
from tools.sim import plan
from tools.sim.plan import Demand, Known, PlanError

EXAMPLE = Path(plan.__file__).parent / "traffic.yaml"
PROMPT = 1000
PREFILL = times(prefill_token_s=0.1 / PROMPT).model_copy(update={"batch_tokens": PROMPT})
"""Only prefill takes time: 0.1 s for each request, one after the other."""


def demand(per_s: float, ttft_s: float, cards: int = 12, **kind: Any) -> Demand:
    asked = {"text_tokens": PROMPT, "output_tokens": 1, "scatter": 0} | kind
    return Demand.model_validate(
        {"slo": {"ttft_s": ttft_s, "tpot_s": 1.0}, "per_s": per_s, "kinds": [asked], "cards": cards}
    )


def test_one_replica_is_an_m_d_1_queue() -> None:
    planned = plan.plan(demand(7.0, ttft_s=2.0), PREFILL, "E+P+D")

    assert planned.met and planned.replicas == {Stage.ENCODER: 0, Stage.PREFILL: 1, Stage.DECODE: 1}
    assert planned.use[Stage.PREFILL] == pytest.approx(0.7)
    # Erlang: P(wait <= t) = (1 - busy) e^(rate t) for waits shorter than the service.
    assert planned.result.ttft_p50_s == pytest.approx(0.1 + log(0.5 / 0.3) / 7.0, rel=0.1)


def test_more_are_planned_where_waiting_would_be_too_long_and_no_more_than_needed() -> None:
    assert [plan.plan(demand(7.0, ttft_s), PREFILL, "E+P+D").replicas[Stage.PREFILL] for ttft_s in (2.0, 0.25)] == [
        1,
        2,
    ]
    many = plan.plan(demand(70.0, ttft_s=0.3), PREFILL, "E+P+D").replicas[Stage.PREFILL]
    assert 8 <= many <= 10, "7 are the least that could do it without any wait"


def test_decode_gets_more_where_tokens_come_too_slowly() -> None:
    slow = times(decode_sequence_s=0.01)
    asked = demand(2.0, ttft_s=10.0, text_tokens=10, output_tokens=40)
    strict = asked.model_copy(update={"slo": asked.slo.model_copy(update={"tpot_s": 0.021})})

    assert plan.plan(asked, slow, "E+P+D").replicas[Stage.DECODE] == 1
    assert plan.plan(strict, slow, "E+P+D").replicas[Stage.DECODE] > 1


def test_decode_that_prefills_needs_what_both_need() -> None:
    planned = plan.plan(demand(15.0, ttft_s=1.0), PREFILL, "E+PD")

    assert planned.met and planned.replicas == {Stage.ENCODER: 0, Stage.DECODE: 2}


def test_cards_that_are_not_enough_are_told() -> None:
    few = plan.report(demand(25.0, ttft_s=0.2, cards=4), Known(PREFILL, "assumed"))
    too_few = plan.report(demand(100.0, ttft_s=1.0, cards=5), Known(PREFILL, "assumed"))

    assert "E+P+D: 4 cards are not enough. With these, calls wait longest at prefill" in few
    assert "E+P+D: 5 cards are not enough." in too_few


def test_the_error_of_the_service_times_is_told(tmp_path: Path) -> None:
    assert "assumed, not measured" in Known.read(None).error
    path = tmp_path / "service_times.json"
    held_out = [{"per_s_error": -0.12, "ttft_error": 0.05}, {"per_s_error": 0.03, "ttft_error": -0.21}]
    path.write_text(json.dumps({"service_times": PREFILL.model_dump(mode="json"), "held_out": held_out}))

    assert "requests/s up to 12%, TTFT p50 up to 21%" in Known.read(path).error


def test_the_example_is_planned() -> None:
    told = plan.report(Demand.read(EXAMPLE), Known.read(None))

    assert "E+P+D" in told and "E+PD" in told and "not enough" not in told


GOOD = "slo: {ttft_s: 1, tpot_s: 0.1}\nper_s: 1\nkinds: [{text_tokens: 10, output_tokens: 10}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "rate: 3\n", "there is no key `rate`."),
        (GOOD.replace("per_s: 1", "per_s: 0"), "`per_s` should be greater than 0."),
        (GOOD.replace("text_tokens: 10, ", ""), "`kinds[0].text_tokens`: field required."),
        (GOOD.replace("10}", "10, images: 2}"), "`kinds[0]`: images need `image_tokens`."),
        ("slo: {", "is not YAML"),
        ("", "should be a mapping"),
    ],
)
def test_a_mistake_in_a_traffic_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "traffic.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as mistake:
        Demand.read(path)

    assert said in str(mistake.value) and str(path) in str(mistake.value) and "\n" not in str(mistake.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        Demand.read(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        Known.read(tmp_path / "none.json")
