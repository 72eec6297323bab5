"""A folder that is whole for every reader, bounded, and never short of what somebody pins."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.transfer import ec_store
from serve_app.transfer.ec_store import BrokenItem, Evictor, FolderStore, OpenItem, Shape
from tests.unit.transfer.ec_work import CONTENTS, MAX_BYTES, NAMES

SHAPE = Shape(2, 3, "F32")
DATA = bytes(range(24))
FILE_BYTES = 96
"""Of an item of this shape, with its header."""


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "ec", lease_s=0)


def read(store: FolderStore, name: str) -> bytes | None:
    item = store.open(name)
    if item is None:
        return None
    with item:
        return content(item)


def content(item: OpenItem) -> bytes:
    data = bytearray(item.shape.size_bytes)
    item.read_into(memoryview(data))
    return bytes(data)


def files(store: FolderStore) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.is_file() and path.name != "lock")


def last_used(store: FolderStore, name: str, seconds_ago: float) -> None:
    now = os.stat(store.path(name)).st_mtime
    os.utime(store.path(name), (now - seconds_ago, now - seconds_ago))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_file_stays_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


# ---- one item


def test_item_comes_back_as_it_was_written(store: FolderStore) -> None:
    assert store.put("A", DATA, SHAPE) == FILE_BYTES == store.path("A").stat().st_size
    item = store.open("A")
    assert item is not None
    with item:
        assert (item.shape, content(item)) == (SHAPE, DATA)
    assert store.shape("A") == SHAPE
    assert files(store) == [store.path("A")]  # nothing beside it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_file_is_one_that_safetensors_reads(store: FolderStore, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    name = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    store.put("A", memoryview(tensor.flatten().view(torch.uint8).numpy()), Shape(2, 3, name))
    assert torch.equal(safetensors.torch.load_file(store.path("A"))["ec_cache"], tensor)


def test_item_of_no_elements_is_an_item(store: FolderStore) -> None:
    store.put("A", b"", Shape(0, 3, "F32"))
    assert read(store, "A") == b""


def test_file_that_safetensors_wrote_is_an_item(store: FolderStore) -> None:
    store.path("A").parent.mkdir(parents=True)
    safetensors.torch.save_file({"ec_cache": torch.ones(2, 3)}, store.path("A"), metadata={"by": "hand"})
    assert store.shape("A") == SHAPE


def test_what_was_never_written_is_not_there_and_makes_no_folder(store: FolderStore) -> None:
    assert store.open("A") is None
    assert not store.root.exists()


@given(
    name=st.text(max_size=300) | st.sampled_from(["../../x", "/etc/passwd", "..", "", "a/b", "\0", "\ud800", "lock"])
)
@settings(max_examples=200, deadline=None)
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    root = Path("/nowhere/ec")
    path = FolderStore(root).path(name)
    assert path.parent.parent == root
    assert len(path.parent.name) == 2 and set(path.parent.name + path.stem) <= set("0123456789abcdef")
    assert path == FolderStore(root).path(name)


@settings(deadline=None)
@given(names=st.lists(st.text(max_size=20), min_size=2, max_size=2, unique=True))
def test_two_names_are_two_files(names: list[str]) -> None:
    assert len({FolderStore(Path("/x")).path(name) for name in names}) == 2


def test_item_that_is_there_is_not_written_again(store: FolderStore) -> None:
    store.put("A", DATA, SHAPE)
    inode = store.path("A").stat().st_ino
    assert store.put("A", DATA, SHAPE) == 0
    assert store.path("A").stat().st_ino == inode


def test_item_of_another_shape_is_written_over_and_its_readers_keep_theirs(store: FolderStore) -> None:
    store.put("A", DATA, SHAPE)
    old = store.open("A")
    assert old is not None
    with old:
        store.put("A", DATA[:8], Shape(1, 4, "F16"))
        assert store.shape("A") == Shape(1, 4, "F16")
        assert content(old) == DATA


def test_write_that_fails_leaves_nothing(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.put("A", DATA, SHAPE)
    assert files(store) == []


# ---- broken files


@pytest.mark.parametrize("size", range(FILE_BYTES))
def test_truncated_file_is_broken_and_makes_way(store: FolderStore, size: int) -> None:
    store.put("A", DATA, SHAPE)
    os.truncate(store.path("A"), size)
    with pytest.raises(BrokenItem):
        store.open("A")
    assert store.open("A") is None
    store.put("A", DATA, SHAPE)
    assert read(store, "A") == DATA


def test_longer_file_is_broken(store: FolderStore) -> None:
    store.put("A", DATA, SHAPE)
    with store.path("A").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BrokenItem, match="97 bytes instead of 96"):
        store.open("A")


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_anything_else_is_broken(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        store.path("A").parent.mkdir()
        store.path("A").write_bytes(data)
        with pytest.raises(BrokenItem):
            store.open("A")


@pytest.mark.parametrize(
    "header",
    [
        '{"ec_cache":{"dtype":"I64","shape":[2,3],"data_offsets":[0,48]}}',
        '{"ec_cache":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[2.0,3],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[true,6],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[-2,-3],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}',
        '{"ec_cache":{"dtype":["F32"],"shape":[2,3],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":null,"data_offsets":[0,24]}}',
        '{"other":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
        '{"ec_cache":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"more":{}}',
        "[1]",
        '"ec_cache"',
        "[" * 3000,
    ],
)
def test_header_of_something_else_is_broken(store: FolderStore, header: str) -> None:
    store.path("A").parent.mkdir(parents=True)
    store.path("A").write_bytes(len(header).to_bytes(8, "little") + header.encode() + DATA)
    with pytest.raises(BrokenItem):
        store.open("A")


def test_file_that_is_cut_while_it_is_pinned_is_broken_when_it_is_read(store: FolderStore) -> None:
    store.put("A", DATA, SHAPE)
    item = store.open("A")
    assert item is not None
    with item:
        os.truncate(store.path("A"), FILE_BYTES - 1)
        with pytest.raises(BrokenItem, match="ends after 23 of 24"):
            content(item)


def test_folder_in_the_place_of_a_file_is_broken(store: FolderStore) -> None:
    store.path("A").mkdir(parents=True)
    with pytest.raises(BrokenItem):
        store.open("A")


# ---- bounds


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, max_bytes=4 * FILE_BYTES, lease_s=0)
    for age, name in enumerate("EDCBA"):
        store.put(name, DATA, SHAPE)
        last_used(store, name, 100 - 10 * age)
    assert read(store, "E") == DATA  # a use
    done = store.evict()
    assert done == (2, 2 * FILE_BYTES, 3 * FILE_BYTES)  # down to nine tenths
    assert [name for name in "ABCDE" if store.shape(name)] == ["A", "B", "E"]


def test_nothing_goes_within_the_bounds(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, max_bytes=2 * FILE_BYTES, lease_s=0)
    store.put("A", DATA, SHAPE)
    store.put("B", DATA, SHAPE)
    assert store.evict() == (0, 0, 2 * FILE_BYTES)


def test_what_nobody_used_for_long_goes_without_need(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, max_age_s=50, lease_s=0)
    for name, age in (("A", 60), ("B", 40)):
        store.put(name, DATA, SHAPE)
        last_used(store, name, age)
    assert store.evict() == (1, FILE_BYTES, FILE_BYTES)
    assert store.open("A") is None


def test_lease_goes_before_every_bound(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, max_bytes=1, max_age_s=1, lease_s=30)
    for name, age in (("A", 40), ("B", 20)):
        store.put(name, DATA, SHAPE)
        last_used(store, name, age)
    assert store.evict() == (1, FILE_BYTES, FILE_BYTES)
    assert store.shape("B") == SHAPE


def test_pinned_item_stays_until_the_last_pin_goes(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, max_bytes=1, lease_s=0)
    store.put("A", DATA, SHAPE)
    first, second = store.open("A"), store.open("A")
    assert first is not None and second is not None
    last_used(store, "A", 10)
    assert store.evict() == (0, 0, FILE_BYTES)
    first.close()
    assert store.evict() == (0, 0, FILE_BYTES)
    second.close()
    assert store.evict() == (1, FILE_BYTES, 0)


@pytest.mark.parametrize("anew", [False, True])
def test_item_that_goes_between_open_and_pin_is_not_there(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """A pin on a file that has no name any more would protect nobody else's."""
    store.put("A", DATA, SHAPE)
    pin, calls = ec_store._pin, []

    def late(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            store.path("A").unlink()
            if anew:
                store.put("A", DATA[:8], Shape(1, 2, "F32"))
        return pin(fd)

    monkeypatch.setattr(ec_store, "_pin", late)
    assert store.shape("A") == (Shape(1, 2, "F32") if anew else None)


def test_item_that_is_used_while_others_look_for_prey_stays(store: FolderStore) -> None:
    store.put("A", DATA, SHAPE)
    last_used(store, "A", 10)
    seen = store.path("A").stat().st_mtime_ns
    assert store.shape("A")
    assert not store._remove(store.path("A"), seen)
    assert store.shape("A")


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "use", "pin", "unpin", "evict"]), st.sampled_from("ABCDEFG")), max_size=40
    ),
    room=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_folder_holds_what_a_model_of_it_holds(steps: list[tuple[str, str]], room: int) -> None:
    """Against a list of names, the least recently used first."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = FolderStore(Path(folder), max_bytes=room * FILE_BYTES, max_age_s=1e12, lease_s=0)
        used: list[str] = []
        pins: dict[str, OpenItem] = {}
        clock = 0

        def use(name: str) -> None:
            nonlocal clock
            clock += 1
            used[:] = [*(other for other in used if other != name), name]
            os.utime(store.path(name), (clock, clock))  # a clock that has no ties

        for step, name in steps:
            if step == "put":
                assert bool(store.put(name, DATA, SHAPE)) == (name not in used)
                use(name)
            elif step == "evict":
                if len(used) > room:
                    for other in list(used):
                        if len(used) * FILE_BYTES <= room * FILE_BYTES * 9 // 10:
                            break
                        if other not in pins:
                            used.remove(other)
                done = store.evict()
                assert done is not None and done.left_bytes == len(used) * FILE_BYTES
            elif step == "unpin":
                if name in pins:
                    pins.pop(name).close()
            else:
                item = store.open(name)
                assert (item is not None) == (name in used)
                if item is not None:
                    use(name)
                    if step == "pin" and name not in pins:
                        pins[name] = stack.enter_context(item)
                    content(item)
                    if pins.get(name) is not item:
                        item.close()
            assert set(Path(folder).rglob("*.safetensors")) == {store.path(other) for other in used}


def test_files_of_dead_writers_go_and_those_of_the_living_stay(store: FolderStore) -> None:
    path = store.root / "tmp" / "half"
    with running("begin", store.root) as writer:
        os.utime(path, (1, 1))
        store.evict()
        assert path.exists()
        writer.kill()
        writer.wait()
        store.evict()
        assert not path.exists()


def test_file_used_at_the_very_time_of_the_pass_is_as_old_as_it_can_be(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the clock of a folder has ticks of some milliseconds. In floats, one time of eight comes out after itself."""
    store.max_bytes = 0
    utime, tick = os.utime, 1_764_113_333_000_000_000
    for ns in range(tick, tick + 10**9, 23_456_789):
        store.put("A", DATA, SHAPE)
        utime(store.path("A"), ns=(ns, ns))
        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", lambda lock, ns=ns: utime(lock, ns=(ns, ns)))
            assert store.evict() == (1, FILE_BYTES, 0)


