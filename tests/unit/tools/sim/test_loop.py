"""Simulated time, and cores that work divides."""

import pytest

from tools.sim.loop import Loop, OwnCore, SharedCores, Thread


def test_actions_run_in_time_and_those_of_a_moment_in_the_order_they_were_asked_for() -> None:
    loop, ran = Loop(), []
    for name, moment in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        loop.at(moment, lambda name=name: ran.append((name, loop.now)))
    loop.run()

    assert ran == [("a", 1.0), ("b", 2.0), ("c", 2.0)]


def test_shared_cores_are_divided_equally_among_those_that_work() -> None:
    loop, ended = Loop(), {}
    cores = SharedCores(loop, 2.0)
    for name, seconds in (("short", 1.0), ("long", 2.0), ("longer", 3.0)):
        cores.start(seconds, lambda name=name: ended.update({name: loop.now}))
    loop.run()

    # Three on two cores: 2/3 each until the short one ends at 1.5; from then on a core each.
    assert ended == pytest.approx({"short": 1.5, "long": 2.5, "longer": 3.5})


def test_work_that_is_stopped_says_how_much_is_done() -> None:
    loop = Loop()
    cores = SharedCores(loop, 1.0)
    work = cores.start(4.0, lambda: pytest.fail("stopped work does not end"))
    cores.start(4.0, lambda: None)
    loop.at(2.0, lambda: done.append(cores.stop(work)))
    done: list[float] = []
    loop.run()

    assert done == pytest.approx([1.0]) and loop.now == pytest.approx(5.0)


def test_a_thread_does_one_piece_after_the_other() -> None:
    loop, ended = Loop(), []
    thread = Thread(OwnCore(loop))
    for seconds in (1.0, 0.0, 2.0):
        thread.work(seconds, lambda: ended.append(loop.now))
    loop.run()

    assert ended == [1.0, 1.0, 3.0]
