"""What a run on a card needs, by recorded answers of ``nvidia-smi``."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import card as cards
from benchmarks.gpu.card import Card, NoCard
from benchmarks.gpu.prerequisites import Machine, lacks_of_card, lacks_of_machine, what_fits

# `nvidia-smi --query-gpu=index,name,driver_version,compute_cap,memory.total,memory.used,compute_mode,mig.mode.current
# --format=csv,noheader,nounits`
H100 = "0, NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559, 4, Default, Disabled\n"
TWO_L4 = """\
0, NVIDIA L4, 580.82.07, 8.9, 23034, 18211, Default, [N/A]
1, NVIDIA L4, 580.82.07, 8.9, 23034, 0, Default, [N/A]
"""
GB10 = "0, NVIDIA GB10, 580.95.05, 12.1, [N/A], [N/A], Default, [N/A]\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver "
    "is installed and running.\n\n"
)

H100_CARD = Card(0, "NVIDIA H100 80GB HBM3", "580.95.05", 9.0, 81559, 4, "Default", "Disabled")
WHOLE = Machine("13.0", None, "/usr/bin/gcc", True, 8 * 10**9, 50 * 10**9, 64 * 10**9)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put an ``nvidia-smi`` in the path that prints this and nothing else."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def say(text: str, status: int = 0) -> None:
        (tmp_path / "told").write_text(text)
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/told\nexit {status}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return say


def test_a_card_is_read(smi: Any) -> None:
    smi(H100)
    assert cards.cards() == [H100_CARD]
    assert lacks_of_card(H100_CARD) == [] and what_fits(H100_CARD) is None


def test_the_card_with_the_most_free_memory_is_taken_unless_one_is_named(
    smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(TWO_L4)
    assert cards.chosen(cards.cards()).index == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cards.chosen(cards.cards()).index == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b2c")
    with pytest.raises(NoCard, match="names no card by its number"):
        cards.chosen(cards.cards())


def test_children_see_that_card_alone_and_count_as_nvidia_smi_does() -> None:
    assert cards.environment(H100_CARD) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize(
    "text, status, why",
    [
        (NO_DRIVER, 9, "finds no card: NVIDIA-SMI has failed because"),
        ("No devices were found\n", 6, "No devices were found"),
        ("", 0, "lists no card"),
        (GB10, 0, "does not tell the memory of NVIDIA GB10"),
    ],
)
def test_why_there_is_no_card_is_one_sentence(smi: Any, text: str, status: int, why: str) -> None:
    smi(text, status)
    with pytest.raises(NoCard, match=why) as lack:
        cards.cards()
    assert "\n" not in str(lack.value)


def test_without_nvidia_smi_there_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCard, match="nvidia-smi is not here"):
        cards.cards()


def test_memory_of_processes_is_read_where_the_driver_tells_it(smi: Any, tmp_path: Path) -> None:
    smi("4711, 36210\n4712, [N/A]\n[Insufficient Permissions], [Insufficient Permissions]\n")
    assert cards.programs(H100_CARD) == {4711: 36210, 4712: None}
    assert (tmp_path / "asked").read_text().split()[-2:] == ["-i", "0"]
    smi("")  # in a container
    assert cards.programs(H100_CARD) == {}


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"driver": "570.124.06"}, "driver is 570.124.06"),
        ({"name": "Tesla T4", "capability": 7.5}, "compute capability 7.5"),
        ({"total_mib": 16376}, "16376 MiB"),
        ({"used_mib": 18211}, "18211 MiB of card 0 are in use"),
        ({"compute_mode": "Exclusive_Process"}, "compute mode Exclusive_Process"),
        ({"mig": "Enabled"}, "MIG"),
    ],
)
def test_each_lack_of_a_card_is_a_sentence(changes: dict[str, Any], what: str) -> None:
    (lack,) = lacks_of_card(Card(**H100_CARD.__dict__ | changes))
    assert what in lack


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"torch_cuda": None}, "EPD_EXTRA=gpu"),
        (
            {"cuda_error": "The NVIDIA driver\nis too old"},
            "cannot use the card: The NVIDIA driver is",
        ),
        ({"compiler": None}, "C compiler"),
        ({"headers": False}, "Python.h"),
        ({"shared_memory": 64 * 1024**2}, "0.1 GB of shared memory"),
        ({"disk": 10**9}, "1.0 GB of disk space"),
        ({"memory": 8 * 10**9}, "8.0 GB of memory"),
    ],
)
def test_each_lack_of_a_machine_is_a_sentence(changes: dict[str, Any], what: str) -> None:
    (lack,) = lacks_of_machine(Machine(**WHOLE.__dict__ | changes))
    assert what in lack and "\n" not in lack


def test_nothing_is_missing_on_a_whole_machine() -> None:
    assert lacks_of_machine(WHOLE) == []


def test_this_machine_is_looked_at_by_a_child_process() -> None:
    """Its PyTorch is built for the CPU, or finds no card: either is told."""
    machine = Machine.look()
    assert machine.torch_cuda is None or machine.cuda_error is not None or cards.cards()
    assert machine.disk > 0 and machine.memory > 0


def test_what_is_left_out_on_a_small_card_is_said() -> None:
    assert "E+P+D is left out" in str(what_fits(Card(**H100_CARD.__dict__ | {"name": "NVIDIA L4", "total_mib": 23034})))
