"""What a run on a card needs. Every lack is one sentence that says what to do, before anything is started."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.gpu.card import Card

DRIVER = 580
"""PyTorch 2.13 for CUDA 13 needs this driver or a newer one."""

CAPABILITY = 8.0
"""bfloat16, in which the model is."""

DISAGGREGATED_MIB = 22_000
"""What cards of 24 GB have at least: one engine, and E+PD."""

THREE_ENGINES_MIB = 38_000
"""What cards of 40 GB have at least: prefill and decode are 7 GiB of weights and 2 GiB of activations each."""

IN_USE_MIB = 1_000
"""More than a display and the driver itself take of a card."""

SHARED_MEMORY_GB = 2
DISK_GB = 5
MEMORY_GB = 16

ASK_TORCH = """
import json, torch
try:
    torch.cuda.init()
    error = None
except Exception as reason:
    error = str(reason)
print(json.dumps({"build": torch.version.cuda, "error": error}))
"""


@dataclass(frozen=True)
class Machine:
    """What is around the card. ``torch_cuda``: the CUDA version that PyTorch is built for."""

    torch_cuda: str | None
    cuda_error: str | None
    compiler: str | None
    headers: bool
    shared_memory: int
    disk: int
    memory: int

    @classmethod
    def look(cls) -> "Machine":
        """A child process asks PyTorch: the CUDA context that this leaves goes with it."""
        done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120)
        line = done.stdout.splitlines()[-1] if done.returncode == 0 and done.stdout else None
        told = json.loads(line) if line else {"build": None, "error": done.stderr[-500:]}
        return cls(
            told["build"],
            told["error"],
            os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
            Path(sysconfig.get_paths()["include"], "Python.h").exists(),
            shutil.disk_usage("/dev/shm").free,
            min(shutil.disk_usage(folder).free for folder in (tempfile.gettempdir(), Path.home())),
            psutil.virtual_memory().available,
        )


def lacks_of_card(card: Card) -> list[str]:
    found = []
    if int(card.driver.split(".")[0]) < DRIVER:
        found.append(
            f"The driver is {card.driver}, and this PyTorch needs {DRIVER} or newer: update the NVIDIA driver."
        )
    if card.capability < CAPABILITY:
        found.append(
            f"{card.name} has compute capability {card.capability}, and bfloat16 needs {CAPABILITY} (Ampere) or newer."
        )
    if card.total_mib < DISAGGREGATED_MIB:
        found.append(f"{card.name} has {card.total_mib} MiB, and two engines of this model need a card of 24 GB.")
    if card.used_mib > IN_USE_MIB:
        found.append(
            f"{card.used_mib} MiB of card {card.index} are in use: end what runs there (`nvidia-smi`), or name another card "
            "in CUDA_VISIBLE_DEVICES."
        )
    if card.compute_mode not in ("Default", "[N/A]"):
        found.append(
            f"Card {card.index} is in compute mode {card.compute_mode}, and several engines share it here: "
            f"`sudo nvidia-smi -i {card.index} -c DEFAULT`."
        )
    if card.mig == "Enabled":
        found.append(f"Card {card.index} is divided by MIG, and stages share a whole card here: name another card.")
    return found


def lacks_of_machine(machine: Machine) -> list[str]:
    found = []
    if machine.torch_cuda is None:
        found.append("PyTorch here is built without CUDA: make .venv again with `EPD_EXTRA=gpu make setup`.")
    elif machine.cuda_error is not None:
        found.append(f"PyTorch cannot use the card: {' '.join(machine.cuda_error.split())}")
    if machine.compiler is None:
        found.append("There is no C compiler, and Triton builds its launcher at the first start: install gcc.")
    if not machine.headers:
        found.append(
            "Python.h is missing, and Triton builds its launcher at the first start: install Python's headers."
        )
    for what, free, needed in (
        ("shared memory in /dev/shm (`docker run --shm-size`)", machine.shared_memory, SHARED_MEMORY_GB),
        ("disk space in the temporary and the home folder", machine.disk, DISK_GB),
        ("memory (four processes of 3 to 4 GB)", machine.memory, MEMORY_GB),
    ):
        if free < needed * 10**9:
            found.append(f"{free / 1e9:.1f} GB of {what} are free, and {needed} GB are needed.")
    return found


def what_fits(card: Card) -> str | None:
    """A sentence on what is left out on this card; None where all three systems fit."""
    if card.total_mib >= THREE_ENGINES_MIB:
        return None
    return (
        f"E+P+D is left out: prefill and decode each hold the model, which takes a card of 40 GB, and {card.name} has "
        f"{card.total_mib} MiB."
    )
