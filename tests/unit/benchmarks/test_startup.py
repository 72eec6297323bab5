"""benchmarks.startup: what a log says of a start, what the page cache holds, and what is promised."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.questions.start import second
from benchmarks.questions.systems import E_P_D
from benchmarks.report import Spread
from benchmarks.startup import cached, phases, until

LOG = """
2026-11-24 09:00:05,500 INFO worker.py:2029 -- Started a local Ray instance.
(ServeController pid=2) INFO 2026-11-24 09:00:08,000 controller 2 -- Imported and built app 'epd' successfully.
(ServeReplica:epd:Encoder pid=1) INFO 2026-11-24 09:00:17,000 epd_Encoder ab -- start-up encoder: import=5.1s engine=12.0s
(ServeReplica:epd:Decode pid=1) INFO 2026-11-24 09:00:19,250 epd_Decode ab -- start-up decode: import=5.1s engine=14.0s
(ServeController pid=2) INFO 2026-11-24 09:00:19,500 controller 2 -- start-up is not over
(ServeReplica:epd:Ingress pid=3) INFO 2026-11-24 09:00:20,000 epd_Ingress cd -- start-up ingress: app=9.5s stages=7.2s
start-up ingress: without a stamp
"""


def test_seconds_are_by_stage_and_phase() -> None:
    assert phases(LOG) == {
        "encoder": {"import": 5.1, "engine": 12.0},
        "decode": {"import": 5.1, "engine": 14.0},
        "ingress": {"app": 9.5, "stages": 7.2},
    }


def test_phases_end_with_the_last_line_that_tells_of_them() -> None:
    began = datetime(2026, 11, 24, 9).timestamp()
    assert until(LOG, began) == {"ray": 5.5, "config": 8.0, "engines": 19.25, "ingress": 20.0}
    assert until("nothing", began) == {}


def test_a_second_replica_is_that_of_every_stage_and_start() -> None:
    runs = [
        {
            "system": E_P_D,
            "round": 0,
            "cache": cache,
            "up_s": 30.0,
            "second_replica_s": {"encoder": 9.0, "decode": more},
        }
        for cache, more in (("cold", 12.0), ("warm", 11.0))
    ]
    assert second({"runs": runs}) == Spread(10.0, 9.0, 12.0)


def test_file_that_was_just_read_is_cached_and_one_that_is_forgotten_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    path.read_bytes()
    assert cached(path) == 1
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (left := cached(path)) == 1:
        pytest.skip("this file system keeps its files in memory")
    assert left == 0
