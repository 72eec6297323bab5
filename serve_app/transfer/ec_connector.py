"""``SharedFolderECConnector``: embeddings move between engines as files in a bounded folder that all of them share.

vLLM loads it through ``ec_connector_module_path``. Encoders write the files and keep the folder within its bounds; every
engine reads. ``ec_store.py`` says how files are named, pinned and evicted, ``ec_worker.py`` what the workers do. The rest of
this file is the scheduler's half.

A missing or broken file fails only the requests that need it, with vLLM's finish reason ``error``; a retry encodes the item
again. A worker that cannot load has no way to fail a request, because vLLM reads its report after it has handed out the
tokens of that step (``Scheduler.update_from_output``). So the *scheduler's* half reads the files and passes their bytes to
the workers with the step. In the order in which vLLM calls:

1. ``ensure_cache_available``, before a request is scheduled, opens, checks and pins the file of each item that is still to
   be read. The request fails here if one is deleted, truncated or of the wrong shape. Pins last as long as the request.
2. ``has_cache_item``, while it is scheduled, reads the bytes. If that fails and there is nothing to encode from, the request
   is *spoiled*.
3. ``update_state_after_alloc`` gives the bytes to the workers with this step. A spoiled request gets zeros, so that the step
   itself survives; vLLM is told to drop the request's output, and it fails at the end of the step.

A consumer's answer is ``{READ_S: seconds}``, the time that reading the files of that request took.

A consumer needs no file for an item in its own encoder cache. An encoder does, because others will look for it. So an
encoder also *loads* an item that it finds in the folder, and writes an item again that it has and the folder has lost.

Threads write the files (``ec_writer.py``). ``request_finished``, which makes an encoder's reply, waits for its items' files.
Workers in other processes end a step when their files are written.

Contract with vLLM 0.32.0: ``test_ec_connector.py`` and ``tests/contracts``.
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


@dataclass
class Pin:
    """An item that live requests need."""

    shape: Shape
    file: OpenItem | None
    """None: this process has too many files open; the item's lease protects it, and it is opened again to be read."""
    requests: set[str]
    data: torch.Tensor | None = None
    """Bytes that were read and not sent, because vLLM had no KV blocks for the request."""


