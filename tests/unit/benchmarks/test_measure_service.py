"""benchmarks.measure_service: its runs. They are made in real engines, and fitted in tests/unit/tools/sim/test_fit.py."""

import json

from benchmarks.measure_service import FIT, HELD_OUT, RESULT, case
from tools.sim.fit import Fitted, Run


def test_runs_have_names_of_their_own_and_rates_of_fitted_ones() -> None:
    names = [config.name for config in FIT + HELD_OUT]

    assert len(set(names)) == len(names)
    assert {config.poisson[0] for config in HELD_OUT if config.poisson} <= {config.name for config in FIT}
    assert {config.topology for config in FIT} == {"E+P+D"} < {config.topology for config in HELD_OUT}


def test_no_request_is_asked_twice() -> None:
    for config in (FIT[0], FIT[-1]):
        bodies = {json.dumps(case(config, number)[1]) for number in range(3)}
        assert len(bodies) == 3


def test_the_result_has_every_run_and_an_error_for_each_that_was_not_fitted() -> None:
    document = json.loads(RESULT.read_text())

    assert [Run.of(run).name for run in document["runs"]] == [config.name for config in FIT + HELD_OUT]
    assert [checked["name"] for checked in document["held_out"]] == [config.name for config in HELD_OUT]
    assert 0.5 < Fitted.read(RESULT).cores < document["machine"]["cpus"]
