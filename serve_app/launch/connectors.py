"""How embeddings (EC) and KV blocks move between engines: connector settings per stage, and addresses per replica.

Both connectors take a replica's own address from environment variables only (``VLLM_NIXL_SIDE_CHANNEL_*``,
``VLLM_EC_SIDE_CHANNEL_*``). Replicas of one node share its IP, so each binds ports that are free when it starts: one for
each connector at any tensor parallelism, because an engine's scheduler listens.
"""

import contextlib
import random
import shutil
import socket
from pathlib import Path
from typing import Any

from serve_app.config import Accelerator, EPDConfig
from serve_app.handoff.errors import ConfigError
from serve_app.handoff.types import VERSION_KEY, Version
from serve_app.launch.ec_folder import folder_of
from serve_app.stage import Stage

EC_CLASSES = {
    "SharedFolderECConnector": ("SharedFolderECConnector", "serve_app.transfer.ec_connector"),
    "ECCPUConnector": ("NixlECConnector", "serve_app.transfer.ec_nixl"),
}
"""Our classes and their modules, by the connector's name in the config."""

KV_CLASSES = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
"""Connectors in the config that ``transfer.kv_transport`` has a class for."""

PORTS = range(20_000, 30_000)
"""Ports of the side channels. An engine binds its port seconds after its replica chose it; neither the kernel (32768 on) nor
Ray's workers (to 19999) nor Kubernetes (node ports, 30000 on) gives one of these away meanwhile."""


def ec_transfer_config(config: EPDConfig, stage: Stage) -> dict[str, Any] | None:
    """vLLM's ``ec_transfer_config`` of a stage; None without an encoder. Decode consumes too, as it prefills a preempted
    request again."""
    if config.encoder is None:
        return None
    ec, more = config.ec, config.advanced.ec
    extra = dict(more.extra_config)
    folder = folder_of(config)
    if ec.uses_folder:
        extra["shared_storage_path"] = str(folder.path)
    if ec.connector == "SharedFolderECConnector":
        extra = {"max_bytes": folder.max_bytes, "max_age_s": more.max_age_s, "lease_s": more.lease_s} | extra
        if folder.in_memory:
            extra["in_memory"] = True
    if ec.uses_nixl:
        extra |= {"ec_enable_nixl": True, "ec_cpu_bytes": ec.buffer_bytes}
    connector, module = EC_CLASSES.get(ec.connector, (ec.connector, more.module_path))
    settings: dict[str, Any] = {
        "ec_connector": connector,
        "ec_role": "ec_producer" if stage is Stage.ENCODER else "ec_consumer",
        "ec_connector_extra_config": extra,
    }
    if module is not None:
        settings["ec_connector_module_path"] = module
    return settings


def check_shared_memory(config: EPDConfig, folder: Path = Path("/dev/shm")) -> None:
    """Refuse a buffer for embeddings that this replica's node cannot hold: vLLM would fail with "Bad address"."""
    if config.encoder is None or not config.ec.uses_nixl:
        return
    free = shutil.disk_usage(folder).free
    if config.ec.buffer_bytes > free:
        raise ConfigError(
            f"`ec.max_bytes`: an engine keeps {config.ec.buffer_bytes} bytes of embeddings in {folder}, where {free} are "
            "free. Lower it, or give the container more shared memory (`docker run --shm-size`; on Kubernetes a volume of "
            "medium Memory)."
        )


def kv_transfer_config(config: EPDConfig, stage: Stage) -> dict[str, Any] | None:
    """vLLM's ``kv_transfer_config`` of a stage; None where prefill and decode are one engine."""
    if config.prefill is None or stage is Stage.ENCODER:
        return None
    kv, more = config.kv, config.advanced.kv
    settings: dict[str, Any] = {
        "kv_connector": kv.connector,
        "kv_role": "kv_producer" if stage is Stage.PREFILL else "kv_consumer",
        "kv_connector_extra_config": {"kv_lease_duration": more.lease_s, **more.extra_config},
    }
    device = more.buffer_device or ("cpu" if config.accelerator is Accelerator.CPU else None)
    if device is not None:
        settings["kv_buffer_device"] = device
    if more.module_path or kv.connector in KV_CLASSES:
        settings["kv_connector_module_path"] = more.module_path or "serve_app.transfer.kv_transport"
    return settings


def tell_version(config: EPDConfig, vllm_config: Any, version: Version) -> None:
    """Give the connectors of an engine, before it starts, the version that keeps embeddings and KV blocks apart."""
    name = f"{version.front}-{version.weights}"
    ec, kv = vllm_config.ec_transfer_config, vllm_config.kv_transfer_config
    if ec is not None and ec.ec_connector == "SharedFolderECConnector":
        ec.ec_connector_extra_config = ec.ec_connector_extra_config | {VERSION_KEY: name}
    elif ec is not None and ec.ec_connector == "ECExampleConnector":  # it names its files by the item alone
        folder = Path(ec.ec_connector_extra_config["shared_storage_path"])
        ec.ec_connector_extra_config = ec.ec_connector_extra_config | {"shared_storage_path": str(folder / name)}
    if kv is not None and config.kv_has_leases:
        kv.kv_connector_extra_config = kv.kv_connector_extra_config | {VERSION_KEY: name}


def side_channel_env(host: str) -> dict[str, str]:
    """Environment of one replica's engine. ``host``: the IP of its node, as others reach it."""
    nixl_port, ec_port = free_ports(2)
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(nixl_port),
        "VLLM_EC_SIDE_CHANNEL_HOST": host,
        "VLLM_EC_SIDE_CHANNEL_PORT": str(ec_port),
    }


def free_ports(count: int, among: range = PORTS) -> list[int]:
    """Distinct TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as sockets:  # all stay open until all are found, so that none comes twice
        found: list[int] = []
        for port in random.sample(among, len(among)):
            sock = sockets.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("", port))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"no {count} free TCP ports among {among}")