def weights_of(model_config: Any, version: str) -> str:
    """Prefix of the store's keys: what an embedding depends on besides its item's hash, which covers the model's name.

    It names the engine's ``version`` (``launch.fingerprint``, which covers overrides of the model's config), precision and
    revision, as a folder outlives a deployment.
    """
    commit = getattr(model_config.hf_config, "_commit_hash", None)
    named = repr((version, model_config.revision, commit))
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
        self._worker = FolderWorker(self._store, self._prefix)
        schedules = role is ECConnectorRole.SCHEDULER
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
        self._held: dict[str, bool] = {}
        """Items in the engine's own encoder cache. False: zeros of a spoiled request, to be replaced before other use."""
        self._encoded: set[str] = set()
        self._lost: set[str] = set()
        self._spoiled: set[tuple[str, str]] = set()
        self._request: Any = None
        self._widths: dict[str, int] = {}

    def shutdown(self) -> None:
        files = [pin.file for pin in self._pins.values()]
        for part in (self._worker, self._evictor, self._writer, *files, self._users):
            if part is not None:
                part.close()
        self._pins.clear()

    # ---- worker side

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._worker.load(encoder_cache, self._metadata())

    def start_save_caches(self, **kwargs: Any) -> None:
        encoder_cache = kwargs["encoder_cache"]
        self._worker.load(encoder_cache, self._metadata())
        for identifier in self._metadata().writes:
            if identifier in encoder_cache:  # else it is encoded in this step, and saved then
                self.save_caches(encoder_cache, identifier)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        if self.is_producer:
            self._worker.save(encoder_cache, mm_hash, self._metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        self._worker.end_step(self._metadata())
        return None, None

    def _metadata(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    # ---- scheduler side, in the order of vLLM's calls

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False, and the request fails, when an item is still to be read and has neither a file nor pixels."""
        if request.request_id in self._lost:  # vLLM fails it at the end of a step, and may schedule another first
            return False
        self._request = request
        first_time = request.request_id not in self._pinned_by
        for feature in request.mm_features:
            identifier = feature.identifier
            to_be_read = feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
            held = self._held.get(identifier)
            if not to_be_read or held:
                if self.is_consumer and first_time:
                    # A preempted request reads its items once more; a file that is gone now does not fail it.
                    self._pin(request, feature, count=False)
                if to_be_read and self._is_to_be_written(feature):
                    self._step.writes.add(identifier)
                    self._encoded.add(identifier)
                continue
            if held is False:
                if self._read(request, feature):
                    self._send(identifier)
                    continue
            elif self._pin(request, feature) or self._can_encode(feature):
                continue
            self._fail(request, feature)
            return False
        return True

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the item is loaded instead of encoded. vLLM asks this for the request of ``ensure_cache_available``."""
        features = self._request.mm_features if self._request is not None else ()
        feature = next((feature for feature in features if feature.identifier == identifier), None)
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
            self._held[identifier] = True
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
        """An encoder replies with its items whose file is there, a consumer with the seconds that reading took.

        Waits for files that are being written. The card runs the next step meanwhile if vLLM schedules asynchronously.
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
            if files:
                self._stats.add("evicted", files)
                self._stats.add(f"{BYTES}evicted", size_bytes)
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
        """Whether the bytes of an item are in memory, after reading them if needed."""
        pin = self._pin(request, feature)
        if pin is None or pin.data is not None:
            return pin is not None
        file = pin.file or self._open(feature.identifier)
        if file is None:
            return False
        try:
            if file.shape != pin.shape:
                return False
            began = time.perf_counter()
            data = host_memory(pin.shape)
            file.read_into(bytes_of(data))
            pin.data = data
            took = time.perf_counter() - began
            self._stats.loaded_in(took)
            self._read_s[request.request_id] = self._read_s.get(request.request_id, 0.0) + took
            return True
        except BrokenItem as error:
            self._broken(feature.identifier, error)
            return False
        finally:
            if file is not pin.file:
                file.close()

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
        """Shape of an item in the folder, counted as a use; None: no file that fits."""
        shape = self._store.shape(self._prefix + feature.identifier)
        return shape if shape is not None and self._fits(shape, feature) else None

    def _fits(self, shape: Shape, feature: Any) -> bool:
        """Whether a file is this item's and this model's by its shape. DeepStack packs several widths into one row."""
        rows = feature.mm_position.get_num_embeds()
        return shape.rows == rows and shape.width > 0 and shape.width % self._item_width == 0

    def _is_to_be_written(self, feature: Any) -> bool:
        """Whether an item in this encoder's cache has neither a file nor a thread that writes one."""
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
        """Give the bytes of an item to the workers, with the only reference to them."""
        pin = self._pins[identifier]
        assert pin.data is not None
        self._step.loads[identifier] = Load(pin.shape, pin.data)
        pin.data = None
        self._held[identifier] = True
        self._stats.add("loaded")
        self._stats.add(f"{BYTES}loaded", pin.shape.size_bytes)

    def _fail(self, request: Any, feature: Any) -> None:
        self._lost.add(request.request_id)
        self._stats.add("missing")
        logger.warning("Request %s fails: the embedding of item %s is lost", request.request_id, feature.identifier)

    def _spoil(self, request: Any, feature: Any) -> None:
        """Run the step, which is already scheduled, on zeros, without a result for the request.

        ``Scheduler.update_from_output`` drops its output, as that of a stale request after a reset of the prefix cache, and
        fails the requests that ``take_unavailable_requests`` names at the end of the step.
        """
        width = self._widths.get(feature.modality, self._item_width)
        shape = Shape(feature.mm_position.get_num_embeds(), width, self._dtype)
        self._step.loads[feature.identifier] = Load(shape, None)
        self._held[feature.identifier] = False
        request.drop_stale_output = True
        request.num_stale_output_tokens = 1 << 62  # more than a request can have in flight
        self._fail(request, feature)

    def _can_encode(self, feature: Any) -> bool:
        """Whether the item came with an encoder's input, and not only with the fields that positions need."""
        if feature.data is None:
            return False
        positional = self._metadata_resolver.fields_for(feature.modality)
        return any(key not in positional and not field.field.keep_on_cpu for key, field in feature.data.items())
