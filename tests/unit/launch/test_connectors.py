"""Connector settings per stage and topology, and a replica's own addresses."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ECTransferConfig, KVTransferConfig

from serve_app.config import SIDE_CHANNEL_ENV, Accelerator, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.handoff.types import Version
from serve_app.launch import ec_folder
from serve_app.launch.connectors import (
    check_shared_memory,
    ec_transfer_config,
    free_ports,
    kv_transfer_config,
    side_channel_env,
    tell_version,
)
from serve_app.launch.ec_folder import folder_of
from serve_app.stage import Stage

ROLES: dict[str, dict[str, Any]] = {
    "E+P+D": {},
    "E+PD": {"prefill": None},
    "P+D": {"encoder": None},
    "PD": {"encoder": None, "prefill": None},
}


NIXL = {"connector": "ECCPUConnector"}


def role(settings: dict[str, Any] | None, key: str) -> str | None:
    return None if settings is None else settings[key]


@pytest.mark.parametrize(
    ("topology", "stage", "ec", "kv"),
    [
        ("E+P+D", "encoder", "ec_producer", None),
        ("E+P+D", "prefill", "ec_consumer", "kv_producer"),
        ("E+P+D", "decode", "ec_consumer", "kv_consumer"),
        ("E+PD", "encoder", "ec_producer", None),
        ("E+PD", "decode", "ec_consumer", None),
        ("P+D", "prefill", None, "kv_producer"),
        ("P+D", "decode", None, "kv_consumer"),
        ("PD", "decode", None, None),
    ],
)
def test_roles_of_each_stage_in_each_topology(topology: str, stage: str, ec: str | None, kv: str | None) -> None:
    config = EPDConfig(**ROLES[topology])
    assert role(ec_transfer_config(config, Stage(stage)), "ec_role") == ec
    assert role(kv_transfer_config(config, Stage(stage)), "kv_role") == kv


def test_our_folder_connector_is_loaded_from_our_module() -> None:
    config = EPDConfig(ec={"storage_path": "/shared", "max_bytes": 1 << 30})
    assert ec_transfer_config(config, Stage.PREFILL) == {
        "ec_connector": "SharedFolderECConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {
            "shared_storage_path": "/shared",
            "max_bytes": 1 << 30,
            "max_age_s": 86_400.0,
            "lease_s": 60.0,
        },
        "ec_connector_module_path": "serve_app.transfer.ec_connector",
    }


@pytest.mark.parametrize(("room", "max_bytes"), [(0, 8 << 30), (2 << 30, 2 << 30)], ids=["disk", "memory"])
def test_every_stage_uses_the_same_folder(monkeypatch: pytest.MonkeyPatch, room: int, max_bytes: int) -> None:
    """In memory its bound is what there is room for, and the last engine removes it."""
    monkeypatch.setattr(ec_folder, "room_in_memory", lambda: room)
    settings = [ec_transfer_config(EPDConfig(), stage) for stage in Stage]
    extras = [s["ec_connector_extra_config"] for s in settings if s]
    assert extras[0] == extras[1] == extras[2]
    assert extras[0]["shared_storage_path"] == str(folder_of(EPDConfig()).path)
    assert extras[0]["max_bytes"] == max_bytes
    assert extras[0].get("in_memory", False) is bool(room)


def test_vllms_own_folder_connector_needs_no_module() -> None:
    settings = ec_transfer_config(EPDConfig(ec={"connector": "ECExampleConnector"}), Stage.DECODE)
    assert settings is not None
    assert "ec_connector_module_path" not in settings
    assert settings["ec_connector_extra_config"].keys() == {"shared_storage_path"}


@pytest.mark.parametrize(
    ("keys", "extra"),
    [
        ({}, {"ec_cpu_bytes": 1 << 30}),
        ({"ec": {**NIXL, "max_bytes": 4 << 30}}, {"ec_cpu_bytes": 4 << 30}),
        (
            {"advanced": {"ec": {"extra_config": {"consumer_ack_timeout_s": 5}}}},
            {"ec_cpu_bytes": 1 << 30, "consumer_ack_timeout_s": 5},
        ),
    ],
)
def test_vllms_nixl_connector_is_loaded_through_ours(keys: dict[str, Any], extra: dict[str, Any]) -> None:
    config = EPDConfig(**{"ec": NIXL} | keys)
    for stage, role in (("encoder", "ec_producer"), ("prefill", "ec_consumer"), ("decode", "ec_consumer")):
        assert ec_transfer_config(config, Stage(stage)) == {
            "ec_connector": "NixlECConnector",
            "ec_role": role,
            "ec_connector_extra_config": {"ec_enable_nixl": True, **extra},
            "ec_connector_module_path": "serve_app.transfer.ec_nixl",
        }


def test_buffer_that_the_nodes_shared_memory_cannot_hold_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_shared_memory(EPDConfig(ec={**NIXL, "max_bytes": 1 << 20}), tmp_path)
    check_shared_memory(EPDConfig(ec={"max_bytes": 2 * free}), tmp_path)  # a folder's bound is not taken from it
    with pytest.raises(ConfigError, match=r"`ec\.max_bytes`.*--shm-size"):
        check_shared_memory(EPDConfig(ec={**NIXL, "max_bytes": 2 * free}), tmp_path)


def test_connector_of_the_users_own_is_loaded_from_its_module() -> None:
    config = EPDConfig(
        ec={"connector": "Mine"},
        kv={"connector": "Yours"},
        advanced={"ec": {"module_path": "my.ec"}, "kv": {"module_path": "my.kv"}},
    )
    ec, kv = ec_transfer_config(config, Stage.DECODE), kv_transfer_config(config, Stage.DECODE)
    assert ec is not None and kv is not None
    assert (ec["ec_connector"], ec["ec_connector_module_path"]) == ("Mine", "my.ec")
    assert (kv["kv_connector"], kv["kv_connector_module_path"]) == ("Yours", "my.kv")


def test_settings_are_copies_of_the_configs() -> None:
    mine = {"module_path": "my.ec", "extra_config": {"a": 1}}
    config = EPDConfig(ec={"connector": "Mine"}, advanced={"ec": mine, "kv": {"extra_config": {"b": 2}}})
    for settings, key in (
        (ec_transfer_config(config, Stage.DECODE), "ec_connector_extra_config"),
        (kv_transfer_config(config, Stage.DECODE), "kv_connector_extra_config"),
    ):
        assert settings is not None
        settings[key]["changed"] = True
    assert (config.advanced.ec.extra_config, config.advanced.kv.extra_config) == ({"a": 1}, {"b": 2})


def test_lease_is_the_configured_one_and_yields_to_the_connectors_own_key() -> None:
    def lease(**kv: Any) -> Any:
        settings = kv_transfer_config(EPDConfig(advanced={"kv": kv}), Stage.PREFILL)
        assert settings is not None
        return settings["kv_connector_extra_config"]

    assert lease() == {"kv_lease_duration": 30}
    assert lease(lease_s=7, extra_config={"x": 1}) == {"kv_lease_duration": 7, "x": 1}
    assert lease(extra_config={"kv_lease_duration": 99}) == {"kv_lease_duration": 99}


@pytest.mark.parametrize(
    ("accelerator", "wanted", "device"),
    [("cpu", None, "cpu"), ("cuda", None, None), ("xpu", None, None), ("cuda", "cpu", "cpu"), ("xpu", "xpu", "xpu")],
)
def test_kv_buffer_is_on_the_cpu_where_there_is_no_other(
    accelerator: str, wanted: str | None, device: str | None
) -> None:
    config = EPDConfig(accelerator=Accelerator(accelerator), advanced={"kv": {"buffer_device": wanted}})
    settings = kv_transfer_config(config, Stage.DECODE)
    assert settings is not None
    assert settings.get("kv_buffer_device") == device
    assert ("kv_buffer_device" in settings) == (device is not None)


def test_kv_connector_is_the_configured_one() -> None:
    settings = kv_transfer_config(EPDConfig(kv={"connector": "NixlPushConnector"}), Stage.PREFILL)
    assert settings is not None
    assert settings["kv_connector"] == "NixlPushConnector"
    assert settings["kv_connector_module_path"] == "serve_app.transfer.kv_transport"


def test_free_ports_are_distinct_can_be_bound_together_and_are_not_the_kernels_to_give() -> None:
    """Else the kernel may give one to another process before it is used: a page of metrics has answered for a server."""
    ports = free_ports(50)
    assert len(set(ports)) == 50
    low, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(1024 <= port < low for port in ports)
    sockets = [socket.socket() for _ in ports]
    try:
        for sock, port in zip(sockets, ports, strict=True):
            sock.bind(("", port))
    finally:
        for sock in sockets:
            sock.close()


def test_replica_is_reached_at_its_nodes_address_and_at_ports_of_its_own() -> None:
    env = side_channel_env("10.0.0.7")
    assert (env["VLLM_NIXL_SIDE_CHANNEL_HOST"], env["VLLM_EC_SIDE_CHANNEL_HOST"]) == ("10.0.0.7", "10.0.0.7")
    assert env.keys() == SIDE_CHANNEL_ENV  # what a stage's `env:` may not set
    ports = {int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"]), int(env["VLLM_EC_SIDE_CHANNEL_PORT"])}
    assert len(ports) == 2


def test_ports_that_are_taken_are_left_out() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="no 1 free TCP ports"):
            free_ports(1, range(port, port + 1))
    assert free_ports(1, range(port, port + 1)) == [port]


def told(**args: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The extra config of both connectors that are told a version, and what that of KV blocks was before."""
    epd = EPDConfig.model_validate({"accelerator": "cpu"} | args)
    ec, kv = ec_transfer_config(epd, Stage.DECODE), kv_transfer_config(epd, Stage.DECODE)
    assert ec and kv
    made = SimpleNamespace(ec_transfer_config=ECTransferConfig(**ec), kv_transfer_config=KVTransferConfig(**kv))
    before = dict(made.kv_transfer_config.kv_connector_extra_config)
    tell_version(epd, made, Version("f", "t", "w"))
    return (
        made.ec_transfer_config.ec_connector_extra_config,
        made.kv_transfer_config.kv_connector_extra_config,
        before,
    )


def test_connectors_of_ours_are_told_the_version() -> None:
    ec, kv, before = told()
    assert kv == before | {"epd_version": "f-w"}
    assert ec["epd_version"] == "f-w"


def test_vllms_folder_connector_gets_a_folder_for_each_version(tmp_path: Path) -> None:
    ec, _, _ = told(ec={"connector": "ECExampleConnector", "storage_path": str(tmp_path)})
    assert ec == {"shared_storage_path": str(tmp_path / "f-w")}


def test_connectors_of_others_are_told_nothing_and_engines_without_any_are_fine() -> None:
    mine = {"connector": "Mine"}
    advanced = {"ec": {"module_path": "mine"}, "kv": {"module_path": "mine"}}
    ec, kv, before = told(ec=mine, kv=mine, advanced=advanced)
    assert (ec, kv) == ({}, before)
    tell_version(EPDConfig(), SimpleNamespace(ec_transfer_config=None, kv_transfer_config=None), Version("f"))
