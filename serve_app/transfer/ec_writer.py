"""Threads write embeddings into the folder, so that an engine's thread waits for files only before it replies.

Otherwise it would stop for each file: 5 ms for an image of 1080p of a small model in memory, longer on a disk. With
asynchronous scheduling the next step runs on the card meanwhile.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serve_app.transfer.ec_store import FolderStore, Shape

logger = logging.getLogger("vllm." + __name__)

THREADS = 2
"""One writes 2 GB/s into memory at best; models whose images take 67 MB each need more at 50 images/s."""

IN_FLIGHT_BYTES = 256 << 20
"""Bytes of items whose file is not written yet. On cards they lie in pinned memory, which PyTorch sizes in powers of two."""

PATIENCE_S = 10.0
"""Seconds that an engine's thread waits for a disk that hangs."""

Staged = tuple[memoryview, Callable[[], object] | None]
"""The bytes of an item, and a function that returns once they are complete; None: they are."""


class Writer:
    """Writes items, each under its key in the store. A failed write is logged, and leaves no file."""

    def __init__(self, store: FolderStore, max_bytes: int = IN_FLIGHT_BYTES) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ec-write")  # starts none before the first item
        self._sizes: dict[str, int] = {}
        """Bytes of the items that are being written, by key."""
        self._done = threading.Condition()

    def is_writing(self, key: str) -> bool:
        return key in self._sizes

    def write(self, key: str, shape: Shape, stage: Callable[[], Staged]) -> None:
        """Begin to write an item, unless that has begun. ``stage`` is called here, once there is room for its bytes.

        Raises ``TimeoutError`` when there is no room for ``PATIENCE_S``.
        """
        with self._done:
            if key in self._sizes:
                return
            if not self._done.wait_for(lambda: self._has_room(shape.size_bytes), PATIENCE_S):
                raise TimeoutError(f"{len(self._sizes)} items before it are not written in {PATIENCE_S:g} s")
            self._sizes[key] = shape.size_bytes
        try:
            data, ready = stage()
            self._pool.submit(self._put, key, data, shape, ready)
        except BaseException:
            self._finish(key)
            raise

    def wait(self, *keys: str) -> None:
        """Wait, for ``PATIENCE_S`` at most, until these items are written or have failed. No keys: all items."""
        with self._done:
            self._done.wait_for(lambda: not any(key in self._sizes for key in keys or self._sizes), PATIENCE_S)

    def close(self) -> None:
        """Wait for the files that are half written, and drop the others."""
        self._pool.shutdown(cancel_futures=True)

    def _has_room(self, size_bytes: int) -> bool:
        """An item larger than the limit is written alone."""
        return not self._sizes or sum(self._sizes.values()) + size_bytes <= self._max_bytes

    def _put(self, key: str, data: memoryview, shape: Shape, ready: Callable[[], object] | None) -> None:
        try:
            if ready is not None:
                ready()
            self._store.put(key, data, shape)
        except Exception as error:  # the disk is full, or the card has failed, which the engine's thread sees too
            logger.error("Could not write the embedding of item %s: %s", key, error)
        finally:
            self._finish(key)

    def _finish(self, key: str) -> None:
        with self._done:
            del self._sizes[key]
            self._done.notify_all()
