"""Leases of KV blocks on two real engines, a prefill and a decode, with nobody between them who would retry.

Prefill's cache holds a dozen of the prompts, so that blocks that are free are soon another's.
"""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams

from serve_app.config import EPDConfig
from serve_app.handoff.errors import HandoffLost
from serve_app.handoff.shaping import decode_params, hand_off_id, prefill_params, unique_id
from serve_app.handoff.types import Prompt, StageRequest
from serve_app.hooks.vllm_plugin import REPLICA_ENV
from serve_app.launch.connectors import side_channel_env
from serve_app.launch.engine_args import engine_args, model_path, replica_env
from serve_app.launch.placement import Cluster, resolve
from serve_app.stage import Stage

if TYPE_CHECKING:
    from serve_app.stages.engine import StageEngine

LEASE_S = 6
CACHE = {"engine_args": {"kv_cache_memory_bytes": 16 << 20}}
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def prompt(seed: int) -> Prompt:
    order = random.Random(seed)
    return Prompt([order.randrange(300, 1000) for _ in range(700)])


@dataclass
class Engines:
    prefill: "StageEngine"
    decode: "StageEngine"
    pids: dict[str, int]
    _prompts: int = 0

    def fresh(self) -> Prompt:
        self._prompts += 1
        return prompt(self._prompts)

    async def tokens(self, engine: "StageEngine", prompt: Prompt, kv: dict[str, Any] | None = None) -> list[int]:
        output = await engine.run(StageRequest(unique_id("r"), prompt, decode_params(GREEDY, kv, None)))
        return list(output.outputs[0].token_ids)

    async def hand_over(self, prompt: Prompt) -> dict[str, Any]:
        output = await self.prefill.run(StageRequest(unique_id("r"), prompt, prefill_params(GREEDY, None)))
        assert output.kv_transfer_params is not None
        return output.kv_transfer_params

    async def handed_over(self) -> tuple[Prompt, list[int], dict[str, Any]]:
        """A prompt that nobody has seen, the answer to it, and its hand-off."""
        asked = self.fresh()
        return asked, await self.tokens(self.prefill, asked), await self.hand_over(asked)

    async def use_every_free_block(self) -> None:
        await asyncio.gather(*(self.tokens(self.prefill, self.fresh()) for _ in range(16)))

    async def until(self, condition: Callable[[], bool], seconds: float = 3 * LEASE_S) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def right_or_lost(self, decoding: Awaitable[list[int]], expected: list[int]) -> bool:
        """Whether a hand-off was decoded. If it was lost, nothing of it may be in decode's cache, or held there."""
        decoded = asyncio.ensure_future(decoding)
        try:
            while not decoded.done():  # an idle prefill answers no pull
                await self.tokens(self.prefill, self.fresh())
            assert decoded.result() == expected
            return True
        except HandoffLost:
            return False
        finally:
            await self.until(lambda: self.decode.kv_use == 0)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engines(runner: asyncio.Runner) -> Iterator[Engines]:
    args = {
        "accelerator": "cpu",
        "model": "demo-random",
        "encoder": None,
        "advanced": {"kv": {"lease_s": LEASE_S}},
        "prefill": CACHE,
    }
    config = resolve(EPDConfig.model_validate(args), Cluster(0, 2)).config
    folder, metrics = model_path(config), set(REGISTRY._collector_to_names)
    made: dict[Stage, StageEngine] = {}
    pids: dict[str, int] = {}

    async def start(stage: Stage) -> None:
        from serve_app.stages.engine import StageEngine

        before = {child.pid for child in multiprocessing.active_children()}
        made[stage] = StageEngine(stage, engine_args(config, stage, folder))
        (pids[stage],) = (c.pid for c in multiprocessing.active_children() if c.pid and c.pid not in before)
        for collector in set(REGISTRY._collector_to_names) - metrics:  # two engines of one process
            REGISTRY.unregister(collector)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REPLICA_ENV, "test")
        try:
            for stage in (Stage.PREFILL, Stage.DECODE):
                for key, value in (replica_env(config, stage) | side_channel_env("127.0.0.1")).items():
                    patch.setenv(key, value)
                runner.run(start(stage))
            yield Engines(made[Stage.PREFILL], made[Stage.DECODE], pids)
        finally:
            for engine in made.values():
                engine.shutdown()


Scenario = Callable[[Engines], Awaitable[None]]


