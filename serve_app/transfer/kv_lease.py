"""Decode uses KV blocks only if prefill still held them when the pull had ended, on top of vLLM's NIXL pull connector.

Prefill's engine holds the blocks of a hand-off for a lease (``advanced.kv.lease_s``); then it frees them, and another prompt
overwrites them. vLLM's decode pulls at any later time and does not notice. Here

- prefill tells with each hand-off when its lease ends, and on NIXL's side channel whether it still holds a hand-off;
- decode pulls, uses what it has pulled, and tells prefill to free the blocks only if it knows that they are held: by
  prefill's clock the lease has not ended, as is usual, or prefill says so before the pull and again after it. A pull of
  blocks that were not held counts as lost;
- a hand-off that waits for decode has its lease renewed (``renew_kv_leases``, called through ``ingress.pipeline``).

So no freeze, queue or clock can make a wrong answer: a lease that is too short costs a second prefill.

Runs in the engine's processes; depends on vLLM 0.32.0's ``nixl/{pull_scheduler,pull_worker,base_worker}.py``.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import pull_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, RemoteMeta, ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.utils.network_utils import make_zmq_path
from vllm.v1.worker.worker_base import WorkerBase

ANSWER_S = 5.0
"""Seconds for prefill to say whether it holds a hand-off, the same as vLLM's for a handshake."""

HELD = "epd-held"

REMEMBERED = 10_000
"""Number of ended leases to remember. Decode finds out about older ones after the pull."""


def says_what_may_be(record: logging.LogRecord) -> bool:
    """Drop vLLM's warning that decode may use the blocks of an ended lease: here decode gives them up."""
    return not record.msg.startswith("Potentially invalid KV blocks")


class _Answers(dict[tuple[Any, Any], bytes]):
    """Answers of vLLM's listener: its handshakes by rank, and ours by ``(HELD, request id)``."""

    def __init__(self, handshakes: dict[tuple[int, int], bytes], held: set[str]) -> None:
        super().__init__(handshakes)
        self._held = held

    def __missing__(self, key: tuple[Any, Any]) -> bytes:
        if key[0] != HELD:
            raise KeyError(key)
        return b"yes" if key[1] in self._held else b"no"


class LeaseScheduler(NixlPullConnectorScheduler):
    """Prefill's side: knows which hand-offs hold their blocks, and answers decode about them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: set[str] = set()

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        held, params = super().request_finished(request, block_ids)
        if held and params is not None:
            self._held.add(request.request_id)
            params["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
        return held, params

    def update_connector_output(self, connector_output: Any) -> None:
        """vLLM calls this before it frees the blocks of hand-offs that were sent or whose lease has ended."""
        self._held.difference_update(connector_output.finished_sending or ())
        super().update_connector_output(connector_output)

    def _nixl_handshake_listener(self, encoded_data: dict[tuple[int, int], bytes], *args: Any) -> None:
        NixlPullConnectorScheduler._nixl_handshake_listener(_Answers(encoded_data, self._held), *args)


def is_held(remote: RemoteMeta) -> bool:
    """Ask prefill whether it holds the blocks of a hand-off now. False where it does not answer."""
    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", remote.host, remote.port)) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(ANSWER_S * 1000))
        try:
            socket.send(msgspec.msgpack.encode((GET_META_MSG, HELD, remote.request_id)))
            return bool(socket.recv_multipart()[0] == b"yes")
        except zmq.ZMQError:
            return False


@contextmanager
def all_cores_kept() -> Iterator[None]:
    """On a CPU, vLLM's worker leaves the thread that makes it on the last core of each NUMA node: it takes for granted that
    OpenMP threads are bound to others, and compute there. Where none are bound this thread computes, and all engines would
    share that core."""
    before = os.sched_getaffinity(0)
    yield
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
        os.sched_setaffinity(0, before)


class Leases(NixlBaseConnectorWorker):
    """Prefill's side in a worker of either connector: renews leases, and remembers which have ended."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        self._lease_s = float(vllm_config.kv_transfer_config.get_from_extra_config("kv_lease_duration", 30))
        self._ended: dict[str, None] = {}
        with all_cores_kept():
            super().__init__(vllm_config, *args)

    def renew(self, request_ids: Iterable[str]) -> list[str]:
        """Restart leases. Returns those of the hand-offs whose leases have ended, without those that decode has pulled."""
        until = time.perf_counter() + self._lease_s
        for request_id in request_ids:
            if (ends := self._reqs_to_send.get(request_id)) is not None:
                self._reqs_to_send[request_id] = max(ends, until)
        return [request_id for request_id in request_ids if request_id in self._ended]

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        held = set(self._reqs_to_send)
        super()._reap_expired_send_leases(done_sending)
        self._ended.update(dict.fromkeys(held - self._reqs_to_send.keys()))
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]


class PushWorker(Leases, NixlPushConnectorWorker):
    """Prefill's side where it pushes: it holds the blocks that it writes to decode until they are written."""

    def __init__(self, *args: Any) -> None:
        self._posting = threading.Lock()
        super().__init__(*args)

    def _xfer_blocks_for_req(self, req_id: str, meta: Any) -> None:
        """Runs in the writer's thread, which learns late that a lease has ended."""
        with self._posting:
            if req_id in self._reqs_to_send or req_id in self._reqs_to_process:
                super()._xfer_blocks_for_req(req_id, meta)

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        with self._posting:
            self.renew(list(self._sending_transfers))
            super()._reap_expired_send_leases(done_sending)


