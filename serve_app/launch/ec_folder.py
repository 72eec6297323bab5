"""Where the embeddings of ``SharedFolderECConnector`` lie if no folder is named: in memory if there is room, else on disk.

Every replica decides by itself, and all on one node have to come to the same end. So nothing counts here that changes, as
what is free does. What is free bounds the folder while it is in use (``FolderStore``).
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
"""Less room than for 95 images of 1080p of a small model is not worth it."""

CGROUP_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""What a container may take, version 2 and 1. Files in memory count."""


class Folder(NamedTuple):
    path: Path
    max_bytes: int
    in_memory: bool
    """Its bounds come before leases, and it is removed when nobody uses it any more."""


def folder_of(config: EPDConfig) -> Folder:
    """The folder of a config, on this node. On several nodes it has to be named, and shared.

    Of a connector that removes nothing (``ECExampleConnector``) it is never in memory.
    """
    ec = config.ec
    max_bytes = ec.folder_bytes
    if (named := ec.storage_path or config.advanced.ec.extra_config.get("shared_storage_path")) is not None:
        return Folder(Path(named), max_bytes, False)
    name = f"epd-ec-cache-{os.getuid()}"
    room = room_in_memory()
    if ec.connector == "SharedFolderECConnector" and room >= (ec.max_bytes or LEAST_BYTES):
        return Folder(SHARED_MEMORY / name, min(max_bytes, room), True)
    return Folder(Path(tempfile.gettempdir()) / name, max_bytes, False)


def make_folder(config: EPDConfig) -> None:
    """Make the folder of a config. One that was not named lies where every user of the machine may write, and is this user's
    alone. Raises ``ConfigError`` if it is not."""
    path = folder_of(config).path
    if path.name != f"epd-ec-cache-{os.getuid()}":
        path.mkdir(parents=True, exist_ok=True)
        return
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"`ec.storage_path`: {path} is another user's: name a folder of your own")


def remove_folder(config: EPDConfig) -> None:
    """Remove the folder of a config if it lies in memory and no engine uses it: an engine that is killed has not."""
    folder = folder_of(config)
    if folder.in_memory:
        remove_unused(folder.path)


def room_in_memory() -> int:
    """Bytes that the folder may take of this node's memory: half of the shared part, and a quarter of all that we may have.

    The rest is for who else keeps things there: Ray's object store, vLLM's queues.
    """
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    shared = os.statvfs(SHARED_MEMORY)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none; it is "max"
            limits.append(int(path.read_text()))
    return min(shared.f_blocks * shared.f_frsize // 2, min(limits) // 4)
