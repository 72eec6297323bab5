"""benchmarks.startup: what the replicas logged of their start."""

from benchmarks.startup import phases

LOG = """
(ServeReplica:epd:Encoder pid=1) INFO 2026-11-24 epd_Encoder ab -- start-up encoder: import=5.1s engine=12.0s
(ServeController pid=2) INFO 2026-11-24 controller 2 -- start-up is not over
(ServeReplica:epd:Ingress pid=3) INFO 2026-11-24 epd_Ingress cd -- start-up ingress: app=9.5s stages=7.2s warm_up=0.9s
"""


def test_seconds_are_by_stage_and_phase() -> None:
    assert phases(LOG) == {
        "encoder": {"import": 5.1, "engine": 12.0},
        "ingress": {"app": 9.5, "stages": 7.2, "warm_up": 0.9},
    }