class PullWorker(Leases, NixlPullConnectorWorker):
    """Decode's side: a pull is done once prefill is known to have held its blocks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._clock_error_s: dict[str, float] = {}
        self._pulling_since: dict[str, float] = {}
        self._may_pull: set[str] = set()
        self._asked: dict[str, Future[bool]] = {}
        self._asking = ThreadPoolExecutor(4, thread_name_prefix="epd-kv-lease")
        pull_worker.logger.addFilter(says_what_may_be)
        make_transfer = self.nixl_wrapper.make_prepped_xfer

        def quiet(*args: Any, notif_msg: bytes = b"", **kwargs: Any) -> Any:
            """``_read_blocks`` tells prefill of a pull, so NIXL does not when it ends."""
            return make_transfer(*args, **kwargs)

        self.nixl_wrapper.make_prepped_xfer = quiet

    def _nixl_handshake(self, host: str, port: int, tp_size: int, engine_id: str, *args: Any) -> Any:
        """Time the handshake, which bounds the error of vLLM's estimate of prefill's clock from its shortest round trip."""
        began = time.perf_counter()
        result = super()._nixl_handshake(host, port, tp_size, engine_id, *args)
        self._clock_error_s[engine_id] = time.perf_counter() - began
        return result

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        """Pull only held blocks. Another pull might never end: on the CPU an idle prefill engine answers none."""
        remote = meta.remote
        sure = req_id in self._may_pull or not any(meta.local_block_ids)
        if sure or remote.engine_id not in self._remote_agents or self._in_time(remote):
            self._may_pull.discard(req_id)
            super()._read_blocks_for_req(req_id, meta)
            return

        def answered(held: Future[bool]) -> None:
            """Continue as vLLM does after a handshake."""
            if held.result():
                self._may_pull.add(req_id)
                self._ready_requests.put((req_id, meta))
            else:
                self._failed_recv_reqs.put(req_id)

        self._asking.submit(is_held, remote).add_done_callback(answered)

    def _read_blocks(self, **read: Any) -> bool:
        """Note what vLLM tells prefill when the request counts as received, and drops when it is lost."""
        began = bool(super()._read_blocks(**read))
        if began and any(read["read_spec"].local_block_ids):
            request_id, agents = read["request_id"], self._remote_agents[read["dst_engine_id"]]
            self._pulling_since.setdefault(request_id, time.perf_counter())
            if not self._mixed_mem_types:  # else vLLM has noted it
                told = f"{read['remote_request_id']}:{read['expected_consumers']}".encode()
                notes = self._pending_recv_notifs.setdefault(request_id, [])
                notes.append((agents[(0, read["read_spec"].remote_rank)], told))
        return began

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """Finished pulls that are known to be good or bad. The others stay, to be looked at again."""
        done, failed = super()._pop_done_transfers(transfers)
        for request_id in done - failed - self._recv_failures:
            held = self._was_held(request_id)
            if held is None:
                done.discard(request_id)
                transfers[request_id] = []
            elif not held:
                failed.add(request_id)
                self.xfer_stats.record_kv_expired_req()
        for request_id in done:
            self._pulling_since.pop(request_id, None)
            self._asked.pop(request_id, None)
        return done, failed

    def _was_held(self, request_id: str) -> bool | None:
        """Whether prefill held a request's blocks until its pull had ended; None: prefill has not answered yet."""
        meta = self._recving_metadata.get(request_id)
        if meta is None or request_id not in self._pending_recv_notifs:
            return True  # nothing was pulled
        if request_id not in self._asked:
            if self._in_time(meta.remote):
                return True
            self._asked[request_id] = self._asking.submit(is_held, meta.remote)
        answer = self._asked[request_id]
        return answer.result() if answer.done() else None

    def _in_time(self, remote: RemoteMeta) -> bool:
        """Whether the hand-off's first lease surely lasts, at the largest error of the estimate of prefill's clock."""
        if remote.blocks_expiry_time is None:
            return False
        offset_s, error_s = self._engine_clock_offset[remote.engine_id], self._clock_error_s[remote.engine_id]
        return bool(time.perf_counter() + offset_s + error_s < remote.blocks_expiry_time)

    def overdue(self, seconds: float) -> list[str]:
        """Prefill's ids of the hand-offs whose pulls have taken longer than this so far."""
        since = time.perf_counter() - seconds
        late = [self._recving_metadata.get(ours) for ours, began in self._pulling_since.items() if began < since]
        return [meta.remote.request_id for meta in late if meta is not None and meta.remote is not None]

    def shutdown(self) -> None:
        self._asking.shutdown(wait=False, cancel_futures=True)
        super().shutdown()


def renew_kv_leases(_: WorkerBase, request_ids: list[str]) -> list[str]:
    return _worker().renew(request_ids)


def overdue_kv_pulls(_: WorkerBase, seconds: float) -> list[str]:
    worker = _worker()
    return worker.overdue(seconds) if isinstance(worker, PullWorker) else []


def answer_replica() -> None:
    """Give vLLM's worker the methods that its replica calls by ``collective_rpc``. vLLM takes one ``worker_extension_cls``,
    which is the user's."""
    for method in (renew_kv_leases, overdue_kv_pulls):
        setattr(WorkerBase, method.__name__, method)


def _worker() -> Leases:
    connector: Any = get_kv_transfer_group()
    worker: Leases = connector.connector_worker
    return worker