def test_young_file_in_the_making_stays(store: FolderStore) -> None:
    path = store.root / "tmp" / "young"
    path.parent.mkdir(parents=True)
    path.touch()  # before its writer has locked it
    store.evict()
    assert path.exists()


def test_files_of_others_are_left_alone(store: FolderStore) -> None:
    store.max_bytes = 0
    other = store.root / "an-item-of-vllms-own-connector" / "encoder_cache.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(DATA)
    os.utime(other, (1, 1))
    store.evict()
    assert other.exists()


# ---- processes


@contextlib.contextmanager
def running(job: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of ``ec_work.py`` that has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.transfer.ec_work", job, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def test_pins_of_a_killed_process_go_with_it(store: FolderStore) -> None:
    store.max_bytes = 0
    store.put(NAMES[0], DATA, SHAPE)
    with running("pin", store.root) as holder:
        last_used(store, NAMES[0], 10)
        assert store.evict() == (0, 0, FILE_BYTES)
        holder.kill()  # SIGKILL
        holder.wait()
        assert store.evict() == (1, FILE_BYTES, 0)


def test_one_process_evicts_at_a_time(store: FolderStore) -> None:
    with store._sole() as now:
        assert now is not None
        assert FolderStore(store.root).evict() is None
    assert store.evict() is not None


def test_strict_bound_comes_before_leases(tmp_path: Path) -> None:
    """The longest unused goes first, so the item whose request is on its way is the last to go. None of the pinned goes."""
    store = FolderStore(tmp_path, max_bytes=2 * FILE_BYTES, lease_s=60, strict=True)
    for age, name in enumerate(reversed(NAMES[:4])):
        store.put(name, DATA, SHAPE)
        last_used(store, name, 40 - 10 * age)
    pinned = store.open(NAMES[3])
    assert pinned is not None
    with pinned:
        last_used(store, NAMES[3], 50)
        done = store.evict()
    assert done is not None and done.left_bytes == 2 * FILE_BYTES
    assert [store.shape(name) is not None for name in NAMES[:4]] == [True, False, False, True]


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int, of: int = 1 << 40) -> None:
    """Let the file system have so many bytes."""
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1, of, free, free, 0, 0, 0, 0, 255)))


