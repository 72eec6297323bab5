"""Files written by threads, bounded in what is under way and in how long anyone waits."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.transfer import ec_writer
from serve_app.transfer.ec_store import FolderStore, Shape
from serve_app.transfer.ec_writer import Staged, Writer

SHAPE = Shape(2, 3, "F32")
DATA = memoryview(bytes(range(24)))


class Held(FolderStore):
    """A folder whose disk hangs until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.puts: list[str] = []

    def put(self, identifier: str, data: bytes | bytearray | memoryview, shape: Shape) -> int:
        self.puts.append(identifier)
        assert self.go.wait(10)
        return super().put(identifier, data, shape)


@pytest.fixture
def store(tmp_path: Path) -> Held:
    return Held(tmp_path / "ec")


@pytest.fixture
def writer(store: Held) -> Iterator[Writer]:
    """At the end it has no thread."""
    before = threading.active_count()
    writer = Writer(store, max_bytes=2 * SHAPE.size_bytes)
    yield writer
    store.go.set()
    writer.close()
    assert threading.active_count() <= before


def stage() -> Staged:
    return DATA, None


def test_item_is_there_when_waiting_ends(store: Held, writer: Writer) -> None:
    writer.write("A", SHAPE, stage)
    writer.write("B", SHAPE, stage)
    assert writer.is_writing("A") and store.shape("A") is None
    store.go.set()
    writer.wait("A", "B", "never written")
    assert store.shape("A") == store.shape("B") == SHAPE
    assert not writer.is_writing("A")


def test_waiting_for_one_item_is_not_waiting_for_all(store: Held, writer: Writer) -> None:
    writer.write("A", SHAPE, stage)
    writer.wait("B")
    assert writer.is_writing("A")


def test_waiting_for_nothing_in_particular_is_waiting_for_all(store: Held, writer: Writer) -> None:
    store.go.set()
    for name in "ABC":
        writer.write(name, SHAPE, stage)
    writer.wait()
    assert all(store.shape(name) == SHAPE for name in "ABC")


def test_bytes_are_written_only_when_they_are_all_there(store: Held, writer: Writer) -> None:
    """The copy from the card is under way."""
    copied, waits = threading.Event(), threading.Event()

    def ready() -> None:
        waits.set()
        assert copied.wait(10)

    store.go.set()
    writer.write("A", SHAPE, lambda: (DATA, ready))
    assert waits.wait(10)
    assert store.puts == []
    copied.set()
    writer.wait("A")
    assert store.puts == ["A"]


def test_item_under_way_is_not_begun_again(store: Held, writer: Writer) -> None:
    writer.write("A", SHAPE, stage)
    writer.write("A", SHAPE, lambda: pytest.fail("copied twice"))
    store.go.set()
    writer.wait("A")
    assert store.puts == ["A"]
    writer.write("A", SHAPE, stage)  # it may have been evicted since
    writer.wait("A")
    assert store.puts == ["A", "A"]


def test_no_more_bytes_are_under_way_than_may_be(store: Held, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "AB":
        writer.write(name, SHAPE, stage)
    with monkeypatch.context() as patch:
        patch.setattr(ec_writer, "PATIENCE_S", 0)
        with pytest.raises(TimeoutError, match="2 items before it"):
            writer.write("C", SHAPE, lambda: pytest.fail("copied before there was room"))
    store.go.set()
    writer.write("C", SHAPE, stage)
    writer.wait()
    assert sorted(store.puts) == ["A", "B", "C"]


def test_item_larger_than_all_that_may_be_under_way_goes_alone(store: Held, writer: Writer) -> None:
    large = Shape(20, 3, "F32")
    store.go.set()
    writer.write("A", large, lambda: (memoryview(bytes(large.size_bytes)), None))
    writer.wait("A")
    assert store.shape("A") == large


def test_nobody_waits_for_ever_for_a_disk_that_hangs(
    store: Held, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write("A", SHAPE, stage)
    monkeypatch.setattr(ec_writer, "PATIENCE_S", 0)
    writer.wait("A")
    assert writer.is_writing("A")


@pytest.mark.parametrize("fails", ["disk", "card"])
def test_item_that_cannot_be_written_holds_up_nothing(
    store: Held, writer: Writer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def fail(*args: object) -> int:
        raise OSError(28, "No space left on device")

    store.go.set()
    with monkeypatch.context() as patch:
        if fails == "disk":
            patch.setattr(store, "put", fail)
        writer.write("A", SHAPE, lambda: (DATA, fail if fails == "card" else None))
        writer.wait("A")
    assert store.shape("A") is None and not writer.is_writing("A")
    writer.write("A", SHAPE, stage)
    writer.wait("A")
    assert store.shape("A") == SHAPE


def test_item_that_cannot_be_copied_takes_no_room(store: Held, writer: Writer) -> None:
    def fail() -> Staged:
        raise RuntimeError("out of memory")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            writer.write("A", SHAPE, fail)
    assert not writer.is_writing("A")


def test_closing_waits_for_what_has_begun(store: Held, writer: Writer) -> None:
    writer.write("A", SHAPE, stage)
    closing = threading.Thread(target=writer.close)
    closing.start()
    store.go.set()
    closing.join()
    assert store.shape("A") == SHAPE
    with pytest.raises(RuntimeError):
        writer.write("B", SHAPE, stage)
    assert not writer.is_writing("B")
