"""What hand-offs of KV blocks lean on inside vLLM's NIXL connector, NIXL and UCX."""

import asyncio
import importlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

from tests.contracts.looking import fields, find, parameters


def test_no_token_stops_a_prefill(make_client: Any) -> None:
    """NIXL holds blocks of requests that ran to their length; decode stops at each of these."""
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.request import Request, RequestStatus

    from serve_app.handoff.shaping import decode_params, prefill_params
    from tests.unit.running import params, render

    def status(sampling: Any, token: int) -> Any:
        request = Request("r", [1, 2], sampling, None)
        request.append_output_token_ids(token)
        check_stop(request, max_model_len=100)
        return request.status

    async def main() -> Any:
        client = make_client({})
        asked = params(stop_token_ids=[5])
        core = client.input_processor.process_inputs("r", await render(client), asked, supported_tasks=("generate",))
        return core.params

    completed = asyncio.run(main())
    stops = {completed.eos_token_id, *completed.stop_token_ids}
    assert len(stops) > 1
    for token in stops:
        assert status(decode_params(completed, None, None), token) == RequestStatus.FINISHED_STOPPED
        assert status(prefill_params(completed, None), token) == RequestStatus.FINISHED_LENGTH_CAPPED, (
            "serve_app/handoff/shaping.py prefill_params"
        )


def test_prefill_that_reaches_its_length_is_what_nixl_hands_over() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import pull_scheduler

    source = inspect.getsource(pull_scheduler)
    keys = (
        "do_remote_decode",
        "do_remote_prefill",
        "remote_engine_id",
        "remote_block_ids",
        "remote_host",
        "remote_port",
    )
    missing = [key for key in keys if key not in source]
    assert not missing, f"serve_app/handoff/types.py REMOTE_DECODE: {missing} unknown to NixlConnector"
    assert "FINISHED_LENGTH_CAPPED" in source, (
        "serve_app/handoff/shaping.py prefill_params: which prefills are handed over"
    )
    assert "kv_lease_duration" in source, "serve_app/launch/connectors.py kv_transfer_config"


def test_pull_of_blocks_ends_before_a_request_counts_as_scheduled() -> None:
    """Decode tells the KV transfer from these two times."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    begun = source.index("request.status = RequestStatus.WAITING_FOR_REMOTE_KVS")
    scheduled = source.index("EngineCoreEventType.SCHEDULED", begun)
    assert "continue" in source[begun:scheduled], "deployments/decode.py: kv_s"
    assert "EngineCoreEventType.QUEUED" in inspect.getsource(Scheduler.add_request)


NIXL_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"


def test_transfers_are_looked_at_once_per_step_and_their_statistics_asked_for_next() -> None:
    """What transfer/kv_transport.py counts on, with both model runners and on the worker half of the connector."""
    for runner in ("vllm.v1.worker.kv_connector_model_runner_mixin", "vllm.v1.worker.gpu.kv_connector"):
        text = inspect.getsource(importlib.import_module(runner))
        looked, asked = text.index(".get_transfer_results("), text.index(".get_kv_connector_stats(")
        assert looked < asked, f"serve_app/transfer/kv_transport.py: {runner}"
    base = find(f"{NIXL_CONNECTOR}.connector:NixlBaseConnector")
    assert "self.connector_worker.get_transfer_results()" in inspect.getsource(base.get_transfer_results)
    assert "self.connector_worker.get_kv_connector_stats()" in inspect.getsource(base.get_kv_connector_stats)
    assert list(parameters(base.__init__)) == ["self", "vllm_config", "role", "kv_cache_config"]
    assert {"finished_sending", "finished_recving", "failed_recving"} <= fields(
        find("vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorTransferResults")
    )


def test_worker_on_a_cpu_moves_its_thread_to_the_last_core() -> None:
    made = inspect.getsource(find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker.__init__"))
    assert "os.sched_setaffinity(0, rsv_cores_for_kv)" in made, "serve_app/transfer/kv_lease.py: all_cores_kept can go"


def test_a_pulled_request_names_the_engine_that_has_its_blocks_until_they_are_there() -> None:
    worker = find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker")
    assert "self._recving_transfers = " in inspect.getsource(worker.__init__), (
        "serve_app/transfer/kv_transport.py: moving"
    )
    assert "self._recving_metadata.pop(req_id" in inspect.getsource(worker.get_transfer_results)
    assert "self._sending_transfers = " in inspect.getsource(
        find(f"{NIXL_CONNECTOR}.push_worker:NixlPushConnectorWorker.__init__")
    )
    assert "remote" in fields(find(f"{NIXL_CONNECTOR}.metadata:ReqMeta"))
    assert {"engine_id", "host"} <= fields(find(f"{NIXL_CONNECTOR}.metadata:RemoteMeta"))


def test_nixl_tells_bytes_and_microseconds_of_a_transfer() -> None:
    """serve_app/transfer/kv_transport.py makes MB/s of them; from post to the look that found it done."""
    text = inspect.getsource(find(f"{NIXL_CONNECTOR}.stats:NixlKVConnectorStats.record_transfer"))
    assert '["transfer_duration"].append(res.xferDuration / 1e6)' in text
    assert '["bytes_transferred"].append(res.totalBytes)' in text
    done = inspect.getsource(find(f"{NIXL_CONNECTOR}.base_worker:NixlBaseConnectorWorker._pop_done_transfers"))
    assert done.index("check_xfer_state") < done.index("get_xfer_telemetry") < done.index("release_xfer_handle")


def test_a_connectors_metrics_are_made_by_its_class() -> None:
    """`build_prom_metrics`, with positional arguments (transfer/kv_transport.py) and with the classes of the logger."""
    text = inspect.getsource(find("vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorProm.__init__"))
    assert "connector_cls.build_prom_metrics(\n                vllm_config,\n                metric_types,\n" in text


def test_the_variables_that_a_slow_hand_off_is_told_to_set_are_those_of_this_ucx() -> None:
    """In NIXL's wheels; UCX does not fail for one that it does not know."""
    folder = Path(importlib.import_module("nixl").__file__ or "").parents[1]
    libraries = list(folder.glob("nixl_cu1[23].libs/ucx/libuct_cuda.so*"))
    assert libraries, "serve_app/transfer/kv_transport.py: SLOW"
    for library in libraries:
        data = library.read_bytes()
        assert b"\0CUDA_IPC_\0" in data and b"\0ENABLE_GET_ZCOPY\0" in data, library
        (protocols,) = library.parents[1].glob("libucp-*.so*")
        assert b"\0PROTO_INFO\0" in protocols.read_bytes(), protocols


