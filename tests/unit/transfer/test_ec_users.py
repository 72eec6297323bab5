"""A folder in memory goes with the last who uses it, and never under one who does."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_users import NAME, Users, remove_unused


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "ec"


def test_last_to_leave_removes_the_folder(root: Path) -> None:
    users = [Users(root), Users(root)]
    FolderStore(root).put("A", bytes(24), Shape(2, 3, "F32"))
    users[0].close()
    users[0].close()
    assert FolderStore(root).shape("A") is not None
    users[1].close()
    assert not root.exists()


def test_nobody_else_can_read_it(root: Path) -> None:
    users = Users(root)
    assert (root.stat().st_mode & 0o777, (root / NAME).stat().st_mode & 0o777) == (0o700, 0o600)
    users.close()


@pytest.mark.parametrize("by", ["its replica", "the next"])
def test_folder_of_one_that_is_killed_is_removed_later(root: Path, by: str) -> None:
    program = (
        f"import pathlib as p; from serve_app.transfer.ec_users import Users; u = Users(p.Path({str(root)!r})); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", f"{program}"], stdin=subprocess.PIPE)
    while not (root / NAME).exists():
        assert other.poll() is None
        os.sched_yield()
    other.kill()
    other.communicate()
    assert root.exists()
    remove_unused(root) if by == "its replica" else Users(root).close()
    assert not root.exists()


def test_folder_in_use_is_left_alone(root: Path) -> None:
    users = Users(root)
    remove_unused(root)
    assert root.exists()
    users.close()


@pytest.mark.parametrize("files", [0, 1])
def test_folder_that_never_had_users_is_removed_only_if_it_is_empty(root: Path, files: int) -> None:
    """Its engine did not start; or it is something else."""
    root.mkdir()
    for index in range(files):
        (root / str(index)).touch()
    remove_unused(root)
    assert root.exists() is bool(files)


def test_who_comes_while_the_last_one_removes_has_a_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, came, remove = Users(root), [], shutil.rmtree
    newcomer = threading.Thread(target=lambda: came.append(Users(root)))

    def remove_late(path: Path, ignore_errors: bool) -> None:
        newcomer.start()
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_late)
        last.close()
    newcomer.join()
    assert (root / NAME).exists()
    came[0].close()
    assert not root.exists()
