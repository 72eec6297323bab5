"""Who uses a folder of embeddings that lies in memory: the last user removes it.

Its files would hold memory until the machine restarts. Each engine holds a shared lock while it lives. The kernel drops the
lock of a killed engine, whose replica then removes the folder. If the replica is killed too, the next replica removes it.
"""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

NAME = "users"


class Users:
    """One process's use of a folder, until ``close``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fd = self._enter()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            remove_unused(self._root)

    def _enter(self) -> int:
        self._root.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                self._root.mkdir(mode=0o700)
            try:
                fd = os.open(self._root / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # removed in between
                continue
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits while the last user removes the folder
            if os.fstat(fd).st_nlink:
                return fd
            os.close(fd)


def remove_unused(root: Path) -> None:
    """Remove a folder that had users and has none, or that is empty."""
    try:
        fd = os.open(root / NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # nobody has used it, or it is gone
        with contextlib.suppress(OSError):
            root.rmdir()
        return
    with os.fdopen(fd), contextlib.suppress(BlockingIOError):  # others use it
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(root, ignore_errors=True)