def test_a_layout_of_kv_blocks_is_what_nixl_compares() -> None:
    """``kv_layout.layout_of`` hashes as a worker does, which takes the backend of its layers where there are any."""
    worker = find("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker:NixlBaseConnectorWorker")
    text = inspect.getsource(worker.register_kv_caches)
    assert "compute_nixl_compatibility_hash(" in text and "self.backend_name" in text
    assert "get_current_attn_backends(vllm_config)" in inspect.getsource(worker.__init__)


def test_leases_of_kv_blocks_are_renewed_by_ids_joined_by_commas() -> None:
    """Why a client's request id goes on without commas (`clean_id`)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    source = inspect.getsource(NixlBaseConnectorWorker)
    assert '",".join(' in source and 'split(",")' in source


def test_nixl_hashes_what_engines_agree_on_when_its_caches_are_registered_and_tells_it_then() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, connector, pull_worker, push_worker

    where = "serve_app/transfer/kv_transport.py register_kv_caches"
    source = inspect.getsource(base_worker.NixlBaseConnectorWorker)
    assert source.count("self.compat_hash = compute_nixl_compatibility_hash(") == 1, where
    assert source.count("self.xfer_handshake_metadata = NixlHandshakePayload(") == 1, where
    registers = inspect.getsource(base_worker.NixlBaseConnectorWorker.register_kv_caches)
    assert "compute_nixl_compatibility_hash(" in registers and "self.xfer_handshake_metadata = " in registers, where
    assert "handshake_payload.compatibility_hash != self.compat_hash" in source, where
    for module in (pull_worker, push_worker):
        assert "compat_hash" not in inspect.getsource(module), where
    assert "return self.connector_worker.xfer_handshake_metadata" in inspect.getsource(connector), where


def test_nixl_takes_the_progress_thread_first_and_hides_its_delay() -> None:
    from nixl._api import nixl_agent_config

    names = list(parameters(nixl_agent_config.__init__))
    assert names[1] == "enable_prog_thread", "serve_app/hooks/vllm_plugin.py: first argument of nixl_agent_config"
    assert not any("delay" in name for name in names), (
        "serve_app/hooks/vllm_plugin.py: nixl_agent_config takes a delay now, so the patch can go"
    )
