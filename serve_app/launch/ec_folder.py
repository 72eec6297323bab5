"""The folder of ``SharedFolderECConnector`` where none is named: in memory if there is room, else on disk.

Each replica decides alone, and all on one node must agree. So only constants of the node count here; its free memory bounds
the folder while it is in use (``FolderStore``).
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.transfer.ec_users import remove_unused

SHARED_MEMORY = Path("/dev/shm")

LEAST_BYTES = 1 << 30
"""Least useful room in memory: 95 images of 1080p of a small model."""

CGROUP_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Memory limits of a container, version 2 and 1. Files in memory count."""


class Folder(NamedTuple):
    path: Path
    max_bytes: int
    in_memory: bool
    """Then its bounds come before leases, and its last user removes it."""


def folder_of(config: EPDConfig) -> Folder:
    """The folder of a config on this node. It is never in memory for ``ECExampleConnector``, which removes nothing."""
    ec, max_bytes = config.ec, config.ec.folder_bytes
    if (named := ec.storage_path or config.advanced.ec.extra_config.get("shared_storage_path")) is not None:
        return Folder(Path(named), max_bytes, False)
    name = f"epd-ec-cache-{os.getuid()}"
    if ec.connector == "SharedFolderECConnector" and (room := room_in_memory()) >= (ec.max_bytes or LEAST_BYTES):
        return Folder(SHARED_MEMORY / name, min(max_bytes, room), True)
    return Folder(Path(tempfile.gettempdir()) / name, max_bytes, False)


def make_folder(config: EPDConfig) -> None:
    """Make the folder of a config. Raises ``ConfigError`` if one that was not named is another user's."""
    path = folder_of(config).path
    if path.name != f"epd-ec-cache-{os.getuid()}":
        path.mkdir(parents=True, exist_ok=True)
        return
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"`ec.storage_path`: {path} is another user's: name a folder of your own")


def remove_folder(config: EPDConfig) -> None:
    """Remove the folder of a config if it lies in memory and no engine uses it, as after a killed engine."""
    folder = folder_of(config)
    if folder.in_memory:
        remove_unused(folder.path)


def room_in_memory() -> int:
    """Bytes for the folder: at most half of the node's shared memory, and a quarter of the memory that we may have.

    Ray's object store and vLLM's queues need the rest.
    """
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    shared = os.statvfs(SHARED_MEMORY)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            limits.append(int(path.read_text()))
    return min(shared.f_blocks * shared.f_frsize // 2, min(limits) // 4)
