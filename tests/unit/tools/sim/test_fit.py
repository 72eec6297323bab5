"""Service times from measured runs: known ones are found again, and a run is played as it was measured."""

from itertools import pairwise

import pytest

from tests.unit.tools.sim.parts import times
from tools.sim.fit import Group, Run, arrivals, check, solved
from tools.sim.service import Topology

TRUE = {
    Group.INGRESS: (0.005, 0.002, 0.0001),  # request, item, token
    Group.AROUND: (0.003, 0.001, 0.0002),
    Group.ENCODER_REPLICA: (0.006, 0.00001),  # item, embedding
    Group.ENCODER: (0.01, 0.02, 0.0004, 0.0000001),  # step, item, embedding, each other beside it
    Group.PREFILL_REPLICA: (0.002,),  # call
    Group.PREFILL: (0.008, 0.0003),  # step, token
    Group.DECODE_REPLICA: (0.001, 0.0005),  # call, token
    Group.DECODE: (0.00004, 0.003, 0.0007),  # token of the prompt, step, token
}
IDLE = 0.02


def run(images: int, embeds: int, text: int, output: int, together: int, topology: Topology = "E+P+D") -> Run:
    """``together`` requests share each step; CPU seconds of ``TRUE`` and of what is busy all the time."""
    requests, seconds = 20 + 30 * together, 20.0
    items, prompt, tokens = requests * images, text + images * embeds, requests * output
    encoder_steps, prefill_steps, decode_steps = items / together, requests / together, tokens / together
    beside = (items * embeds) ** 2 / max(encoder_steps, 1)
    work = {
        Group.INGRESS: (requests, items, tokens),
        Group.AROUND: (requests, items, tokens),
        Group.ENCODER_REPLICA: (items, items * embeds),
        Group.ENCODER: (encoder_steps, items, items * embeds, beside),
        Group.PREFILL_REPLICA: (requests,),
        Group.PREFILL: (prefill_steps, requests * prompt),
        Group.DECODE_REPLICA: (requests, tokens),
        Group.DECODE: (requests * prompt, decode_steps, tokens),
    }
    return Run(
        name="",
        seconds=seconds,
        asked_s=seconds,
        at_a_time=together,
        rate=None,
        requests=requests,
        failures=0,
        images=images,
        embeds=embeds,
        prompt_tokens=prompt,
        output_tokens=output,
        prefill_steps=prefill_steps,
        decode_steps=decode_steps,
        cpu_s={
            group: IDLE * seconds + sum(cost * amount for cost, amount in zip(TRUE[group], work[group], strict=True))
            for group in Group
        },
        other_cores=0.0,
        load=0.0,
        per_s=requests / seconds,
        ttft_p50_s=0.1,
        ttft_p90_s=0.1,
        tpot_p50_s=0.01,
        encoder_steps=encoder_steps,
        topology=topology,
        steps_p50_s={},
    )


RUNS = [
    run(*shape, together)
    for shape in ((0, 0, 100, 16), (0, 0, 900, 64), (1, 64, 100, 16), (1, 256, 100, 16), (2, 256, 50, 4))
    for together in (1, 5)
]


def test_what_runs_were_made_of_is_found_again() -> None:
    service, idle = solved(RUNS, cores=2)

    assert (service.render_s, service.render_item_s, service.chunk_s) == pytest.approx(TRUE[Group.INGRESS])
    assert (service.around_s, service.around_item_s, service.around_chunk_s) == pytest.approx(TRUE[Group.AROUND])
    assert (service.prepare_s, service.prepare_embed_s) == pytest.approx(TRUE[Group.ENCODER_REPLICA])
    encode = service.encode_step_s, service.encode_s, service.encode_embed_s, service.encode_beside_s
    assert encode == pytest.approx(TRUE[Group.ENCODER])
    assert (service.prefill_call_s, service.prefill_step_s, service.prefill_token_s) == pytest.approx(
        (*TRUE[Group.PREFILL_REPLICA], *TRUE[Group.PREFILL])
    )
    assert service.prefill_embed_s == pytest.approx(TRUE[Group.PREFILL][1])
    relay_s = TRUE[Group.DECODE_REPLICA][1]
    assert (service.pull_token_s, service.decode_step_s, service.decode_sequence_s - relay_s) == pytest.approx(
        TRUE[Group.DECODE]
    )
    assert idle == pytest.approx(len(Group) * IDLE)


@pytest.mark.parametrize("topology", ["E+P+D", "E+PD"])
def test_a_run_of_one_request_at_a_time_takes_what_its_parts_take(topology: Topology) -> None:
    service = times(encode_s=0.2, prefill_token_s=0.001, decode_step_s=0.01)
    checked = check(run(1, 256, 44, 5, 1, topology), service, idle=0.0, cores=2.0)
    first = 0.2 + 0.3 + (0.01 if topology == "E+P+D" else 0.0)

    assert checked.ttft_p50_s_simulated == pytest.approx(first)
    assert checked.per_s_simulated == pytest.approx(1 / (first + 4 * 0.01), rel=0.01)


def test_arrivals_are_the_same_each_time_and_have_their_rate() -> None:
    moments = list(arrivals(5.0, 400.0))

    assert moments == list(arrivals(5.0, 400.0)) and moments[-1] < 400.0
    assert len(moments) / 400.0 == pytest.approx(5.0, rel=0.1)
    gaps = [after - before for before, after in pairwise(moments)]
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.37, abs=0.05)
