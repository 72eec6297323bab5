"""What a run leaves for others to read: JSON of rounded figures, with what it was made with."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Document = dict[str, Any]
DIGITS = 6
PACKAGES = ("vllm", "ray", "nixl", "torch", "transformers")


def about(module: str, hardware: str = "without a GPU", model: str = "demo-random") -> Document:
    """The facts that stand before the figures. ``hardware``: besides the CPU's cores."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "hardware": hardware, "model": model},
        "versions": {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # vllm has another name for the CPU
        return version(f"{package}-cpu")


def write(document: Document, path: Path) -> None:
    """A key a line, and of what it holds an item a line: a run, for instance."""
    path.parent.mkdir(exist_ok=True, parents=True)
    parts = ",\n".join(f"{text(key)}: {lines(value)}" for key, value in short(document).items())
    path.write_text(f"{{\n{parts}\n}}\n")


def lines(value: Any) -> str:
    if value and isinstance(value, dict):
        return "{\n" + ",\n".join(f" {text(key)}: {text(each)}" for key, each in value.items()) + "\n}"
    if value and isinstance(value, list):
        return "[\n" + ",\n".join(f" {text(each)}" for each in value) + "\n]"
    return text(value)


def text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def short(value: Any) -> Any:
    """The value with ``DIGITS`` digits of each figure in it."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [short(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
