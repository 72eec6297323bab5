"""What a request is: how it went, by when it wants a token, and whose tokens are in its answer."""

import asyncio
import time

import pytest

from serve_app.handoff.errors import OtherVersion, StageTimeout
from serve_app.ingress.request import Deadline, Request, current
from serve_app.stage import Stage


def test_first_token_decides() -> None:
    request = Request("r")
    assert not request.decided.is_set() and not request.answered
    request.token(1)
    request.token(4)
    assert request.decided.is_set() and request.answered
    assert request.trace.output_tokens == 5


def test_first_failure_decides_and_is_kept() -> None:
    request, first = Request("r"), ValueError("first")
    request.fail(first)
    request.fail(ValueError("second"))
    assert request.decided.is_set() and not request.answered
    assert request.error is request.trace.error is first


def test_all_output_tokens_are_of_one_version() -> None:
    request = Request("r")
    request.goes_on_with("")
    request.goes_on_with("old")
    request.goes_on_with("")
    with pytest.raises(OtherVersion):
        request.goes_on_with("new")
    assert request.weights == "old"


@pytest.mark.parametrize(("own", "limit", "seconds"), [(None, 60, 60), (5.0, 60, 5), (90.0, 60, 60)])
def test_client_may_shorten_its_deadline(own: float | None, limit: float, seconds: float) -> None:
    async def main() -> None:
        request = Request("r", timeout_s=own, began=time.perf_counter() - 2)
        deadline, now = request.deadline(limit), asyncio.get_running_loop().time()
        assert deadline.seconds == seconds
        assert deadline.at - now == pytest.approx(seconds - 2, abs=0.5)

    asyncio.run(main())


def test_deadline_of_a_request_that_has_tokens_begins_now() -> None:
    async def main() -> None:
        request = Request("r", began=time.perf_counter() - 50)
        request.token(1)
        assert request.deadline(60).at - asyncio.get_running_loop().time() == pytest.approx(60, abs=0.5)

    asyncio.run(main())


def test_work_past_a_deadline_is_the_stages_timeout() -> None:
    async def main() -> None:
        deadline = Deadline.after(60, spent=60)
        with pytest.raises(StageTimeout, match="decode stage did not answer within 60 s"):
            await deadline.within(Stage.DECODE, asyncio.Event().wait())
        assert deadline.is_over and not deadline.anew().is_over

    asyncio.run(main())


def test_outside_a_request_there_is_none() -> None:
    assert current.get() is None
