"""serve_app.ingress_metrics: what Ray is told of a request."""

from collections import Counter
from collections.abc import Iterator

import pytest

from serve_app.admission import Admission
from serve_app.config import AdmissionConfig
from serve_app.handoff import Item, Media
from serve_app.ingress_metrics import IngressMetrics
from serve_app.trace import Trace
from tests.unit.metrics_of import Told, watched


@pytest.fixture
def told() -> Iterator[Told]:
    with watched() as told:
        yield told


def served(**more: object) -> Trace:
    record = Trace("r", began=100.0, rendered=101.0, first_token=103.0, last_token=107.0, output_tokens=5, choices=1)
    for name, value in more.items():
        setattr(record, name, value)
    return record


def test_calls_of_a_stage_count_one_by_one(told: Told) -> None:
    record = served()
    record.called("encoder", 3.0, 2.0)
    record.called("encoder", 5.0, 1.0)
    record.called("prefill", 2.0, 2.5)  # clocks of two machines
    IngressMetrics().finished(record, 200)
    assert told.values("epd_queue_seconds", stage="encoder") == [1.0, 4.0]
    assert told.values("epd_run_seconds", stage="encoder") == [2.0, 1.0]
    assert told.values("epd_queue_seconds", stage="prefill") == [0.0]


def test_request_counts_what_it_had_and_got(told: Told) -> None:
    record = served(
        items=Counter(image=2, audio=1), remembered_items=1, media_bytes=70, prompt_tokens=9, cached_tokens=4
    )
    IngressMetrics().finished(record, 200)
    assert told.sum("epd_requests", status="200") == 1
    assert (told.sum("epd_items", modality="image"), told.sum("epd_items", modality="audio")) == (2, 1)
    assert told.sum("epd_remembered_items") == 1
    names = ("epd_media_bytes", "epd_prompt_tokens", "epd_cached_tokens", "epd_output_tokens")
    assert [told.sum(name) for name in names] == [70, 9, 4, 5]
    assert told.values("epd_time_to_first_token_seconds") == [3.0]
    assert told.values("epd_time_per_output_token_seconds") == [1.0]


@pytest.mark.parametrize(
    ("choices", "tokens", "seconds"),
    [(1, 1, None), (2, 6, 2.0), (3, 3, None)],
    ids=["one token", "two", "three of one"],
)
def test_time_per_token_is_a_choices(choices: int, tokens: int, seconds: float | None) -> None:
    record = served(choices=choices, output_tokens=tokens)
    assert record.per_output_token() == seconds


def test_rungs_count_each_time(told: Told) -> None:
    record = served(rungs=["encode-again", "prefill-again", "prefill-again"])
    IngressMetrics().finished(record, 200)
    assert (told.sum("epd_rungs", rung="prefill-again"), told.sum("epd_rungs", rung="encode-again")) == (2, 1)


@pytest.mark.parametrize(("status", "count"), [(503, 1), ("cancelled", 1), (200, 0)])
def test_what_reached_no_stage_counts_where_it_was_refused(told: Told, status: int | str, count: int) -> None:
    IngressMetrics().finished(Trace("r"), status)
    assert told.sum("epd_requests") == count
    assert {name for name, _, _ in told.samples} <= {"epd_requests"}


def test_what_is_under_way_is_told(told: Told) -> None:
    metrics = IngressMetrics()
    admission = Admission(AdmissionConfig(), 10, metrics.outstanding)
    media = Media("image", b"12345", None, 1, "digest")
    amounts = {"requests": 1, "items": 2, "media_bytes": 5, "embed_bytes": 30}
    with admission.admit((Item("image", "h", 0, 3, None, None),)), admission.admit_media([media]):
        metrics.gauges.tell()
    for of, amount in amounts.items():
        assert told.values("epd_outstanding", of=of)[-1] == amount
    metrics.gauges.tell()
    for of in amounts:
        assert told.values("epd_outstanding", of=of)[-1] == 0
