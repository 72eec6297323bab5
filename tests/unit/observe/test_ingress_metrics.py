"""What is counted of a request, for Ray to be told."""

from collections import Counter

import pytest

from serve_app.config import AdmissionConfig
from serve_app.handoff.types import Item, Media
from serve_app.ingress.admission import Admission
from serve_app.observe.ingress_metrics import IngressMetrics
from serve_app.observe.trace import Trace
from tests.unit.metrics_of import TellsAtOnce, watched


class Counted(IngressMetrics):
    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def names(self) -> set[str]:
        """Of what has been counted."""
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        return {sample.name for sample in samples if sample.value and not sample.name.endswith("_created")}


def served(**more: object) -> Trace:
    record = Trace("r", began=100.0, rendered=101.0, first_token=103.0, last_token=107.0, output_tokens=5, choices=1)
    for name, value in more.items():
        setattr(record, name, value)
    return record


def test_calls_of_a_stage_count_one_by_one() -> None:
    record, metrics = served(), Counted()
    record.called("encoder", 3.0, 2.0)
    record.called("encoder", 5.0, 1.0)
    record.called("prefill", 2.0, 2.5)  # clocks of two machines
    metrics.finished(record, 200)
    for name, total_s in (("epd_queue_seconds", 1.0 + 4.0), ("epd_run_seconds", 2.0 + 1.0)):
        assert metrics.value(name + "_count", stage="encoder") == 2
        assert metrics.value(name + "_sum", stage="encoder") == total_s
    assert metrics.value("epd_queue_seconds_bucket", stage="encoder", le="1.0") == 1
    assert metrics.value("epd_queue_seconds_bucket", stage="prefill", le="0.001") == 1


def test_request_counts_what_it_had_and_got() -> None:
    record, metrics = (
        served(items=Counter(image=2, audio=1), remembered_items=1, media_bytes=70, prompt_tokens=9, cached_tokens=4),
        Counted(),
    )
    metrics.finished(record, 200)
    assert metrics.value("epd_requests_total", status="200") == 1
    assert [metrics.value("epd_items_total", modality=modality) for modality in ("image", "audio")] == [2, 1]
    names = ("remembered_items", "media_bytes", "prompt_tokens", "cached_tokens", "output_tokens")
    assert [metrics.value(f"epd_{name}_total") for name in names] == [1, 70, 9, 4, 5]
    assert metrics.value("epd_time_to_first_token_seconds_sum") == 3.0
    assert metrics.value("epd_time_per_output_token_seconds_sum") == 1.0


@pytest.mark.parametrize(
    ("choices", "tokens", "seconds"),
    [(1, 1, None), (2, 6, 2.0), (3, 3, None)],
    ids=["one token", "two", "three of one"],
)
def test_time_per_token_is_a_choices(choices: int, tokens: int, seconds: float | None) -> None:
    record = served(choices=choices, output_tokens=tokens)
    assert record.per_output_token() == seconds


def test_rungs_count_each_time() -> None:
    metrics = Counted()
    metrics.finished(served(rungs=["encode-again", "prefill-again", "prefill-again"]), 200)
    assert metrics.value("epd_rungs_total", rung="prefill-again") == 2
    assert metrics.value("epd_rungs_total", rung="encode-again") == 1


@pytest.mark.parametrize(("status", "count"), [(503, 1), ("cancelled", 1), (200, None)])
def test_what_reached_no_stage_counts_where_it_was_refused(status: int | str, count: int | None) -> None:
    metrics = Counted()
    metrics.finished(Trace("r"), status)
    assert metrics.value("epd_requests_total", status=str(status)) == count
    assert metrics.names() <= {"epd_requests_total"}


def test_what_is_under_way_is_told() -> None:
    metrics = Counted()
    admission = Admission(AdmissionConfig(), 10, metrics.outstanding)
    media = Media("image", b"12345", None, 1, "digest")
    amounts = {"requests": 1, "items": 2, "media_bytes": 5, "embed_bytes": 30}

    def told() -> dict[str, float | None]:
        return {of: metrics.value("epd_outstanding", of=of) for of in amounts}

    with admission.admit((Item("image", "h", 0, 3, None, None),)), admission.admit_media([media]):
        assert told() == amounts
    assert told() == dict.fromkeys(amounts, 0)


def test_ray_is_told_of_it_once_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.observe.ingress_metrics.Teller", TellsAtOnce)
    with watched() as told:
        metrics = Counted()
        metrics.finished(served(), 200)
        assert not told.samples
        metrics.tell_ray()
    assert told.sum("epd_requests", status="200", deployment="") == 1
    assert told.values("epd_time_to_first_token_seconds_bucket", le="5.0") == [1]
