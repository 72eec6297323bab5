"""What ``nvidia-smi`` says of a card and of the programs on it.

No CUDA context is made in this process: it would hold 0.4 GiB of the card during the whole run.
"""

import csv
import os
import subprocess
from dataclasses import dataclass

FIELDS = (
    "index",
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "compute_mode",
    "mig.mode.current",
)


class NoCard(Exception):
    """One sentence: why no card can be used."""


@dataclass(frozen=True)
class Card:
    index: int
    name: str
    driver: str
    capability: float
    total_mib: int
    used_mib: int
    compute_mode: str
    mig: str


def query(what: str, fields: tuple[str, ...], *options: str) -> list[list[str]]:
    """Rows of one of ``nvidia-smi``'s queries. Raises ``NoCard`` where it is missing or fails."""
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise NoCard("No NVIDIA card: the command nvidia-smi is not here, so there is no NVIDIA driver.") from None
    except subprocess.TimeoutExpired:
        raise NoCard("nvidia-smi gave no answer within 60 s: the driver or the card hangs.") from None
    if done.returncode:
        raise NoCard(f"nvidia-smi finds no card: {' '.join((done.stdout + done.stderr).split())}")
    return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]


def cards() -> list[Card]:
    """All cards of this machine. Raises ``NoCard`` where there is none, or one that does not tell its memory."""
    found = []
    for index, name, driver, capability, total, used, mode, mig in query("gpu", FIELDS):
        if not total.isdecimal() or not used.isdecimal():
            raise NoCard(f"nvidia-smi does not tell the memory of {name}: {total!r} in all, {used!r} in use.")
        found.append(Card(int(index), name, driver, float(capability), int(total), int(used), mode, mig))
    if not found:
        raise NoCard("nvidia-smi lists no card.")
    return found


def chosen(found: list[Card]) -> Card:
    """The first card of CUDA_VISIBLE_DEVICES where that is set, else the one with the most free memory."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return max(found, key=lambda card: card.total_mib - card.used_mib)
    first = named.split(",")[0].strip()
    for card in found:
        if first == str(card.index):
            return card
    raise NoCard(f"CUDA_VISIBLE_DEVICES={named!r} names no card by its number in nvidia-smi.")


def environment(card: Card) -> dict[str, str]:
    """Shows a program's children, Ray among them, that one card and no other. CUDA counts as nvidia-smi does then."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(card.index)}


def programs(card: Card) -> dict[int, int | None]:
    """MiB of the card by process; None where the driver does not tell. In a container it may know no process, or the host's
    numbers of them."""
    rows = query("compute-apps", ("pid", "used_memory"), "-i", str(card.index))
    return {int(pid): int(used) if used.isdecimal() else None for pid, used in rows if pid.isdecimal()}


def used_mib(card: Card) -> int:
    """MiB of the card that are in use now."""
    ((used,),) = query("gpu", ("memory.used",), "-i", str(card.index))
    return int(used)
