"""One choice of a request, before it is in vLLM's OutputProcessor."""

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams

from serve_app.ingress.choice import Choice


@pytest.mark.parametrize(
    ("kind", "streamed"),
    [(RequestOutputKind.DELTA, True), (RequestOutputKind.CUMULATIVE, True), (RequestOutputKind.FINAL_ONLY, False)],
)
def test_answer_is_streamed_unless_only_its_end_is_wanted(kind: RequestOutputKind, streamed: bool) -> None:
    choice = Choice.__new__(Choice)
    choice.params = SamplingParams(output_kind=kind)
    assert choice.streamed is streamed
