"""``SharedFolderECConnector``: embeddings move between engines as files in a bounded folder that all of them share.

Loaded by vLLM through ``ec_connector_module_path``; runs on any device and with both model runners. Encoders write the
files and keep the folder within its bounds; every engine reads. How files are named, pinned and evicted: ``ec_store.py``.
What the workers do is in ``ec_worker.py``; the rest of this file is the scheduler's half.

Whatever happens to a file fails only the requests that need it, with vLLM's finish reason ``error``: send them again and
the item is encoded again. To that end the *scheduler's* half reads the files and passes their bytes to the workers with
the step. A worker that cannot load has no way to fail a request: what it reports arrives after vLLM has handed out the
tokens of that step (``Scheduler.update_from_output``). In the order in which vLLM calls:

1. ``ensure_cache_available``, before a request is scheduled: open, check and pin the file of each item that is still to be
   read. Deleted, truncated, wrong shape: the request fails here. Pins last as long as the request.
2. ``has_cache_item``, while it is scheduled: read the bytes. Should they fail us now, with nothing to encode from, the
   request is *spoiled*.
3. ``update_state_after_alloc``: the bytes go to the workers with this step. For a spoiled request zeros go, so that the step
   itself survives; vLLM is told to drop the request's output, and it fails at the end of the step.

A consumer's answer is ``{READ_S: seconds}``, what reading the files of that request took.

What the engine's own encoder cache holds needs no file on a consumer. On an encoder it does: others are about to look for
it. So an encoder also *loads* an item that it finds in the folder, and writes again what it has and the folder has lost.

Files are written by threads (``ec_writer.py``). ``request_finished``, which makes an encoder's reply, waits for those of its
items. Workers in other processes end a step when they are written.

Contract with vLLM 0.32.0: ``test_ec_connector.py``, and ``tests/contracts``.
"""

import hashlib
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.logger import init_logger

from serve_app.handoff.types import READ_S, VERSION_KEY
from serve_app.transfer.ec_metrics import BYTES, FOLDER_BYTES, SharedFolderPromMetrics, SharedFolderStats
from serve_app.transfer.ec_store import BrokenItem, Evictor, FolderStore, OpenItem, Shape
from serve_app.transfer.ec_users import Users
from serve_app.transfer.ec_worker import DTYPE_NAMES, FolderWorker, Load, StepMetadata, bytes_of, host_memory
from serve_app.transfer.ec_writer import Writer

logger = init_logger("vllm." + __name__)

STALE_FOR_GOOD = 1 << 62
"""More tokens than a request can have in flight."""


@dataclass
class Pin:
    """An item that live requests need."""

    shape: Shape
    file: OpenItem | None
    """None: this process has too many files open; the item's lease protects it, and it is opened again to be read."""
    requests: set[str]
    data: torch.Tensor | None = None
    """Read, and not yet on its way: vLLM had no KV blocks for the request after all."""


@dataclass
class Held:
    """An item in the engine's own encoder cache. The scheduler's half is not shown that cache, but every change of it."""

    shape: Shape | None
    """None: encoded here."""
    good: bool = True
    """False: it holds the zeros of a spoiled request, and must be loaded over before anyone else uses it."""


def weights_of(model_config: Any, version: str) -> str:
    """What an embedding depends on besides its item's hash, in which vLLM has the model's name: the engine's ``version``, as
    its replica tells it (``launch.fingerprint``), precision and revision. A folder outlives a deployment."""
    commit = getattr(model_config.hf_config, "_commit_hash", None)
    named = repr((version, model_config.revision, commit, model_config.hf_overrides))
    return f"{model_config.dtype}:{hashlib.sha256(named.encode()).hexdigest()[:16]}:"


