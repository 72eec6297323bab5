"""The connectors that move embeddings (``ec:``) and KV blocks (``kv:``) from engine to engine."""

from pydantic import Field

from serve_app.config.advanced import AdvancedEC
from serve_app.config.parts import Folder, Strict

EC_EXTRA_KEYS = {
    "SharedFolderECConnector": frozenset({"shared_storage_path", "max_bytes", "max_age_s", "lease_s"}),
    "ECExampleConnector": frozenset({"shared_storage_path"}),
    "ECCPUConnector": frozenset({"consumer_ack_timeout_s"}),
}
"""The connectors that can be named without a module, and what each reads from its extra config."""

EC_OWN_KEYS = {
    "ec_cpu_bytes": "set by `ec.max_bytes`",
    "ec_enable_nixl": "always on: without NIXL no embedding would leave its encoder",
}
"""Keys of ``ECCPUConnector``'s extra config that are set here."""

EC_USED = {
    "SharedFolderECConnector": {"ec.storage_path", "ec.max_bytes", "advanced.ec.max_age_s", "advanced.ec.lease_s"},
    "ECExampleConnector": {"ec.storage_path"},
    "ECCPUConnector": {"ec.max_bytes"},
}
"""The keys that only some connectors use, by connector."""

EC_ANY = {"ec.connector", "ec.salt_by_tenant", "advanced.ec.extra_config"}
"""Keys that have an effect with every connector."""


class ECConfig(Strict):
    """How embeddings move from encoders to prefill and decode."""

    connector: str = "SharedFolderECConnector"
    storage_path: Folder | None = None
    max_bytes: int | None = Field(None, ge=1024**2)
    salt_by_tenant: bool = False

    @property
    def folder_bytes(self) -> int:
        """The most bytes in the folder of ``SharedFolderECConnector``."""
        return self.max_bytes or 8 << 30

    @property
    def buffer_bytes(self) -> int:
        """Bytes of an engine's buffer with ``ECCPUConnector``. Few: every answer to a consumer names every block of it."""
        return self.max_bytes or 1 << 30

    @property
    def uses_folder(self) -> bool:
        return self.connector in ("SharedFolderECConnector", "ECExampleConnector")

    @property
    def uses_nixl(self) -> bool:
        return self.connector == "ECCPUConnector"

    @property
    def fails_without(self) -> bool:
        """Whether the connector fails a request whose item has neither an embedding nor pixels: it is tried again."""
        return self.connector == "SharedFolderECConnector" or self.uses_nixl

    @property
    def shareable(self) -> bool:
        """Whether an encoder's answer serves every request that waits for it: an embedding can be read more than once.

        Only a folder keeps embeddings for later requests (``lease_s``). An encoder's buffer drops them when it is full.
        """
        return self.uses_folder or self.uses_nixl


class KVConfig(Strict):
    """How KV blocks move from prefill to decode."""

    connector: str = "NixlConnector"


def check_ec(ec: ECConfig, advanced: AdvancedEC) -> None:
    """Refuse keys that have no effect with the connector, or do not fit each other."""
    name = f"`ec.connector: {ec.connector}`"
    if ec.connector == "ECMooncakeConnector":
        raise ValueError(
            f"{name} cannot be used: its encoder sends an embedding to the consumer that the encode call names, and "
            "here items are encoded before a prefill replica is chosen. ECCPUConnector moves embeddings between nodes"
        )
    if ec.connector not in EC_EXTRA_KEYS:
        if advanced.module_path is None:
            raise ValueError(f"{name} is none of {', '.join(EC_EXTRA_KEYS)}: name its `advanced.ec.module_path`")
        return
    given = {f"ec.{key}" for key in ec.model_fields_set if getattr(ec, key) is not None}
    given |= {f"advanced.ec.{key}" for key in advanced.model_fields_set if getattr(advanced, key) is not None}
    for key in sorted(given - EC_ANY - EC_USED[ec.connector]):
        raise ValueError(f"`{key}` has no effect with {name}")
    _check_extra(ec, advanced)
    if advanced.lease_s > advanced.max_age_s:
        raise ValueError(
            f"`advanced.ec.lease_s: {advanced.lease_s:g}` is longer than `advanced.ec.max_age_s: {advanced.max_age_s:g}`"
        )


def _check_extra(ec: ECConfig, advanced: AdvancedEC) -> None:
    for key in advanced.extra_config:
        if ec.uses_nixl and key in EC_OWN_KEYS:
            raise ValueError(f"`advanced.ec.extra_config.{key}` is {EC_OWN_KEYS[key]}")
        if key not in EC_EXTRA_KEYS[ec.connector]:
            known = ", ".join(sorted(EC_EXTRA_KEYS[ec.connector]))
            raise ValueError(
                f"`advanced.ec.extra_config.{key}` is not known to `ec.connector: {ec.connector}`, which knows {known}"
            )
