"""The workers' half of ``SharedFolderECConnector``, and what the scheduler's half sends it with each step.

On CUDA nothing here waits for the card. Loads copy from pinned memory on the model's stream: PyTorch records an event with
each copy and reuses the memory only after it. Saves copy to pinned memory on the same stream, and a thread of
``ec_writer.py`` waits for their events.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
from vllm.distributed.parallel_state import get_pcp_group, get_tensor_model_parallel_rank, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.platform_utils import is_pin_memory_available

from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_writer import Staged, Writer

logger = init_logger("vllm." + __name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def host_memory(shape: Shape) -> torch.Tensor:
    """Uninitialized host memory for an embedding.

    It is pinned where this process copies it to a card: such a copy is asynchronous and direct, and PyTorch keeps the memory
    for the next items. A scheduler with workers in other processes must not initialize CUDA: a context takes 0.4 GiB.
    """
    pinned = torch.cuda.is_initialized() and is_pin_memory_available()
    return torch.empty((shape.rows, shape.width), dtype=DTYPES[shape.dtype], pin_memory=pinned)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


@dataclass
class Load:
    """An embedding that the scheduler sends to the workers.

    It is a tensor, because vLLM's queue to workers in other processes (``shm_broadcast.py``) sends a tensor's memory beside
    the pickled step. Bytes would travel inside it, at 8 ms per 11 MB.
    """

    shape: Shape
    data: torch.Tensor | None
    """None: zeros, for a request that has failed."""

    def on(self, device: str) -> torch.Tensor:
        if self.data is None:
            return torch.zeros((self.shape.rows, self.shape.width), dtype=DTYPES[self.shape.dtype], device=device)
        with gpu_sync_allowed():  # the memory of a queue may be unpinned
            return self.data.to(device, non_blocking=True)


@dataclass
class StepMetadata(ECConnectorMetadata):
    loads: dict[str, Load] = field(default_factory=dict)
    writes: set[str] = field(default_factory=set)
    """Items that an encoder's cache holds and the folder does not."""
    writer: Writer | None = None
    """The scheduler's writer, which a reply waits for; None for workers in other processes."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"writer": None}


class FolderWorker:
    """Moves embeddings between the folder and the encoder cache of one worker. ``step`` is the running step's metadata."""

    def __init__(self, store: FolderStore, prefix: str) -> None:
        self._prefix = prefix
        self._writes = is_first_rank()
        self._writer = Writer(store)
        """Writes the items of steps whose scheduler is another process."""

    def load(self, encoder_cache: dict[str, torch.Tensor], step: StepMetadata) -> None:
        device = this_device()
        for identifier, load in step.loads.items():
            encoder_cache[identifier] = load.on(device)

    def save(self, encoder_cache: dict[str, torch.Tensor], identifier: str, step: StepMetadata) -> None:
        """Begin to write an item. A failure is logged and fails no step: the encoder's reply leaves the item out."""
        if not self._writes:
            return
        writer = step.writer or self._writer
        try:
            tensor = encoder_cache[identifier].detach()
            rows, width = tensor.shape
            shape = Shape(rows, width, DTYPE_NAMES[tensor.dtype])
            writer.write(self._prefix + identifier, shape, partial(staged, tensor, shape))
        # The disk hangs; not two-dimensional; not of floats; the writer is closed.
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            logger.error("Could not write the embedding of item %s: %s", identifier, error)

    def end_step(self, step: StepMetadata) -> None:
        """Wait for files where the scheduler is another process: it may reply when the step ends, and cannot wait itself."""
        if step.writer is None:
            self._writer.wait()

    def close(self) -> None:
        self._writer.close()


def is_first_rank() -> bool:
    """All ranks of a tensor (and prefill context) parallel group hold the same embeddings, so only the first one writes."""
    if not model_parallel_is_initialized():
        return True
    return bool(get_tensor_model_parallel_rank() == 0 and get_pcp_group().rank_in_group == 0)


def this_device() -> str:
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    if current_platform.is_cuda_alike():  # a bare "cuda" would be the first card for every worker
        device = f"{device}:{current_platform.current_device()}"
    return device


def staged(tensor: torch.Tensor, shape: Shape) -> Staged:
    """The bytes of an embedding on the host: the tensor's own there, else those of an asynchronous copy.

    The copy runs on the model's stream, so nothing overwrites what it reads; 11 MB take half a millisecond of it.
    """
    if tensor.is_cpu:
        return bytes_of(tensor.contiguous()), None
    memory = host_memory(shape)
    if not memory.is_pinned():
        with gpu_sync_allowed():
            return bytes_of(memory.copy_(tensor)), None
    memory.copy_(tensor, non_blocking=True)
    copied = torch.Event(blocking=True)  # its waiter sleeps
    copied.record()
    return bytes_of(memory), copied.synchronize