class SharedFolderECConnector(ECConnectorBase):
    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        bounds = {key: extra[key] for key in ("max_bytes", "max_age_s", "lease_s") if key in extra}
        in_memory = bool(extra.get("in_memory"))
        self._store = FolderStore(Path(extra["shared_storage_path"]), strict=in_memory, **bounds)
        self._prefix = weights_of(vllm_config.model_config, extra.get(VERSION_KEY, ""))
        self._item_width = vllm_config.model_config.get_inputs_embeds_size()
        self._dtype = DTYPE_NAMES.get(vllm_config.model_config.dtype, "F32")
        self._metadata_resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        schedules = role is ECConnectorRole.SCHEDULER
        self._worker = None if schedules else FolderWorker(self._store, self._prefix)
        self._users = Users(self._store.root) if schedules and in_memory else None
        self._evictor = Evictor(self._store) if schedules and self.is_producer else None
        self._writer = Writer(self._store) if schedules and self.is_producer else None
        self._stats = SharedFolderStats()
        self._step = StepMetadata(writer=self._writer)
        self._pins: dict[str, Pin] = {}
        self._pinned_by: dict[str, set[str]] = {}
        self._read_s: dict[str, float] = {}
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_files = 4096 if files == resource.RLIM_INFINITY else min(4096, files // 4)
        self._held: dict[str, Held] = {}
        self._encoded: set[str] = set()
        self._lost: set[str] = set()
        self._spoiled: set[tuple[str, str]] = set()
        self._request: Any = None
        self._widths: dict[str, int] = {}

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._evictor is not None:
            self._evictor.close()
        if self._writer is not None:
            self._writer.close()
        for pin in self._pins.values():
            if pin.file is not None:
                pin.file.close()
        self._pins.clear()
        if self._users is not None:
            self._users.leave()

    # ---- worker side

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._workers_half.load(encoder_cache, self._metadata())

    def start_save_caches(self, **kwargs: Any) -> None:
        encoder_cache = kwargs["encoder_cache"]
        self._workers_half.load(encoder_cache, self._metadata())
        for identifier in self._metadata().writes:
            if identifier in encoder_cache:  # else it is encoded in this step, and saved then
                self.save_caches(encoder_cache, identifier)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        if self.is_producer:
            self._workers_half.save(encoder_cache, mm_hash, self._metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        self._workers_half.end_step(self._metadata())
        return None, None

    @property
    def _workers_half(self) -> FolderWorker:
        assert self._worker is not None
        return self._worker

    def _metadata(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    # ---- scheduler side, in the order of vLLM's calls

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False, and the request fails, when an item that is still to be read can be had from nowhere."""
        if request.request_id in self._lost:  # vLLM fails it at the end of a step, and may schedule another first
            return False
        self._request = request
        first_time = request.request_id not in self._pinned_by
        for feature in request.mm_features:
            identifier = feature.identifier
            to_be_read = feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
            held = self._held.get(identifier)
            if not to_be_read or (held is not None and held.good):
                if self.is_consumer and first_time:
                    # If the request is preempted, its items are read once more. Not its fault if they are gone now.
                    self._pin(request, feature, count=False)
                if to_be_read and self._is_to_be_written(feature):
                    self._step.writes.add(identifier)
                    self._encoded.add(identifier)
                continue
            if held is not None:
                if self._read(request, feature):
                    self._send(identifier)
                    continue
            elif self._pin(request, feature) or self._can_encode(feature):
                continue
            self._fail(request, feature)
            return False
        return True

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the item is loaded and not encoded. vLLM asks for items of the request that it asked about last."""
        feature = self._feature(identifier)
        if feature is None:
            return self._store.shape(self._prefix + identifier) is not None
        if self._read(self._request, feature):
            return True
        if self._can_encode(feature):
            return False
        self._spoiled.add((self._request.request_id, identifier))
        return True

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        feature = request.mm_features[index]
        identifier = feature.identifier
        pin = self._pins.get(identifier)
        if (request.request_id, identifier) in self._spoiled:
            self._spoil(request, feature)
        elif pin is not None and pin.data is not None:
            self._send(identifier)
        else:
            self._held[identifier] = Held(None)
            if self.is_producer:
                self._encoded.add(identifier)
            self._stats.add("encoded")

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        for identifier in scheduler_output.free_encoder_mm_hashes:
            self._held.pop(identifier, None)
            self._step.loads.pop(identifier, None)
            self._step.writes.discard(identifier)
        step, self._step = self._step, StepMetadata(writer=self._writer)
        self._spoiled.clear()
        self._request = None
        return step

    def take_unavailable_requests(self) -> set[str]:
        lost, self._lost = self._lost, set()
        return lost

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """An encoder's reply: its items, without those whose file is not there. A consumer's: what reading took.

        Waits for files under way, as an answer names only what can be read. The card is busy with the next step meanwhile if
        vLLM schedules asynchronously.
        """
        for identifier in self._pinned_by.pop(request.request_id, ()):
            self._unpin(identifier, request.request_id)
        read_s = self._read_s.pop(request.request_id, None)
        if self._writer is None:
            return False, {READ_S: read_s} if read_s else None
        self._writer.wait(*(self._prefix + feature.identifier for feature in request.mm_features))
        items = collect_ec_item_metadata(request.mm_features, self._metadata_resolver)
        there = {feature.identifier for feature in request.mm_features if self._is_published(feature)}
        return False, {identifier: item for identifier, item in items.items() if identifier in there} or None

    def get_ec_connector_stats(self) -> SharedFolderStats | None:
        if self._evictor is not None:
            files, size_bytes, left = self._evictor.take()
            for name, count in (("evicted", files), (f"{BYTES}evicted", size_bytes)):
                if count:
                    self._stats.add(name, count)
            if left is not None:
                self._stats.data[FOLDER_BYTES] = left
        if self.role is not ECConnectorRole.SCHEDULER or self._stats.is_empty():
            return None
        stats, self._stats = self._stats, SharedFolderStats()
        return stats

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> SharedFolderStats:
        return SharedFolderStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        return SharedFolderPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- files

    def _pin(self, request: Any, feature: Any, count: bool = True) -> Pin | None:
        """Pin the item of a request. None: there is no file that fits it."""
        identifier = feature.identifier
        pins = self._pinned_by.setdefault(request.request_id, set())
        pin = self._pins.get(identifier)
        if pin is None:
            file = self._open(identifier, count)
            if file is None:
                return None
            pin = Pin(file.shape, file, set())
        if not self._fits(pin.shape, feature):
            if count:
                self._stats.add("broken")
            if not pin.requests and pin.file is not None:
                pin.file.close()
            return None
        if identifier not in self._pins and len(self._pins) >= self._max_files and pin.file is not None:
            pin.file.close()
            pin.file = None
        self._widths[feature.modality] = pin.shape.width
        self._pins[identifier] = pin
        pin.requests.add(request.request_id)
        pins.add(identifier)
        return pin

    def _unpin(self, identifier: str, request_id: str) -> None:
        pin = self._pins[identifier]
        pin.requests.discard(request_id)
        if not pin.requests:
            del self._pins[identifier]
            if pin.file is not None:
                pin.file.close()

    def _read(self, request: Any, feature: Any) -> bool:
        """Whether the bytes of an item are at hand, to be sent."""
        pin = self._pin(request, feature)
        if pin is None:
            return False
        if pin.data is None:
            file = pin.file or self._open(feature.identifier)
            try:
                if file is None or file.shape != pin.shape:
                    return False
                began = time.perf_counter()
                data = host_memory(pin.shape)
                file.read_into(bytes_of(data))
                pin.data = data
                took = time.perf_counter() - began
                self._stats.loaded_in(took)
                self._read_s[request.request_id] = self._read_s.get(request.request_id, 0.0) + took
            except BrokenItem as error:
                self._broken(feature.identifier, error)
                return False
            finally:
                if file is not None and file is not pin.file:
                    file.close()
        return True

    def _open(self, identifier: str, count: bool = True) -> OpenItem | None:
        try:
            return self._store.open(self._prefix + identifier)
        except BrokenItem as error:
            if count:
                self._broken(identifier, error)
            return None

    def _broken(self, identifier: str, error: BrokenItem) -> None:
        self._stats.add("broken")
        logger.warning("The file of item %s is broken: %s", identifier, error)

    def _shape(self, feature: Any) -> Shape | None:
        """What the folder has for an item, counted as a use; None: nothing that fits."""
        shape = self._store.shape(self._prefix + feature.identifier)
        return shape if shape is not None and self._fits(shape, feature) else None

    def _fits(self, shape: Shape, feature: Any) -> bool:
        """A whole file can still be another item's, or another model's. DeepStack packs several widths into one row."""
        rows = feature.mm_position.get_num_embeds()
        return shape.rows == rows and shape.width > 0 and shape.width % self._item_width == 0

    def _is_to_be_written(self, feature: Any) -> bool:
        """Whether an item that this encoder holds has neither a file nor a thread that writes one."""
        if self._writer is None or self._writer.is_writing(self._prefix + feature.identifier):
            return False
        return self._shape(feature) is None

    def _is_published(self, feature: Any) -> bool:
        """Whether others can load an item that this engine was asked to encode. Counts what it wrote."""
        shape = self._shape(feature)
        if self._evictor is not None and feature.identifier in self._encoded:
            self._encoded.discard(feature.identifier)
            if shape is None:  # the disk may be full
                self._evictor.now()
            else:
                self._evictor.wrote(shape.size_bytes)
                self._stats.add(f"{BYTES}written", shape.size_bytes)
        return shape is not None

    # ---- requests

    def _send(self, identifier: str) -> None:
        """Give the bytes of an item to the workers, and with them the only reference."""
        pin = self._pins[identifier]
        assert pin.data is not None
        self._step.loads[identifier] = Load(pin.shape, pin.data)
        pin.data = None
        self._held[identifier] = Held(pin.shape)
        self._stats.add("loaded")
        self._stats.add(f"{BYTES}loaded", pin.shape.size_bytes)

    def _fail(self, request: Any, feature: Any) -> None:
        self._lost.add(request.request_id)
        self._stats.add("missing")
        logger.warning("Request %s fails: the embedding of item %s is lost", request.request_id, feature.identifier)

    def _spoil(self, request: Any, feature: Any) -> None:
        """Let a step that cannot be stopped any more run on zeros, without a result for the request.

        ``Scheduler.update_from_output`` drops the output of a request that is stale and to be dropped, as after a reset of
        the prefix cache; at the end of the step it fails the requests that ``take_unavailable_requests`` names.
        """
        identifier = feature.identifier
        held = self._held.get(identifier)
        known = held.shape.width if held is not None and held.shape is not None else None
        width = known or self._widths.get(feature.modality) or self._item_width
        self._step.loads[identifier] = Load(Shape(feature.mm_position.get_num_embeds(), width, self._dtype), None)
        self._held[identifier] = Held(None, good=False)
        request.drop_stale_output = True
        request.num_stale_output_tokens = STALE_FOR_GOOD
        self._fail(request, feature)

    def _feature(self, identifier: str) -> Any | None:
        features = self._request.mm_features if self._request is not None else ()
        return next((feature for feature in features if feature.identifier == identifier), None)

    def _can_encode(self, feature: Any) -> bool:
        """Whether the item came with what an encoder reads, and not only with the fields that positions need."""
        if feature.data is None:
            return False
        positional = self._metadata_resolver.fields_for(feature.modality)
        return any(key not in positional and not field.field.keep_on_cpu for key, field in feature.data.items())
