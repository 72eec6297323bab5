"""How embeddings (EC) and KV blocks move between engines: connector settings per stage, and addresses per replica.

Both connectors take a replica's own address from environment variables only (``VLLM_NIXL_SIDE_CHANNEL_*``,
``VLLM_EC_SIDE_CHANNEL_*``). Replicas of one node share its IP, so each binds ports that are free when it starts: one for
each connector, whatever its tensor parallelism, because an engine's scheduler listens and not its workers.
"""

import itertools
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
"""Connectors in the config that are classes of ours."""

KV_MODULES = dict.fromkeys(
    ("NixlConnector", "NixlPullConnector", "NixlPushConnector"), "serve_app.transfer.kv_transport"
)
"""Connectors in the config that are classes of ours, of vLLM's names."""

PORTS = range(20_000, 30_000)
"""Of the side channels. An engine binds its port seconds after its replica chose it: from here neither the kernel (32768 on)
nor Ray's workers (to 19999) nor Kubernetes (node ports, 30000 on) give it away meanwhile."""

KV_ROLE = {Stage.PREFILL: "kv_producer", Stage.DECODE: "kv_consumer"}


def ec_transfer_config(config: EPDConfig, stage: Stage) -> dict[str, Any] | None:
    """vLLM's ``ec_transfer_config`` of a stage; None where no encoder feeds it.

    Decode consumes too: a request that it preempts is prefilled again there, and needs the embeddings.
    """
    if config.encoder is None:
        return None
    ec, more = config.ec, config.advanced.ec
    extra = dict(more.extra_config)
    folder = folder_of(config)
    if ec.uses_folder:
        extra["shared_storage_path"] = str(folder.path)
    if ec.connector == "SharedFolderECConnector":
        bounds = {"max_bytes": folder.max_bytes, "max_age_s": more.max_age_s, "lease_s": more.lease_s}
        extra = bounds | extra
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
    """Refuse a buffer for embeddings that this node's shared memory cannot hold.

    Only a replica can tell, on its node: ``build_app`` runs on the head. vLLM would fail with "Bad address".
    """
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
        "kv_role": KV_ROLE[stage],
        "kv_connector_extra_config": {"kv_lease_duration": more.lease_s, **more.extra_config},
    }
    device = more.buffer_device or ("cpu" if config.accelerator is Accelerator.CPU else None)
    if device is not None:
        settings["kv_buffer_device"] = device
    if (module := more.module_path or KV_MODULES.get(kv.connector)) is not None:
        settings["kv_connector_module_path"] = module
    return settings


def tell_version(config: EPDConfig, vllm_config: Any, version: Version) -> None:
    """Have the connectors of an engine that is about to start keep embeddings and KV blocks of versions apart."""
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
    """Addresses of one replica, for the environment of its engine. ``host``: the IP of its node, as others reach it."""
    nixl_port, ec_port = free_ports(2, PORTS)
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(nixl_port),
        "VLLM_EC_SIDE_CHANNEL_HOST": host,
        "VLLM_EC_SIDE_CHANNEL_PORT": str(ec_port),
    }


def free_ports(count: int, among: range | None = None) -> list[int]:
    """Distinct TCP ports that nobody listens on now, ``among`` these or of the kernel's choice. All are held until all are
    found, so that none comes twice."""
    sockets: list[socket.socket] = []
    try:
        for port in itertools.repeat(0) if among is None else random.sample(among, len(among)):
            sockets.append(socket.socket())
            try:
                sockets[-1].bind(("", port))
            except OSError:
                sockets.pop().close()
            if len(sockets) == count:
                return [sock.getsockname()[1] for sock in sockets]
        raise OSError(f"no {count} free TCP ports among {among}")
    finally:
        for sock in sockets:
            sock.close()
