"""What is told of a run on a card: answers against one engine's, memory against shares, what moved, what went wrong."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import page as pages
from benchmarks.gpu import probe
from benchmarks.gpu.answers import NEAR_TIE, Answer, ask, compare
from benchmarks.load import TARGET

ONE = Answer([5, 6, 7], [-0.5, -0.4, -0.3], [0.9, 0.05, 0.8])

UCX = """\
(Decode pid=1) [1795.1] [vm:1:0]   +--------+-------------+----------------+
(Decode pid=1) [1795.1] [vm:1:0]   | 77c36571 intra-node cfg#1              |
(Decode pid=1) [1795.1] [vm:1:0]   | remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda |
(Decode pid=1) [1795.1] [vm:1:0]   | Range  | Description | Config         |
(Decode pid=1) [1795.1] [vm:1:0]   | 0..inf | zero-copy   | cuda_ipc/cuda  |
(Decode pid=1) [1795.1] [vm:1:0]   | 77c36571 intra-node cfg#1              |
(Decode pid=1) [1795.1] [vm:1:0]   | remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda |
(Decode pid=1) [1795.1] [vm:1:0]   | Range      | Description | Config         |
(Decode pid=1) [1795.1] [vm:1:0]   |          0 | short       | tcp/lo         |
(Decode pid=1) [1795.1] [vm:1:0]   | 1..inf     | software emulation | tcp/lo  |
"""

METRICS = """\
# TYPE vllm:nixl_xfer_time_seconds histogram
vllm:nixl_xfer_time_seconds_sum{stage="decode",replica="a"} 0.5
vllm:nixl_xfer_time_seconds_count{stage="decode",replica="a"} 10.0
# TYPE vllm:nixl_bytes_transferred histogram
vllm:nixl_bytes_transferred_sum{stage="decode",replica="a"} 1e9
# TYPE vllm:nixl_num_failed_transfers_total counter
vllm:nixl_num_failed_transfers_total{stage="decode",replica="a"} 1.0
# TYPE epd:ec_items_total counter
epd:ec_items_total{stage="encoder",replica="b",event="encoded"} 8.0
epd:ec_items_total{stage="prefill",replica="c",event="loaded"} 4.0
# TYPE epd:ec_bytes_total counter
epd:ec_bytes_total{stage="prefill",replica="c",direction="loaded"} 4e6
# TYPE epd:ec_load_seconds histogram
epd:ec_load_seconds_sum{stage="prefill",replica="c"} 0.02
"""


def document(*found: dict[str, Any]) -> dict[str, Any]:
    card = {"name": "NVIDIA H100", "total_mib": 80000, "driver": "580.95.05"}
    return {
        "command": "python -m benchmarks.gpu",
        "machine": {"cpus": 16, "processor": "x86_64", "hardware": "with one NVIDIA H100", "model": "Qwen"},
        "versions": {"vllm": "0.32.0"},
        "workload": {"image_size": 224, "text_tokens": 64, "cells": 2},
        "seeds": "1 and on",
        "card": card,
        "engine_args": {"max_model_len": 8192},
        "notes": [],
        "budget": 9.0,
        "minutes": 4.0,
        "systems": list(found),
    }


def system(name: str, answer: Answer | None = None, **more: Any) -> dict[str, Any]:
    answers = {"answers": {"1 image": asdict(answer)}} if answer else {}
    return {"system": name, "rounds": [], **answers, **more}


# ---- answers


def test_equal_answers_have_no_margin() -> None:
    found = compare(Answer([5, 6, 7], [-0.5, -0.41, -0.3], [1.0] * 3), ONE)
    assert (found.verdict, found.equal, found.tokens) == ("equal", 3, 3)
    assert found.noise == pytest.approx(0.01)


def test_a_first_difference_where_one_engine_was_undecided_is_a_near_tie() -> None:
    found = compare(Answer([5, 9, 1], [-0.5, -0.4, -0.3], [1.0] * 3), ONE)
    assert (found.verdict, found.equal, found.margin) == ("near-tie", 1, 0.05)


@pytest.mark.parametrize("tokens", [[4, 6, 7], [5, 6, 8], [5, 6]])
def test_any_other_difference_is_one(tokens: list[int]) -> None:
    found = compare(Answer(tokens, [-0.5, -0.4, -0.3][: len(tokens)], [1.0] * len(tokens)), ONE)
    assert "different" in found.verdict and (found.margin or 0) > NEAR_TIE


def test_an_answer_is_read_from_the_api() -> None:
    content = [{"logprob": -0.1, "top_logprobs": [{"logprob": -2.5}, {"logprob": -0.1}]}]
    body = {"choices": [{"token_ids": [3], "logprobs": {"content": content}}]}
    server: Any = SimpleNamespace(post=lambda path, body: SimpleNamespace(status_code=200, json=lambda: body_of))
    body_of = body
    assert ask(server, ("/v1/chat/completions", {})) == Answer([3], [-0.1], [2.4])


# ---- memory and transfers


def test_memory_is_that_of_the_servers_own_processes_by_stage() -> None:
    server: Any = SimpleNamespace(processes=lambda: [SimpleNamespace(pid=pid) for pid in (1, 2, 3, 4)])
    stages = {1: "encoder", 2: "prefill", 3: "prefill", 4: None}
    told = {1: 100, 2: 200, 3: 50, 4: 7, 5: 9000}  # 4 is gone, 5 is of others
    assert probe.memory(server, told, stages.get) == {"encoder": 100, "prefill": 250}


def test_a_server_of_vllm_itself_has_the_whole_card() -> None:
    server: Any = SimpleNamespace(get=lambda path: SimpleNamespace(status_code=404))
    assert probe.shares(server) == {"decode": 1.0}


def test_shares_are_what_the_replicas_claim() -> None:
    told = [
        {"stage": "ingress", "loads": [{"requests": 0}]},
        {"stage": "encoder", "loads": [{"gpus": 0.15}]},
        {"stage": "decode", "loads": [{"gpus": 0.425}]},
    ]
    server: Any = SimpleNamespace(get=lambda path: SimpleNamespace(status_code=200, json=lambda: told))
    assert probe.shares(server) == {"encoder": 0.15, "decode": 0.425}


def test_the_transport_is_that_of_reads() -> None:
    assert probe.transports(UCX) == ["tcp/lo (short)", "tcp/lo (software emulation)"]


def test_what_moved_is_read_from_the_metrics() -> None:
    assert probe.kv_moved(METRICS) == {"count": 10, "seconds": 0.5, "bytes": 1e9, "failed": 1}
    assert probe.kv_moved("") is None
    assert probe.embeddings_moved(METRICS) == {
        "encoder": {"encoded": 8.0},
        "prefill": {"loaded": 4.0, "loaded bytes": 4e6, "load seconds": 0.02},
    }


# ---- the page


def test_an_engine_over_its_share_stands_out_and_one_that_is_not_told_is_no_zero() -> None:
    shares, used = {"encoder": 0.1, "prefill": 0.45, "decode": 0.45}, {"encoder": 8401, "prefill": 36100}
    found = system("ours E+P+D", shares=shares, memory_mib=used, card_mib=80500, card_before_mib=500)
    rows = pages.memory_rows(document(found))
    assert [row[2:] for row in rows] == [
        ["8401", "8000", "**over**"],
        ["36100", "36000", "within"],
        ["–", "36000", "not told"],
        ["80000", "80000", ""],
    ]


def test_page_says_how_much_moved_and_how_fast() -> None:
    moved = {
        "kv": probe.kv_moved(METRICS),
        "embeddings": probe.embeddings_moved(METRICS),
        "transports": ["tcp/lo (short)"],
    }
    told = pages.page(document(system("ours E+P+D", **moved)))
    assert (
        "KV: 10 hand-offs of 100.0 MB in 50.0 ms each, 2000 MB/s, 1 failed; transports by UCX: tcp/lo (short)." in told
    )
    assert "Embeddings, prefill: 4 loaded, 4.0 MB loaded, 5.0 ms per read." in told


def test_page_compares_answers_and_tells_of_what_failed() -> None:
    one = system("one engine", ONE, start_s=60.0)
    near = system("ours E+PD", Answer([5, 9, 1], [-0.5, -0.4, -0.3], [1.0] * 3), start_s=80.0)
    failed = system("ours E+P+D", error="OutOfTime: not done after 200 s", log=["EPD cannot serve"])
    told = pages.page(document(one, near, failed))
    assert "| ours E+PD | not measured | 80 | 0 of 1 equal, 1 near-tie |" in told
    assert "| ours E+P+D | OutOfTime | – | – |" in told
    assert "EPD cannot serve" in told


def test_rounds_are_compared_with_one_engines_of_the_same_round() -> None:
    def run(rate: float) -> dict[str, Any]:
        figures = {
            "completed": 128,
            "failed": 0,
            "request_throughput": rate,
            "cpu_s": {"engines": 1.0},
            "answers": "aa",
        }
        return {"cell": asdict(TARGET), "seed": 1, "requests": 128, **figures}

    one = system("one engine") | {"rounds": [[run(40.0)], [run(20.0)]]}
    ours = system("ours E+PD") | {"rounds": [[run(20.0)], [run(10.0)]]}
    told = pages.page(document(one, ours))
    assert "| ours E+PD / one engine | 0.50 |" in told
    assert "Rounds: one engine 2, ours E+PD 2." in told
