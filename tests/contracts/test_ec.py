"""What transfer/ec_nixl.py and the checks of `ec:` lean on in vLLM's EC connectors. A failure names the file to look at."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EC_EXTRA_KEYS, EC_OWN_KEYS
from tests.contracts.looking import parameters

EC = "vllm.distributed.ec_transfer.ec_connector"


def source(package: str) -> str:
    """The text of a package's modules."""
    spec = importlib.util.find_spec(f"{EC}.{package}")
    assert spec is not None and spec.origin is not None, f"{EC}.{package} is gone"
    path = Path(spec.origin)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize(
    ("package", "connector"), [("cpu", "ECCPUConnector"), ("example_connector", "ECExampleConnector")]
)
def test_extra_config_is_what_the_connector_reads(package: str, connector: str) -> None:
    read = re.findall(r"extra_config(?:\.get)?\(\s*\"(\w+)\"", source(package))
    own = EC_OWN_KEYS.keys() if connector == "ECCPUConnector" else set()
    assert set(read) == EC_EXTRA_KEYS[connector] | own, "serve_app/config/handoff.py EC_EXTRA_KEYS, EC_OWN_KEYS"


def test_connector_has_the_seams_that_ours_uses() -> None:
    from vllm.distributed.ec_transfer.ec_connector.cpu.connector import ECCPUConnector
    from vllm.distributed.ec_transfer.ec_connector.cpu.ec_shared_region import ECSharedRegion
    from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler

    made = inspect.getsource(ECCPUConnector.__init__)
    assert "self._make_scheduler(vllm_config)" in made and "use_v2_model_runner" in made, (
        "transfer/ec_nixl.py, roles.py"
    )
    assert {"_num_blocks", "ensure_cache_available", "request_finished"} <= vars(ECCPUScheduler).keys()
    for name in ("self._region", "self._cache", "self._is_producer", "self._ec_config"):
        assert name in inspect.getsource(ECCPUScheduler.__init__), f"transfer/ec_nixl.py uses {name}"
    for name in ("self._mmap_path", "self._is_creator", "self.num_blocks", "self.block_size_bytes"):
        assert name in inspect.getsource(ECSharedRegion), f"transfer/ec_nixl.py uses {name}"


def test_one_port_per_engine_that_its_scheduler_listens_on() -> None:
    """Not one per rank, and none that grows with the data parallel rank: transfer.side_channel_env, config's check."""
    scheduler, worker = source("cpu.scheduler"), source("cpu.worker")
    assert "self._peer_port = envs.VLLM_EC_SIDE_CHANNEL_PORT\n" in scheduler
    assert "ZmqServerTransport(" in scheduler and "SIDE_CHANNEL" not in worker


def test_answer_has_the_keys_that_tell_what_can_be_read() -> None:
    scheduler = source("cpu.scheduler")
    for key in ("peer_host", "peer_port", "size_bytes", "shape"):
        assert f"{key}=" in scheduler and f'"{key}"' in scheduler, f"transfer/ec_nixl.py request_finished: {key}"


def test_read_does_not_free_what_an_encoder_keeps() -> None:
    """An answer may serve several requests (`ec.shareable`): a completed read is unpinned, and nothing else."""
    from vllm.distributed.ec_transfer.ec_connector.cpu.session import ProducerSession

    text = inspect.getsource(ProducerSession._drain_notifs)
    assert "unpin(" in text and "discard" not in text


def test_lost_embedding_costs_a_minute_at_most() -> None:
    from vllm.distributed.ec_transfer.ec_connector.cpu import scheduler

    assert scheduler._ADMIT_DEFER_TIMEOUT_S == 60.0, "docs/operations.md: the wait for an encoder that is gone"


def test_workers_are_made_before_the_scheduler() -> None:
    """The buffer's name goes when the scheduler has opened it: transfer/ec_nixl.py."""
    from vllm.v1.engine.core import EngineCore

    text = inspect.getsource(EngineCore.__init__)
    assert text.index("self.model_executor = executor_class(") < text.index(
        "scheduler: SchedulerInterface = Scheduler("
    )


