"""A bounded folder of embeddings that many processes share, on one node or several. Plain files, no server, no vLLM.

::

    <root>/<2 hex>/<62 hex>.safetensors    an item: sha256 of its identifier, which is never trusted as a path
    <root>/tmp/                            files that are being written
    <root>/lock                            locked by the process that evicts; its times are the folder's clock

- A file is written under ``tmp/``, renamed into its place, and never changed after that.
- A process that needs a file holds a shared ``flock`` on it (a pin). Eviction takes an exclusive one first and skips a file
  that is pinned. The kernel drops the pins of a dead process. On NFS, Linux passes ``flock`` to the server; on a file system
  without it only the lease protects.
- The modification time is the last use, by the file server's clock. For ``lease_s`` after that a file is never removed,
  because nobody pins it for a request on its way from the encoder to its consumer. Bounds that are ``strict``, as in memory,
  come before leases.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, Self

TENSOR = "ec_cache"
"""Name of the tensor in the file, the same as in vLLM's ECExampleConnector."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Element types of an embedding by their safetensors names."""

MAX_HEADER_BYTES = 4096

RESERVE_BYTES = 1 << 30
"""Bytes left free, or a tenth of a smaller file system. A full one in memory kills every process with a file mapped there:
Ray's object store, PyTorch, vLLM."""

STALE_TEMPORARY_S = 60.0


class Shape(NamedTuple):
    """An embedding: ``rows`` × ``width`` elements."""

    rows: int
    width: int
    dtype: str

    @property
    def size_bytes(self) -> int:
        return self.rows * self.width * DTYPE_BYTES[self.dtype]


class BrokenItem(Exception):
    """The file is not a whole embedding: truncated, overwritten by something else, or unreadable."""


class Evicted(NamedTuple):
    """What one pass removed, and the bytes of the items that are left."""

    files: int
    size_bytes: int
    left_bytes: int


class OpenItem:
    """An item that is open, whole and pinned: it can be read until ``close``, even if its file is deleted."""

    def __init__(self, fd: int, start: int, shape: Shape) -> None:
        self._fd = fd
        self._start = start
        self.shape = shape

    def read_into(self, memory: memoryview) -> None:
        """Fill ``memory`` with the item's bytes, row by row. Raises ``BrokenItem`` if it is cut short or unreadable."""
        done = 0
        try:
            while done < len(memory):
                got = os.preadv(self._fd, [memory[done:]], self._start + done)
                if not got:
                    raise BrokenItem(f"ends after {done} of {len(memory)} bytes")
                done += got
        except OSError as error:
            raise BrokenItem(str(error)) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


@dataclass
class FolderStore:
    """Every method may be called by any number of processes at once. Writing makes the folders."""

    root: Path
    _: KW_ONLY
    max_bytes: int = 8 << 30
    max_age_s: float = 86_400.0
    lease_s: float = 60.0
    strict: bool = False
    """Whether the bounds come before leases. 50 images of 11 MB per second with leases of a minute are 33 GB."""

    def path(self, identifier: str) -> Path:
        digest = hashlib.sha256(identifier.encode(errors="surrogatepass")).hexdigest()
        return self.root / digest[:2] / f"{digest[2:]}.safetensors"

    def put(self, identifier: str, data: bytes | bytearray | memoryview, shape: Shape) -> int:
        """Write an item, unless a whole one of this shape is there. Returns the bytes of the file, 0 if none was written.

        Raises ``OSError``, and leaves nothing behind, when it cannot be written (disk full). Nothing is synced: ``open``
        finds out about a file that a crash of the machine has cut short.
        """
        if self.shape(identifier) == shape:
            return 0
        header, path = _header(shape), self.path(identifier)
        temporary = self.root / "tmp" / uuid.uuid4().hex
        fd = _create(temporary)
        try:
            try:
                _flock(fd, fcntl.LOCK_EX)  # shows that its writer lives
                _leave_room(fd, shape.size_bytes)
                for part in (header, data):
                    _write(fd, memoryview(part).cast("B"))
            finally:
                os.close(fd)  # before the rename, so that NFS has the data on the server and readers can pin it
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return len(header) + shape.size_bytes

    def open(self, identifier: str) -> OpenItem | None:
        """Pin an item, and count it as used. None: it is not there. Raises ``BrokenItem``.

        Reads the header only. Removes a file that is no embedding, so that it can be written anew.
        """
        path = self.path(identifier)
        for _ in range(3):  # a file that is removed between open and pin may have been written anew
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise BrokenItem(str(error)) from error
            try:
                if not _pin(fd):
                    os.close(fd)
                    continue
                start, shape = _parse(fd)
            except BrokenItem:
                used = os.fstat(fd).st_mtime_ns
                os.close(fd)
                self._remove(path, used)
                raise
            except OSError as error:
                os.close(fd)
                raise BrokenItem(str(error)) from error
            with contextlib.suppress(OSError):  # a consumer may only be allowed to read
                os.utime(fd)
            return OpenItem(fd, start, shape)
        return None

    def shape(self, identifier: str) -> Shape | None:
        """Shape of an item, counted as a use. None: it is not there, or not whole."""
        with contextlib.suppress(BrokenItem):
            if (item := self.open(identifier)) is not None:
                item.close()
                return item.shape
        return None

    # ---- bounds

    def evict(self) -> Evicted | None:
        """Remove items over the bounds, least recently used first; None while another process does so.

        The limit is ``max_bytes``, or half of what would be free without the items if that is less; a pass goes down to nine
        tenths of it, so that the next write needs none. Pinned items always stay, leased ones unless ``strict``. Files that
        dead writers left in ``tmp/`` go too.

        A pass costs one stat per file, about 10 µs on a local disk; ``Evictor`` calls it less often than each write.
        """
        with self._sole() as now:
            if now is None:
                return None
            for used, _, path in _files(self.root / "tmp"):
                if (now - used) / 1e9 >= STALE_TEMPORARY_S:
                    self._remove(path, used)
            items = sorted(item for shard in self.root.glob("??") for item in _files(shard))
            left = sum(size for _, size, _ in items)
            most = min(self.max_bytes, (left + shutil.disk_usage(self.root).free) // 2)
            target = most if left <= most else most * 9 // 10
            files = size_bytes = 0
            for used, size, path in items:
                idle = (now - used) / 1e9
                leased = idle < self.lease_s and not (self.strict and left > most)
                if leased or (left <= target and idle <= self.max_age_s):
                    break  # and so are all later ones
                if self._remove(path, used):
                    left -= size
                    files += 1
                    size_bytes += size
            return Evicted(files, size_bytes, left)

    @contextlib.contextmanager
    def _sole(self) -> Iterator[int | None]:
        """The folder's time in ns for the one process that may evict; None for others."""
        fd = _create(self.root / "lock", exclusive=False)
        try:
            if not _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield None
                return
            os.utime(fd)
            yield os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)

    def _remove(self, path: Path, used: int) -> bool:
        """Remove a file that nobody pins, if it was last used at ``used`` (ns)."""
        try:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS gives exclusive locks to writers only
            except PermissionError:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            ours, there = os.fstat(fd), os.stat(path)
            if ours.st_ino != there.st_ino or ours.st_mtime_ns != used:
                return False
            os.unlink(path)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)