@pytest.fixture
def run(runner: asyncio.Runner, engines: Engines) -> Callable[[Scenario], None]:
    return lambda scenario: runner.run(asyncio.wait_for(scenario(engines), 120))  # type: ignore[arg-type]


def test_a_prefill_holds_a_hand_off_until_its_lease_is_over(run: Callable[[Scenario], None]) -> None:
    async def scenario(engines: Engines) -> None:
        assert not engines.prefill.holds_blocks
        await engines.hand_over(engines.fresh())
        began = time.monotonic()
        await asyncio.sleep(1)  # nothing to wait for: it has to stay so
        assert engines.prefill.holds_blocks and engines.prefill.kv_use < 0.2
        await engines.until(lambda: not engines.prefill.holds_blocks)
        assert time.monotonic() - began > LEASE_S / 2

    run(scenario)


def test_a_hand_off_in_its_lease_is_decoded_and_freed(run: Callable[[Scenario], None]) -> None:
    async def scenario(engines: Engines) -> None:
        asked, expected, blocks = await engines.handed_over()
        assert await engines.tokens(engines.decode, asked, blocks) == expected
        await engines.until(lambda: engines.prefill.kv_use == 0, LEASE_S / 2)

    run(scenario)


def test_a_hand_off_whose_lease_is_over_is_lost(run: Callable[[Scenario], None]) -> None:
    async def scenario(engines: Engines) -> None:
        asked, expected, blocks = await engines.handed_over()
        await engines.until(lambda: engines.prefill.kv_use == 0)
        assert await engines.prefill.renew_leases([str(hand_off_id(blocks))]) == {hand_off_id(blocks)}
        await engines.use_every_free_block()
        with pytest.raises(HandoffLost):
            await engines.tokens(engines.decode, asked, blocks)
        await engines.until(lambda: engines.decode.kv_use == 0)
        assert await engines.tokens(engines.decode, asked) == expected

    run(scenario)


def test_a_hand_off_whose_lease_was_renewed_is_decoded(run: Callable[[Scenario], None]) -> None:
    async def scenario(engines: Engines) -> None:
        asked, expected, blocks = await engines.handed_over()
        name = hand_off_id(blocks)
        assert name is not None
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * LEASE_S:
            assert await engines.prefill.renew_leases([name, "another"]) == set()
            await engines.use_every_free_block()
            await asyncio.sleep(LEASE_S / 4)
        assert await engines.tokens(engines.decode, asked, blocks) == expected
        await engines.until(lambda: engines.prefill.kv_use == 0, LEASE_S / 2)
        assert await engines.prefill.renew_leases([name]) == set()

    run(scenario)


@pytest.mark.parametrize("after_s", [0.0, 0.01], ids=lambda seconds: f"after {seconds * 1000:g} ms")
def test_a_decode_that_stands_still_for_longer_than_the_lease_is_never_wrong(
    run: Callable[[Scenario], None], after_s: float
) -> None:
    async def scenario(engines: Engines) -> None:
        asked, expected, blocks = await engines.handed_over()
        decoded = asyncio.create_task(engines.tokens(engines.decode, asked, blocks))
        await asyncio.sleep(after_s)
        os.kill(engines.pids[Stage.DECODE], signal.SIGSTOP)
        try:
            await engines.until(lambda: engines.prefill.kv_use == 0)
            await engines.use_every_free_block()
        finally:
            os.kill(engines.pids[Stage.DECODE], signal.SIGCONT)
        await engines.right_or_lost(decoded, expected)
        assert await engines.tokens(engines.decode, asked) == expected

    run(scenario)


def test_a_prefill_that_stands_still_for_longer_than_the_lease_is_noticed(run: Callable[[Scenario], None]) -> None:
    async def scenario(engines: Engines) -> None:
        asked, expected, blocks = await engines.handed_over()
        os.kill(engines.pids[Stage.PREFILL], signal.SIGSTOP)
        try:
            decoded = asyncio.create_task(engines.tokens(engines.decode, asked, blocks))
            done, _ = await asyncio.wait([decoded], timeout=1.2 * LEASE_S)
            assert done or await engines.decode.overdue_pulls(LEASE_S) == {hand_off_id(blocks)}
        finally:
            os.kill(engines.pids[Stage.PREFILL], signal.SIGCONT)
        await engines.right_or_lost(decoded, expected)
        assert await engines.decode.overdue_pulls(0) == set()
        assert await engines.tokens(engines.decode, asked) == expected

    run(scenario)