def test_mooncake_still_wants_the_consumer_named_before_encoding() -> None:
    """Why it is refused (serve_app/config/handoff.py). Gone: it can be taken again."""
    from vllm.distributed.ec_transfer.ec_connector.mooncake.scheduler import ECMooncakeScheduler

    text: Any = inspect.getsource(ECMooncakeScheduler._prepare_push_spec)
    assert 'params.get("consumer_zmq")' in text and "if not consumer_zmq" in text


# ---- what SharedFolderECConnector leans on


def test_scheduler_replies_before_it_hears_of_its_workers() -> None:
    """Why an encoder's reply waits for its files itself. Where this changes, the workers could report what is written."""
    from vllm.v1.core.sched.scheduler import Scheduler

    text = inspect.getsource(Scheduler.update_from_output)
    assert text.index("self._free_request(request)") < text.index("update_connector_output("), (
        "serve_app/transfer/ec_connector.py request_finished"
    )
    assert "self.ec_connector.request_finished(request)" in inspect.getsource(Scheduler._free_request)


def test_all_workers_have_ended_a_step_when_the_scheduler_replies() -> None:
    """Those in other processes: serve_app/transfer/ec_worker.py end_step."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    assert "init_ec_output_aggregator()" in inspect.getsource(EngineCore.__init__)
    assert "ec_output_aggregator=self.ec_output_aggregator" in inspect.getsource(MultiprocExecutor.execute_model)


def test_ranks_are_known_when_a_workers_connector_is_made() -> None:
    from vllm.v1.worker import gpu_worker

    text = inspect.getsource(gpu_worker.init_worker_distributed_environment)
    assert text.index("ensure_model_parallel_initialized(") < text.index("ensure_ec_transfer_initialized("), (
        "serve_app/transfer/ec_worker.py is_first_rank"
    )


def test_queue_to_workers_sends_the_memory_of_tensors_beside_the_step() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    assert "dispatch_table[torch.Tensor] = _reduce_tensor" in inspect.getsource(MessageQueue.enqueue), (
        "serve_app/transfer/ec_worker.py Load"
    )


def test_workers_are_shut_down_before_the_scheduler() -> None:
    """It closes the writer that they share with it."""
    from vllm.v1.engine.core import EngineCore

    text = inspect.getsource(EngineCore.shutdown)
    assert text.index("self.model_executor.shutdown()") < text.index("self.scheduler.shutdown()")


@pytest.mark.parametrize(
    "hook",
    [
        "save_caches",
        "ensure_cache_available",
        "take_unavailable_requests",
        "update_state_after_alloc",
        "get_ec_connector_stats",
        "build_ec_connector_stats",
        "build_prom_metrics",
        "has_cache_item",
        "build_connector_meta",
        "request_finished",
        "start_load_caches",
        "get_finished",
        "start_save_caches",
        "shutdown",
    ],
)
def test_hook_of_our_connector_is_one_that_vllm_calls(hook: str) -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

    from serve_app.transfer.ec_connector import SharedFolderECConnector

    where = f"serve_app/transfer/ec_connector.py {hook}: ECConnectorBase"
    assert hasattr(ECConnectorBase, hook), where
    theirs, ours = parameters(getattr(ECConnectorBase, hook)), parameters(getattr(SharedFolderECConnector, hook))
    assert list(ours) == list(theirs), where


def test_item_without_pixels_is_known_by_its_fields(demo_vllm_config: Any) -> None:
    from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver

    declared = PlaceholderMetadataResolver(demo_vllm_config.model_config).fields_for("image")
    assert declared == {"image_grid_thw"}, "serve_app/transfer/ec_connector.py _can_encode: fields_for"


def test_scheduler_reports_a_lost_embedding_too_late_for_its_step() -> None:
    """Why the scheduler's half reads the files. Where this changes, the workers could read them and report."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.update_from_output)
    steps = [
        "output_is_stale and request.drop_stale_output",
        "self._update_request_with_output(",
        "take_unavailable_requests()",
        "update_connector_output(ec_connector_output)",
    ]
    places = [source.index(step) for step in steps]
    assert places == sorted(places), "serve_app/transfer/ec_connector.py: its docstring, _spoil"