class Evictor:
    """Evicts in its own thread, each time this process has written a twentieth of the budget, and once a minute.

    So ``n`` writing processes can exceed the budget by ``n`` twentieths, and many writes share the cost of one pass.
    """

    def __init__(self, store: FolderStore) -> None:
        self._store = store
        self._written = 0
        self._lock = threading.Lock()
        self._files = self._bytes = 0
        self._left: int | None = None
        self._wake = threading.Event()
        self._closed = False
        self._interval_s = min(60.0, max(1.0, store.max_age_s / 10)) * random.uniform(0.8, 1.2)
        self._thread = threading.Thread(target=self._run, name="ec-evict", daemon=True)
        self._thread.start()

    def wrote(self, size_bytes: int) -> None:
        self._written += size_bytes
        if self._written >= self._store.max_bytes // 20:
            self.now()

    def now(self) -> None:
        """Start a pass without waiting for it."""
        self._written = 0
        self._wake.set()

    def take(self) -> tuple[int, int, int | None]:
        """Files and bytes removed since the last call, and the bytes of the folder if they were counted since."""
        with self._lock:
            taken = self._files, self._bytes, self._left
            self._files, self._bytes, self._left = 0, 0, None
        return taken

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # the disk may be away; the next pass tries again
                done = self._store.evict()
                if done is not None:
                    with self._lock:
                        self._files += done.files
                        self._bytes += done.size_bytes
                        self._left = done.left_bytes
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._closed:
                return


# ---- files


def _create(path: Path, exclusive: bool = True) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0), 0o666)


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    """Last use in ns, bytes, and path of each file in a folder."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
    return found


def _leave_room(fd: int, size_bytes: int) -> None:
    """Raise ``OSError`` if so many more bytes would fill the file system."""
    of = os.statvfs(fd)
    if of.f_bavail * of.f_frsize - size_bytes < min(RESERVE_BYTES, of.f_blocks * of.f_frsize // 10):
        raise OSError(errno.ENOSPC, "too little would be left free on the file system")


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _flock(fd: int, operation: int) -> bool:
    """Whether this process has the lock, or the file system has no locks."""
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
            raise
    return True


def _pin(fd: int) -> bool:
    """Pin an open file; False if it has been removed. An eviction holds its lock for microseconds."""
    for _ in range(50):
        if _flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB):
            return os.fstat(fd).st_nlink > 0
        time.sleep(0.001)
    return False


def _header(shape: Shape) -> bytes:
    """The header of a safetensors file with one tensor."""
    tensor = {"dtype": shape.dtype, "shape": [shape.rows, shape.width], "data_offsets": [0, shape.size_bytes]}
    text = json.dumps({TENSOR: tensor}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse(fd: int) -> tuple[int, Shape]:
    """Offset of the elements, and their shape. Raises ``BrokenItem`` unless the file is exactly one whole embedding."""
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise BrokenItem("has no header")
    try:
        header = json.loads(os.pread(fd, length, 8))
        tensor = header[TENSOR]
        rows, width = tensor["shape"]
        shape, offsets = Shape(rows, width, tensor["dtype"]), tensor["data_offsets"]
        whole = type(rows) is type(width) is int and rows >= 0 and width >= 0 and offsets == [0, shape.size_bytes]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenItem(f"has a header that is not an embedding's: {error}") from error
    if not whole or header.keys() - {TENSOR, "__metadata__"}:
        raise BrokenItem("has a header that is not an embedding's")
    if size != 8 + length + shape.size_bytes:
        raise BrokenItem(f"has {size} bytes instead of {8 + length + shape.size_bytes}")
    return 8 + length, shape
