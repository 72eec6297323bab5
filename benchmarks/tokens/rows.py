"""What is measured: systems, waves of requests, and the rows that bring them together."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.null_engine import APP, STEP_S
from benchmarks.streams import Wave
from benchmarks.systems import System, ours, reference
from tools.harness.servers import Server, vllm_server

MANY_CORES = (os.cpu_count() or 1) >= 8
"""Enough for two ingress replicas, the rest of the system and the clients."""

# ---- systems

Args = dict[str, Any]
E_PD: Args = {"prefill": None}
E_P_D: Args = {}
CROWD: Args = {"engine_args": {"max_num_seqs": 128}}
"""The demo model's engines would run 32 requests at a time."""
WIDE: Args = {"engine_args": {"max_num_seqs": 1024}, "advanced": {"decode": {"max_ongoing_requests": 1024}}}
SLOWER_S = 0.05
INTERVALS_S = (0.0, 0.01, 0.02, SLOWER_S)


@contextmanager
def two_ingresses(folder: Path) -> Iterator[Server]:
    with ours(folder, E_PD | WIDE, APP, ingresses=2) as server:

        def both() -> bool:
            return bool(server.get("/status").json()[0]["replicas"] == {"RUNNING": 2})

        server.wait_until(both, "the second ingress", 120)
        yield server


def every(interval_s: float) -> Args:
    """Tokens of an answer go on together that come within this time."""
    return {"advanced": {"answers": {"chunk_interval_s": interval_s}}}


NULL_E_PD, NULL_E_P_D, AT_ONCE = "null E+PD", "null E+P+D", "null E+P+D, no pace"
NULL_SLOWER = f"null E+PD, {SLOWER_S:g} s"
ONE_INGRESS, TWO_INGRESSES = "null E+PD, one ingress", "null E+PD, two ingresses"
ONE, PROXY, REAL_E_PD, REAL_E_P_D = "one engine", "proxy", "E+PD", "E+P+D"
BY_INTERVAL = {f"E+PD, {interval_s:g} s": interval_s for interval_s in INTERVALS_S}

SYSTEMS: dict[str, System] = {
    NULL_E_PD: lambda folder: ours(folder, E_PD, APP),
    NULL_E_P_D: lambda folder: ours(folder, E_P_D, APP),
    AT_ONCE: lambda folder: ours(folder, E_P_D | {"null_step_s": 0.0}, APP),
    NULL_SLOWER: lambda folder: ours(folder, E_PD | every(SLOWER_S), APP),
    ONE_INGRESS: lambda folder: ours(folder, E_PD | WIDE, APP),
    TWO_INGRESSES: two_ingresses,
    **{name: partial(ours, topology=E_PD | CROWD | every(interval_s)) for name, interval_s in BY_INTERVAL.items()},
    ONE: lambda folder: vllm_server(folder, CROWD),
    PROXY: lambda folder: reference(folder, CROWD),
    REAL_E_PD: lambda folder: ours(folder, E_PD | CROWD),
    REAL_E_P_D: lambda folder: ours(folder, E_P_D | CROWD),
}

# ---- rows

CARD = Wave(128, 200)
FIRST_TOKEN = Wave(16, 1, answers=64)
SCALED = Wave(640 if MANY_CORES else 128, 200)
LONG = Wave(64, 256, answers=2)
IMAGES, SHORT = Wave(8, 16, answers=16, images=2), Wave(32, 16, answers=24)


@dataclass(frozen=True)
class Row:
    title: str
    systems: tuple[str, ...]
    waves: tuple[Wave, ...]
    per: str = "token"
    """What CPU time is divided by: µs per token, or ms per request."""


ROWS = {
    "a": Row(
        f"Engines at a card's pace, {STEP_S * 1000:g} ms a token, text",
        (NULL_E_PD, NULL_SLOWER, NULL_E_P_D),
        (Wave(8, 200), Wave(32, 200), CARD),
    ),
    "b": Row("Engines without a pace, text, one token", (AT_ONCE,), (FIRST_TOKEN,), "request"),
    "c": Row("Ingress replicas", (ONE_INGRESS, TWO_INGRESSES), (SCALED,)),
    "d": Row(
        "Real engines by `chunk_interval_s`",
        tuple(BY_INTERVAL),
        (Wave(8, 256, answers=3), Wave(32, 256, answers=2), Wave(128, 128)),
    ),
    "e": Row("Real engines against one engine", (ONE, REAL_E_PD, REAL_E_P_D), (LONG,)),
    "f": Row(
        "Real engines against the reference's proxy", (PROXY, REAL_E_PD, REAL_E_P_D), (IMAGES, SHORT, LONG), "request"
    ),
}
QUICK = {"a": Row(ROWS["a"].title, (NULL_E_P_D,), (CARD,)), "b": ROWS["b"]}


def plan(rows: Iterable[Row]) -> dict[str, list[Wave]]:
    """Of each system the waves that some row needs, each once."""
    found: dict[str, list[Wave]] = {}
    for row in rows:
        for system in row.systems:
            waves = found.setdefault(system, [])
            waves += [wave for wave in row.waves if wave not in waves]
    return found
