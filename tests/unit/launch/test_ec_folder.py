"""Where embeddings lie when no folder is named."""

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch import ec_folder
from serve_app.launch.ec_folder import Folder, folder_of, make_folder, remove_folder, room_in_memory
from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_users import Users

GIB = 1 << 30
NAME = f"epd-ec-cache-{os.getuid()}"
DISK = Path(tempfile.gettempdir()) / NAME


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared memory of a machine, which has 64 GiB of it."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(ec_folder, "SHARED_MEMORY", folder)
    monkeypatch.setattr(ec_folder, "CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "limit_in_bytes"))
    has(monkeypatch, shared=32, memory=64)
    return folder


def has(monkeypatch: pytest.MonkeyPatch, *, shared: float, memory: float, free: float = 0) -> None:
    """Let the machine have so many GiB."""
    blocks, left = int(shared * GIB) // 4096, int(free * GIB) // 4096
    size = os.statvfs_result((4096, 4096, blocks, left, left, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: size)
    pages = {"SC_PHYS_PAGES": int(memory * GIB) // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


@pytest.mark.parametrize(
    ("shared", "total", "ec", "max_gib"),
    [
        (32, 64, {}, 8),
        (8, 16, {}, 4),
        (2, 4, {}, 1),
        (32, 64, {"max_bytes": 16 * GIB}, 16),
        (32, 16, {}, 4),
    ],
    ids=["large", "small", "least", "all that is asked for", "more shared than a quarter of all"],
)
def test_folder_is_in_memory_where_there_is_room(
    memory: Path, monkeypatch: pytest.MonkeyPatch, shared: int, total: int, ec: dict[str, Any], max_gib: int
) -> None:
    has(monkeypatch, shared=shared, memory=total)
    assert folder_of(EPDConfig(ec=ec)) == Folder(memory / NAME, max_gib * GIB, True)


@pytest.mark.parametrize(
    ("shared", "ec", "max_gib"),
    [
        (1 / 16, {}, 8),
        (32, {"max_bytes": 17 * GIB}, 17),
        (32, {"connector": "ECExampleConnector"}, 8),
    ],
    ids=["a container's", "more is asked for", "nothing would ever be removed"],
)
def test_folder_is_on_disk_where_there_is_not(
    memory: Path, monkeypatch: pytest.MonkeyPatch, shared: float, ec: dict[str, Any], max_gib: int
) -> None:
    has(monkeypatch, shared=shared, memory=64)
    assert folder_of(EPDConfig(ec=ec)) == Folder(DISK, max_gib * GIB, False)


@pytest.mark.parametrize(("limit", "room"), [(str(8 * GIB), 2), ("max", 16), (str(1 << 63), 16)])
@pytest.mark.parametrize("version", [0, 1])
def test_container_takes_its_part_of_what_it_may_have(memory: Path, limit: str, room: int, version: int) -> None:
    ec_folder.CGROUP_LIMITS[version].write_text(limit + "\n")
    assert room_in_memory() == room * GIB


def test_machine_without_shared_memory_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec_folder, "SHARED_MEMORY", Path("/no/such/folder"))
    assert room_in_memory() == 0


def test_what_is_free_counts_for_nothing(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of a node decide at different times."""
    found = []
    for free in (32, 0):
        has(monkeypatch, shared=32, memory=64, free=free)
        found.append(folder_of(EPDConfig()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "keys",
    [{"ec": {"storage_path": "/named"}}, {"advanced": {"ec": {"extra_config": {"shared_storage_path": "/named"}}}}],
    ids=["key", "extra config"],
)
def test_named_folder_is_taken(memory: Path, keys: dict[str, Any]) -> None:
    assert folder_of(EPDConfig(**keys)) == Folder(Path("/named"), 8 * GIB, False)


def test_folder_that_nobody_named_is_its_users_alone(memory: Path) -> None:
    for _ in range(2):
        make_folder(EPDConfig())
        assert stat.S_IMODE((memory / NAME).stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["another's", "link"])
def test_folder_that_another_has_laid_out_is_refused(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "link":
        (memory / NAME).symlink_to(tmp_path)
    else:
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(ConfigError, match=r"`ec\.storage_path`.*another user's"):
        make_folder(EPDConfig())


def test_named_folder_is_made_with_its_parents_and_stays(tmp_path: Path) -> None:
    config = EPDConfig(ec={"storage_path": tmp_path / "a" / "b"})
    make_folder(config)
    FolderStore(tmp_path / "a" / "b").put("A", bytes(24), Shape(2, 3, "F32"))
    remove_folder(config)
    assert (tmp_path / "a" / "b").is_dir()


def test_folder_in_memory_is_removed_when_nobody_uses_it(memory: Path) -> None:
    make_folder(EPDConfig())
    users = Users(memory / NAME)
    remove_folder(EPDConfig())
    assert (memory / NAME).exists()
    users.close()
    remove_folder(EPDConfig())
    assert not (memory / NAME).exists()
