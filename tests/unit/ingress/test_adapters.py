"""LoRA adapters: who loads them, who hears of them, and what is left of one that an engine cannot load."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from serve_app.handoff.errors import CannotStart, StageUnavailable
from serve_app.ingress.adapters import Adapters, number_of
from serve_app.stage import Stage
from tests.fakes import FakePeers

BROKEN = StageUnavailable(Stage.DECODE, "cannot load it")


class FakeReplicas:
    """The replicas of a stage: each keeps the numbers of its adapters. ``broken``: how many of them cannot load any."""

    def __init__(self, replicas: int = 2, broken: int = 0) -> None:
        self.loaded: list[set[int]] = [set() for _ in range(replicas)]
        self._broken = broken

    async def broadcast(self, method: str, adapter: Any, timeout_s: float = 10.0) -> list[Any]:
        if method == "remove_adapter":
            for each in self.loaded:
                each.discard(adapter)
            return [None] * len(self.loaded)
        assert method == "add_adapter"
        for each in self.loaded[self._broken :]:
            each.add(adapter.lora_int_id)
        return [BROKEN] * self._broken + [None] * (len(self.loaded) - self._broken)


class Ingress:
    """An ingress replica's names of adapters, as vLLM keeps them."""

    def __init__(self, stages: dict[Stage, Any], peers: Any) -> None:
        self.adapters = Adapters(stages, peers)
        config = SimpleNamespace(model="demo", max_model_len=8)
        client: Any = SimpleNamespace(
            model_config=config, renderer=None, input_processor=None, add_lora=self.adapters.add
        )
        self.models: Any = OpenAIServingModels(client, [])
        self.adapters.serve(self.models)

    async def load(self, name: str, path: str = "/adapter", **more: Any) -> Any:
        return await self.models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=path, **more))

    async def unload(self, name: str) -> Any:
        return await self.models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", True, raising=False)


def stages(**broken: int) -> dict[Stage, Any]:
    return {stage: FakeReplicas(broken=broken.get(stage, 0)) for stage in Stage}


async def two(of: dict[Stage, Any]) -> list[Ingress]:
    found = [Ingress(of, peers) for peers in FakePeers(2)]
    for each in found:
        await each.adapters.begin()
    return found


def test_every_engine_that_computes_with_it_loads_it_and_every_ingress_knows_it() -> None:
    async def main() -> None:
        of = stages()
        here, there = await two(of)
        assert isinstance(await here.load("x"), str)
        number = number_of("x", "/adapter")
        assert of[Stage.PREFILL].loaded == of[Stage.DECODE].loaded == [{number}, {number}]
        assert of[Stage.ENCODER].loaded == [set(), set()]
        assert [each.models.lora_requests["x"].lora_int_id for each in (here, there)] == [number, number]
        assert isinstance(await there.unload("x"), str)
        assert here.models.lora_requests == there.models.lora_requests == {}

    asyncio.run(main())


def test_what_one_replica_cannot_load_none_keeps_and_nobody_names() -> None:
    async def main() -> None:
        of = stages(decode=1)
        here, there = await two(of)
        refused = await here.load("x")
        assert "cannot load it" in refused.error.message
        assert of[Stage.PREFILL].loaded == of[Stage.DECODE].loaded == [set(), set()]
        assert here.models.lora_requests == there.models.lora_requests == {}

    asyncio.run(main())


def test_adapters_of_the_config_are_loaded_once_the_stages_run() -> None:
    async def main() -> None:
        of = stages()
        (peers,) = FakePeers(1)
        starting = Ingress(of, peers)
        await starting.load("x")
        assert of[Stage.DECODE].loaded == [set(), set()]
        await starting.adapters.begin()
        assert of[Stage.DECODE].loaded == [{number_of("x", "/adapter")}] * 2

        failing = Ingress(stages(prefill=1), peers)
        await failing.load("x")
        with pytest.raises(CannotStart, match="cannot load it"):
            await failing.adapters.begin()

    asyncio.run(main())


def test_ingress_that_comes_later_knows_what_there_is_and_what_was_loaded_while_it_started() -> None:
    async def main() -> None:
        of, (first, second) = stages(), FakePeers(2)
        here = Ingress(of, first)
        await here.adapters.begin()
        await here.load("x")
        later = Ingress(of, second)
        await later.adapters.begin()
        assert list(later.models.lora_requests) == ["x"]
        here.models.lora_requests["y"] = LoRARequest("y", number_of("y", "/y"), "/y")  # it was not told
        resolved = await later.models.resolve_lora("y")
        assert (resolved.lora_path, resolved.lora_int_id) == ("/y", number_of("y", "/y"))
        assert (await later.models.resolve_lora("z")).error.code == 404

    asyncio.run(main())


def test_changed_weights_need_another_path_and_get_a_number_of_their_own() -> None:
    """With the same number an engine would go on with the ones that it has."""

    async def main() -> None:
        here, _ = await two(stages())
        await here.load("x")
        again = await here.load("x", load_inplace=True)
        assert "from another path" in again.error.message
        assert isinstance(await here.load("x", "/other", load_inplace=True), str)
        assert here.models.lora_requests["x"].lora_int_id == number_of("x", "/other") != number_of("x", "/adapter")

    asyncio.run(main())


def test_two_adapters_that_engines_would_mix_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.ingress.adapters.number_of", lambda name, path: 7)

    async def main() -> None:
        here, _ = await two(stages())
        await here.load("x")
        assert "another name" in (await here.load("y")).error.message

    asyncio.run(main())
