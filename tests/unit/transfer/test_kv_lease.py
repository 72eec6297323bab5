"""What decode has pulled counts only if prefill held it till then. vLLM's scheduler, listener and worker, a fake NIXL."""

import inspect
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker, pull_worker, push_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import RemoteMeta, ReqMeta
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.request import RequestStatus
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

from serve_app.launch.connectors import free_ports
from serve_app.transfer import kv_lease
from serve_app.transfer.kv_lease import LeaseScheduler, PullWorker, PushWorker, all_cores_kept, is_held

LEASE_S = 30


def scheduler() -> LeaseScheduler:
    made = LeaseScheduler.__new__(LeaseScheduler)
    made.__dict__ |= {
        "_held": set(),
        "_kv_lease_duration": LEASE_S,
        "_reqs_need_send": {},
        "_reqs_need_recv": {},
        "_reqs_not_processed": set(),
        "_reqs_need_save": {},
        "_heartbeat_req_engine": {},
        "is_bidirectional_kv_xfer_enabled": False,
        "engine_id": "prefill",
        "side_channel_host": "127.0.0.1",
        "side_channel_port": 1,
        "transfer_tp_size": 1,
        "vllm_config": SimpleNamespace(
            parallel_config=SimpleNamespace(decode_context_parallel_size=1, pipeline_parallel_size=1)
        ),
        "get_exchange_clipped_blocks": lambda blocks: blocks,
    }
    return made


def finish(prefill: LeaseScheduler, request_id: str, status: Any = RequestStatus.FINISHED_LENGTH_CAPPED) -> Any:
    request = SimpleNamespace(
        request_id=request_id, status=status, kv_transfer_params={"do_remote_decode": True}, num_computed_tokens=3
    )
    return prefill.request_finished(request, ([1, 2],))


def ended(*request_ids: str) -> Any:
    """What vLLM's scheduler hears of requests whose blocks were pulled, or whose lease is over."""
    return SimpleNamespace(finished_sending=set(request_ids), finished_recving=None)


@pytest.fixture
def listening() -> Iterator[tuple[LeaseScheduler, int]]:
    """vLLM's listener, as its thread runs it."""
    prefill, (port,) = scheduler(), free_ports(1)
    ready, stop = threading.Event(), threading.Event()
    args = ({(0, 0): b"handshake"}, ready, stop, "127.0.0.1", port)
    listener = threading.Thread(target=prefill._nixl_handshake_listener, args=args)
    listener.start()
    assert ready.wait(10)
    yield prefill, port
    stop.set()
    listener.join(10)


def at(port: int, request_id: str = "r", until: float | None = None) -> RemoteMeta:
    return RemoteMeta(([1, 2],), "127.0.0.1", port, "prefill", request_id, until)


def test_prefill_says_that_it_holds_a_hand_off_from_its_end_to_that_of_its_lease(
    listening: tuple[LeaseScheduler, int],
) -> None:
    prefill, port = listening
    assert not is_held(at(port))
    held, params = finish(prefill, "r")
    assert held and is_held(at(port)) and not is_held(at(port, "another"))
    assert params["remote_blocks_expiry_time"] == pytest.approx(time.perf_counter() + LEASE_S, abs=5)
    prefill.update_connector_output(ended("r"))
    assert not is_held(at(port))


def test_a_prefill_that_was_aborted_holds_nothing(listening: tuple[LeaseScheduler, int]) -> None:
    prefill, port = listening
    finish(prefill, "r", RequestStatus.FINISHED_ABORTED)
    assert not is_held(at(port))


def test_a_prefill_that_does_not_answer_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_lease, "ANSWER_S", 0.05)
    (port,) = free_ports(1)
    assert not is_held(at(port))


