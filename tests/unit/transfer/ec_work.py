"""Work on a folder of embeddings: ``python -m tests.unit.transfer.ec_work write|read|evict|pin|begin FOLDER``.

Says ``ready``, and goes on when it is written to. ``write`` runs its rounds, ``read`` and ``evict`` until their input ends;
then they say how many items they wrote, read or removed. ``pin`` and ``begin`` hold an item, or a half-written file.
"""

import fcntl
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from serve_app.transfer.ec_store import FolderStore, Shape, _create

SHAPE = Shape(64, 64, "F32")
NAMES = [f"item-{index}" for index in range(8)]
MAX_BYTES = 3 * SHAPE.size_bytes


def content(name: str) -> bytes:
    return (name.encode() * SHAPE.size_bytes)[: SHAPE.size_bytes]


CONTENTS = {name: content(name) for name in NAMES}


def write(store: FolderStore) -> int:
    return sum(bool(store.put(name, CONTENTS[name], SHAPE)) for _ in range(100) for name in NAMES)


def read(store: FolderStore) -> int:
    """Each item must be whole and its own, whatever happens to the folder meanwhile."""
    found = 0
    for name in NAMES:
        item = store.open(name)
        if item is not None:
            with item:
                data = bytearray(SHAPE.size_bytes)
                item.read_into(memoryview(data))
                assert data == CONTENTS[name]
            found += 1
    return found


def evict(store: FolderStore) -> int:
    done = store.evict()
    return 0 if done is None else done.files


def until_input_ends(job: Callable[[FolderStore], int], store: FolderStore) -> int:
    count = job(store)
    while not select.select([sys.stdin], [], [], 0)[0]:
        count += job(store)
    return count


def main(job: str, folder: str) -> None:
    store = FolderStore(Path(folder), max_bytes=MAX_BYTES, lease_s=0)
    if job == "pin":
        held = store.open(NAMES[0])
        assert held is not None
    elif job == "begin":
        fcntl.flock(_create(store.root / "tmp" / "half"), fcntl.LOCK_EX)
    print("ready", flush=True)
    os.read(0, 1)
    if job == "write":
        print(write(store), flush=True)
    elif job in ("read", "evict"):
        print(until_input_ends(read if job == "read" else evict, store), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