def test_folder_takes_no_more_than_it_leaves_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in memory, where others want some too."""
    store = FolderStore(tmp_path, lease_s=0)
    for name in NAMES[:4]:
        store.put(name, DATA, SHAPE)
    leave_free(monkeypatch, free=4 * FILE_BYTES)
    done = store.evict()
    assert done is not None and done.files == 0
    leave_free(monkeypatch, free=2 * FILE_BYTES)
    done = store.evict()
    assert done is not None and done.left_bytes == 2 * FILE_BYTES


@pytest.mark.parametrize(("of", "reserve"), [(1 << 40, 1 << 30), (1 << 30, (1 << 30) // 10)], ids=["large", "small"])
def test_last_bytes_of_a_file_system_are_left_to_others(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, of: int, reserve: int
) -> None:
    leave_free(monkeypatch, reserve + SHAPE.size_bytes - 1, of)
    with pytest.raises(OSError, match="too little would be left"):
        store.put("A", DATA, SHAPE)
    assert files(store) == []
    leave_free(monkeypatch, reserve + SHAPE.size_bytes, of)
    store.put("A", DATA, SHAPE)
    assert read(store, "A") == DATA


def test_many_processes_write_read_and_evict_at_once(tmp_path: Path) -> None:
    """No exception, no torn or foreign item, and a folder within its bounds when all are done."""
    with contextlib.ExitStack() as stack:
        writers, others = (
            [stack.enter_context(running(job, tmp_path)) for job in jobs]
            for jobs in (("write", "write"), ("read", "evict", "evict"))
        )
        for process in writers + others:
            assert process.stdin is not None
            process.stdin.write("g")
            process.stdin.flush()
        counts = [int(process.communicate(timeout=100)[0]) for process in writers + others]  # closes their input
        assert [process.returncode for process in writers + others] == [0] * 5
    assert sum(counts[:2]) > len(NAMES) and sum(counts[3:]) > 0, counts
    store = FolderStore(tmp_path, max_bytes=MAX_BYTES, lease_s=0)
    done = store.evict()
    assert done is not None and done.left_bytes <= store.max_bytes
    assert files(store) == sorted(tmp_path.rglob("*.safetensors"))  # nothing is left in tmp
    assert all(read(store, name) in (None, CONTENTS[name]) for name in NAMES)


def test_writers_of_one_item_leave_one(store: FolderStore) -> None:
    threads = [threading.Thread(target=store.put, args=("A", DATA, SHAPE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(store) == [store.path("A")] and read(store, "A") == DATA


# ---- in the background


def test_evictor_works_when_enough_was_written_and_says_what_it_did(tmp_path: Path) -> None:
    passes = threading.Semaphore(0)

    class Watched(FolderStore):
        def evict(self):  # type: ignore[no-untyped-def]
            try:
                return super().evict()
            finally:
                passes.release()

    store = Watched(tmp_path, max_bytes=20 * FILE_BYTES, lease_s=0)
    evictor = Evictor(store)
    assert passes.acquire(timeout=10)  # once at the start
    for index in range(25):
        store.put(str(index), DATA, SHAPE)
    evictor.wrote(FILE_BYTES - 1)
    assert not passes.acquire(timeout=0.05)
    evictor.wrote(1)
    assert passes.acquire(timeout=10)
    evictor.close()
    taken = evictor.take()
    assert taken == (7, 7 * FILE_BYTES, 18 * FILE_BYTES)
    assert evictor.take() == (0, 0, None)


def test_evictor_outlives_a_folder_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = FolderStore(tmp_path / "file" / "ec")
    evictor = Evictor(store)
    evictor.now()
    evictor.close()
    assert evictor.take() == (0, 0, None)
