"""benchmarks.streams: answers are counted as their bytes come, however these are parted."""

import asyncio
import json

import pytest

from benchmarks import streams
from benchmarks.streams import Answer, Wave, body, outcome, put, request, share


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def answer_bytes(tokens: int, size: int | None = None) -> bytes:
    """An answer as uvicorn sends it, an event a chunk; ``size``: as a proxy does that parts it anew."""
    events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"delta": {"content": " a"}}]}] * tokens
    events += [{"choices": [], "usage": {"prompt_tokens": 70, "completion_tokens": tokens}}]  # type: ignore[list-item]
    said = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
    if size is not None:
        whole = b"".join(said)
        said = [whole[start : start + size] for start in range(0, len(whole), size)]
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(map(chunk, said)) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [24, 100, 1000, 100_000])
def test_an_answer_is_the_same_in_pieces_of_any_size(size: int) -> None:
    data, answer = answer_bytes(5), Answer(began=0.0)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    ended = [answer.take(piece, float(number)) for number, piece in enumerate(pieces, 1)]
    assert ended == [False] * (len(pieces) - 1) + [True]
    assert (answer.status, answer.events, answer.tokens) == (200, 5 + 2, 5)


@pytest.mark.parametrize("size", [7, 11, 1024])
def test_tokens_are_told_whatever_chunks_a_proxy_makes(size: int) -> None:
    answer = Answer(began=0.0)
    assert answer.take(answer_bytes(5, size), 1.0)
    assert answer.tokens == 5


def test_times_are_those_of_events_and_pauses_are_between_them() -> None:
    answer = Answer(began=1.0)
    answer.take(b"HTTP/1.1 200 OK\r\n\r\n", 2.0)
    answer.take(chunk(b'data: {"choices": []}\n\n') * 2, 3.0)
    answer.take(b"", 4.0)
    answer.take(chunk(b'data: {"choices": []}\n\n'), 5.5)
    assert (answer.first, answer.last, answer.gaps) == (3.0, 5.5, [2.5])


def test_what_breaks_off_has_no_tokens_and_failed() -> None:
    whole, broken, refused = Answer(0.0), Answer(0.0), Answer(0.0)
    whole.take(answer_bytes(4), 0.1)
    broken.take(answer_bytes(4)[:-40], 0.1)
    assert refused.take(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 0.1)
    found = outcome(Wave(3, 4), [whole, broken, refused], 2.0)
    assert (found["failed"], found["requests_per_s"], found["tokens_per_s"]) == (2, 0.5, 2.0)
    assert found["chunks_per_token"] == 1.0


def test_time_per_token_leaves_out_the_first_one() -> None:
    answer, data = Answer(0.0), answer_bytes(5)
    answer.take(data[:200], 1.0)
    answer.take(data[200:], 3.0)
    found = outcome(Wave(1, 5), [answer], 3.0)
    assert (found["ttft_p50_ms"], found["tpot_p50_ms"], found["gap_p99_ms"]) == (1000.0, 500.0, 2000.0)


def test_no_request_comes_twice() -> None:
    wave = Wave(1, 4, images=1)
    assert body(wave, 1) == body(wave, 1) != body(wave, 2)


def test_a_share_is_one_of_the_values() -> None:
    assert [share([3.0, 1.0, 2.0], percent) for percent in (1, 50, 99)] == [1.0, 2.0, 3.0]
    assert share([], 50) == 0.0


async def served(statuses: list[int], requests: int, streams: int) -> tuple[list[Answer], int]:
    """The answers of a server that gives the statuses in turn, then 200, and how many connections it got."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                status = statuses.pop(0) if statuses else 200
                writer.write(answer_bytes(3) if status == 200 else b"HTTP/1.1 %d No\r\n\r\n" % status)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        data = [request(f"127.0.0.1:{port}", b"{}")] * requests
        answers, _, speed = await put(f"http://127.0.0.1:{port}", data, streams)
        assert speed
    return answers, connections


def test_a_stream_keeps_its_connection() -> None:
    answers, connections = asyncio.run(served([], requests=8, streams=2))
    assert [answer.tokens for answer in answers] == [3] * 8
    assert connections == 2


def test_after_a_refusal_a_stream_goes_on_with_another_connection() -> None:
    answers, connections = asyncio.run(served([503], requests=4, streams=1))
    assert [answer.tokens for answer in answers] == [0, 3, 3, 3]
    assert connections == 2


def test_a_wave_waits_for_others_to_be_done_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1.5, 0.9, 0.1])
    monkeypatch.setattr(streams, "busy", lambda mark: next(used))
    streams.wait_for_quiet("mark", 60.0)
    assert next(used, None) is None
    monkeypatch.setattr(streams, "busy", lambda mark: 2.0)
    streams.wait_for_quiet("mark", 0.01)