class FakeNixl:
    """Transfers that are done when they are looked at."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    def check_xfer_state(self, handle: int) -> str:
        return "DONE"

    def get_xfer_telemetry(self, handle: int) -> None: ...

    def release_xfer_handle(self, handle: int) -> None: ...

    def send_notif(self, agent: str, notif_msg: bytes) -> None:
        self.told.append(notif_msg)


CLOCK_AHEAD_S = 1000.0
"""Of prefill before decode."""


class Worker(PullWorker):
    """A decode worker that has just pulled the blocks of request ``d``, which prefill knows as ``r``."""

    def __init__(self, lease_left_s: float | None, clock_error_s: float = 0.001) -> None:
        until = None if lease_left_s is None else time.perf_counter() + CLOCK_AHEAD_S + lease_left_s
        stats = SimpleNamespace(record_transfer=lambda told: None, record_kv_expired_req=lambda: self.late.append(1))
        self.late: list[int] = []
        self.asked: list[str] = []
        self.answer: Future[bool] = Future()
        meta = ReqMeta(([1, 2],), ([1, 2],), 1, remote=at(1, until=until))
        self.__dict__ |= {
            "nixl_wrapper": FakeNixl(),
            "xfer_stats": stats,
            "_lease_s": LEASE_S,
            "_ended": {},
            "consumer_notification_counts_by_req": {},
            "expected_consumer_notifications_by_req": {},
            "_engine_clock_offset": {"prefill": CLOCK_AHEAD_S},
            "_clock_error_s": {"prefill": clock_error_s},
            "_recving_metadata": {"d": meta},
            "_recv_failures": set(),
            "_pulling_since": {"d": time.perf_counter() - 5},
            "_pending_recv_notifs": {"d": [("agent", b"r:1")]},
            "_asked": {},
            "_may_pull": set(),
            "_asking": SimpleNamespace(submit=self._submit),
            "_reqs_to_send": {},
            "_reqs_to_process": set(),
        }
        self.transfers: dict[str, list[int]] = defaultdict(list, {"d": [7]})

    def _submit(self, function: Any, remote: RemoteMeta) -> Future[bool]:
        assert function is is_held
        self.asked.append(remote.request_id)
        return self.answer

    def __del__(self) -> None: ...

    def look(self) -> tuple[set[str], set[str]]:
        return self._pop_done_transfers(self.transfers)


def test_a_pull_that_ended_in_the_lease_is_there_at_once() -> None:
    decode = Worker(lease_left_s=10)
    assert decode.look() == ({"d"}, set())
    assert not decode.asked and not decode._pulling_since


@pytest.mark.parametrize(
    ("lease_left_s", "clock_error_s"), [(-0.1, 0.001), (None, 0.001), (10, 11.0)], ids=["over", "unknown", "bad clock"]
)
def test_a_pull_that_may_be_late_waits_for_what_prefill_says(lease_left_s: float | None, clock_error_s: float) -> None:
    decode = Worker(lease_left_s, clock_error_s)
    assert decode.look() == decode.look() == (set(), set())
    assert decode.asked == ["r"] and "d" in decode.transfers
    decode.answer.set_result(True)
    assert decode.look() == ({"d"}, set())
    assert not decode.transfers and not decode._asked and not decode.late


def test_a_pull_of_blocks_that_prefill_did_not_hold_any_more_is_lost() -> None:
    decode = Worker(lease_left_s=-0.1)
    decode.look()
    decode.answer.set_result(False)
    assert decode.look() == ({"d"}, {"d"})
    assert decode.late and not decode._asked


def test_a_request_that_had_all_blocks_already_asks_nobody() -> None:
    decode = Worker(lease_left_s=-0.1)
    decode._pending_recv_notifs.clear()
    assert decode.look() == ({"d"}, set()) and not decode.asked


@pytest.mark.parametrize("held", [True, False])
def test_a_pull_that_would_begin_late_begins_once_prefill_says_that_it_holds_the_blocks(
    held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(
        pull_worker.NixlPullConnectorWorker, "_read_blocks_for_req", lambda self, req_id, meta: begun.append(req_id)
    )
    decode = Worker(lease_left_s=-0.1)
    decode._remote_agents = {"prefill": {}}
    decode._ready_requests, decode._failed_recv_reqs = queue.Queue(), queue.Queue()
    meta = decode._recving_metadata["d"]
    decode._read_blocks_for_req("d", meta)
    assert decode.asked == ["r"] and not begun
    decode.answer.set_result(held)
    if held:
        decode._read_blocks_for_req(*decode._ready_requests.get_nowait())
        assert begun == ["d"]
    else:
        assert decode._failed_recv_reqs.get_nowait() == "d" and not begun
    assert decode.asked == ["r"] and not decode._may_pull


def test_a_pull_in_the_lease_and_a_notice_without_a_pull_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(
        pull_worker.NixlPullConnectorWorker, "_read_blocks_for_req", lambda self, req_id, meta: begun.append(req_id)
    )
    for decode, blocks in ((Worker(lease_left_s=10), ([1],)), (Worker(lease_left_s=-1), ([],)), (Worker(-1), ())):
        decode._remote_agents = {"prefill": {}}
        decode._recving_metadata["d"].local_block_ids = blocks
        decode._read_blocks_for_req("d", decode._recving_metadata["d"])
        assert not decode.asked
    assert begun == ["d"] * 3


def test_pulls_that_take_long_are_told_by_prefills_id() -> None:
    decode = Worker(lease_left_s=10)
    assert decode.overdue(4) == ["r"] and decode.overdue(6) == []


def test_leases_are_renewed_and_those_that_have_ended_are_told() -> None:
    prefill, now = Worker(lease_left_s=None), time.perf_counter()
    prefill._reqs_to_send |= {"ends soon": now + 1, "long": now + 10 * LEASE_S, "over": now - 1}
    prefill._reqs_to_process |= {"ends soon", "long", "over", "just finished"}
    prefill._reap_expired_send_leases(freed := set())
    assert freed == {"over"}
    assert prefill.renew(["ends soon", "long", "just finished", "over", "pulled"]) == ["over"]
    assert prefill._reqs_to_send["ends soon"] >= now + LEASE_S and prefill._reqs_to_send["long"] == now + 10 * LEASE_S


def test_a_prefill_remembers_so_many_leases_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_lease, "REMEMBERED", 2)
    prefill = Worker(lease_left_s=None)
    for name in ("a", "b", "c"):
        prefill._reqs_to_send[name] = 0.0
        prefill._reqs_to_process.add(name)
        prefill._reap_expired_send_leases(set())
    assert prefill.renew(["a", "b", "c"]) == ["b", "c"]


class Pushing(PushWorker):
    def __init__(self, **state: Any) -> None:
        self.__dict__ |= Worker(lease_left_s=None).__dict__
        self.__dict__ |= {"_posting": threading.Lock(), "_sending_transfers": {}} | state

    def __del__(self) -> None: ...


def test_what_prefill_writes_to_decode_is_held_until_it_is_written() -> None:
    prefill = Pushing(
        _reqs_to_send={"r": 0.0, "waits": 0.0}, _reqs_to_process={"r", "waits"}, _sending_transfers={"r": [7]}
    )
    prefill._reap_expired_send_leases(freed := set())
    assert freed == {"waits"} and prefill._reqs_to_send.keys() == {"r"}
    prefill._sending_transfers.clear()
    prefill._reqs_to_send["r"] = 0.0
    prefill._reap_expired_send_leases(freed)
    assert freed == {"waits", "r"}


def test_prefill_writes_nothing_whose_lease_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        push_worker.NixlPushConnectorWorker, "_xfer_blocks_for_req", lambda self, req_id, meta: written.append(req_id)
    )
    prefill = Pushing(_reqs_to_send={"held": 0.0}, _reqs_to_process={"held"})
    for name in ("held", "over"):
        prefill._xfer_blocks_for_req(name, None)
    assert written == ["held"]


# ---- what kv_lease.py leans on


def test_vllm_names_what_we_override() -> None:
    for name in [
        "_nixl_handshake",
        "_read_blocks_for_req",
        "_read_blocks",
        "_pop_done_transfers",
        "_reap_expired_send_leases",
    ]:
        assert hasattr(pull_worker.NixlPullConnectorWorker, name), f"kv_lease.py PullWorker.{name}"
    handshake = list(inspect.signature(base_worker.NixlBaseConnectorWorker._nixl_handshake).parameters)
    assert handshake[1:5] == ["host", "port", "remote_tp_size", "expected_engine_id"], "kv_lease.py _nixl_handshake"
    read = inspect.getsource(pull_worker.NixlPullConnectorWorker._read_blocks_for_req)
    assert "self._read_blocks(\n                read_spec=spec," in read, "kv_lease.py _read_blocks takes keywords"
    text = inspect.getsource(pull_worker.NixlPullConnectorWorker._read_blocks)
    assert text.count("notif_msg=notif_id") == 2, "kv_lease.py: of a pull, and of none"
    assert 'notif_id = f"{remote_request_id}:{expected_consumers}".encode()' in text, "kv_lease.py _read_blocks"


def test_vllm_writes_in_one_place_and_knows_what_it_writes() -> None:
    worker = push_worker.NixlPushConnectorWorker
    assert "self._xfer_blocks_for_req(" in inspect.getsource(worker._do_start_push_kv), "kv_lease.py PushWorker"
    assert "self._sending_transfers[" in inspect.getsource(worker._xfer_blocks_for_req), "kv_lease.py PushWorker"


def test_vllm_tells_prefill_after_what_we_say_of_a_pull() -> None:
    text = inspect.getsource(base_worker.NixlBaseConnectorWorker.get_transfer_results)
    popped, lost, told = (
        text.index(step) for step in ("_pop_done_transfers(", "_pending_recv_notifs.pop(", "_send_pending_recv_notifs(")
    )
    assert popped < lost < told, "kv_lease.py PullWorker._pop_done_transfers"


def test_vllm_suspects_late_notices_in_these_words() -> None:
    text = inspect.getsource(pull_worker.NixlPullConnectorWorker._get_new_notifs)
    assert '"Potentially invalid KV blocks for "' in text, "kv_lease.py says_what_may_be"


def test_vllm_tells_our_scheduler_before_it_frees_blocks() -> None:
    text = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert text.index("update_connector_output(") < text.index("_free_blocks("), "kv_lease.py LeaseScheduler"


def test_vllm_listens_with_what_we_answer_from() -> None:
    scheduler = base_scheduler.NixlBaseConnectorScheduler
    assert "target=self._nixl_handshake_listener" in inspect.getsource(scheduler.set_xfer_handshake_metadata)
    listener = inspect.getsource(scheduler._nixl_handshake_listener)
    assert "encoded_data[(target_pp_rank, target_tp_rank)]" in listener, "kv_lease.py _Answers"


def test_vllm_asks_workers_by_name_and_tells_of_each_engine() -> None:
    assert not hasattr(WorkerBase, "renew_kv_leases") or WorkerBase.renew_kv_leases is kv_lease.renew_kv_leases
    assert "self.worker" in inspect.getsource(WorkerWrapperBase.__getattr__), "kv_lease.py answer_replica"
    assert list(inspect.signature(AsyncMPClient.call_utility_all_async).parameters) == ["self", "method", "args"]
    collective_rpc = list(inspect.signature(EngineCore.collective_rpc).parameters)
    assert collective_rpc == ["self", "method", "timeout", "args", "kwargs"], "engine.py _ask_workers"


@pytest.mark.parametrize(("bind", "keeps"), [("nobind", True), ("auto", False)])
def test_engine_that_computes_in_its_own_thread_keeps_its_cores(
    bind: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    before = os.sched_getaffinity(0)
    last = {max(before)}
    try:
        with all_cores_kept():
            os.sched_setaffinity(0, last)
        assert os.sched_getaffinity(0) == (before if keeps else last)
    finally:
        os.sched_setaffinity(0, before)
