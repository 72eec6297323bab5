"""Device, model and GPUs per replica from the config and what the cluster has."""

import re
from typing import Any

import pytest

from serve_app.config import DEMO_MODEL, GPU_MODEL, Accelerator, EPDConfig, StageConfig
from serve_app.handoff.errors import ConfigError
from serve_app.launch.placement import (
    Cluster,
    Resolved,
    actor_options,
    check_claims,
    cpus_per_replica,
    fit_gpus,
    resolve,
    shared_cards,
    xpu_affinity,
)
from serve_app.stage import Stage

CPU_ONLY = Cluster(gpus=0, cpus=2)
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "E+P+D": {},
    "E+PD": {"prefill": None},
    "P+D": {"encoder": None},
    "PD": {"encoder": None, "prefill": None},
}


def gpus(resolved: Resolved) -> dict[str, float | None]:
    return {stage.value: config.gpus_per_replica for stage, config in resolved.config.stages.items()}


def test_auto_without_a_gpu_is_the_cpu_and_the_demo_model() -> None:
    resolved = resolve(EPDConfig(), CPU_ONLY)
    assert (resolved.config.accelerator, resolved.config.model) == (Accelerator.CPU, DEMO_MODEL)
    assert resolved.reason == (
        "accelerator: cpu, because the cluster has no GPU (accelerator: auto); model: demo, because none is named"
    )
    assert gpus(resolved) == {"encoder": 0, "prefill": 0, "decode": 0}


def test_auto_with_gpus_is_cuda_and_says_which() -> None:
    resolved = resolve(EPDConfig(model="a/b"), Cluster(4, 64, ("H100",)))
    assert (resolved.config.accelerator, resolved.config.model) == (Accelerator.CUDA, "a/b")
    assert (
        resolved.reason
        == "accelerator: cuda, because the cluster has 4 GPUs (H100) (accelerator: auto); model: a/b, as configured"
    )


def test_auto_with_intel_gpus_is_xpu() -> None:
    resolved = resolve(EPDConfig(), Cluster(3, 64, ("Intel-GPU-Max-1550",)))
    assert (resolved.config.accelerator, resolved.config.model) == (Accelerator.XPU, GPU_MODEL)


@pytest.mark.parametrize("wanted", list(Accelerator)[1:])
def test_explicit_accelerator_is_kept(wanted: Accelerator) -> None:
    resolved = resolve(EPDConfig(accelerator=wanted, model="a/b"), Cluster(4, 64))
    assert resolved.config.accelerator is wanted
    assert resolved.reason == f"accelerator: {wanted}, as configured; model: a/b, as configured"


@pytest.mark.parametrize("wanted", ["cuda", "xpu"])
def test_gpus_wanted_where_there_are_none_fail_at_once_and_say_what_to_do(wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EPDConfig(accelerator=wanted), CPU_ONLY)
    assert f"`accelerator: {wanted}` needs GPUs" in str(caught.value)
    assert "`accelerator: cpu` or `auto`" in str(caught.value)


def test_gpus_that_an_autoscaler_may_add_are_waited_for() -> None:
    resolved = resolve(EPDConfig(accelerator="cuda"), Cluster(0, 2, elastic=True))
    assert gpus(resolved) == {"encoder": 1, "prefill": 1, "decode": 1}
    assert resolved.config.decode.cpus_per_replica == 1


def test_auto_does_not_guess_where_gpus_may_come() -> None:
    growing = Cluster(0, 2, elastic=True)
    with pytest.raises(ConfigError, match="set `accelerator: cuda`, `xpu` or `cpu`"):
        resolve(EPDConfig(), growing)
    assert resolve(EPDConfig(accelerator="cpu"), growing).config.model == DEMO_MODEL
    assert resolve(EPDConfig(), Cluster(1, 2, elastic=True)).config.accelerator is Accelerator.CUDA


FITS = [
    ("E+P+D", 1, {"encoder": 0.15, "prefill": 0.425, "decode": 0.425}),
    ("E+P+D", 2, {"encoder": 0.15, "prefill": 0.85, "decode": 1}),
    ("E+P+D", 3, {"encoder": 1, "prefill": 1, "decode": 1}),
    ("E+P+D", 4, {"encoder": 1, "prefill": 1, "decode": 1}),
    ("E+P+D", 8, {"encoder": 1, "prefill": 1, "decode": 1}),
    ("E+PD", 1, {"encoder": 0.15, "decode": 0.85}),
    ("E+PD", 2, {"encoder": 1, "decode": 1}),
    ("P+D", 1, {"prefill": 0.5, "decode": 0.5}),
    ("P+D", 2, {"prefill": 1, "decode": 1}),
    ("PD", 1, {"decode": 1}),
]


@pytest.mark.parametrize(("topology", "cards", "claims"), FITS)
def test_every_topology_fits_the_cards_that_there_are(topology: str, cards: int, claims: dict[str, float]) -> None:
    resolved = resolve(EPDConfig(accelerator="cuda", **TOPOLOGIES[topology]), Cluster(cards, 64))
    assert gpus(resolved) == claims
    assert sum(claims.values()) <= cards + 1e-9


@pytest.mark.parametrize(
    ("card_gib", "shares"),
    [(22.0, [0.3, 0.35, 0.35]), (39.4, [0.2, 0.4, 0.4]), (79.1, [0.15, 0.425, 0.425]), (None, [0.15, 0.425, 0.425])],
)
def test_the_smaller_the_card_the_larger_the_encoders_part(card_gib: float | None, shares: list[float]) -> None:
    resolved = resolve(EPDConfig(accelerator="cuda"), Cluster(1, 64, card_gib=card_gib))
    assert list(gpus(resolved).values()) == shares


def test_model_that_nobody_has_named_has_a_context_that_fits_small_cards() -> None:
    for args, expected in [({}, 32768), ({"engine_args": {"max_model_len": 99}}, 99)]:
        assert resolve(EPDConfig(**args), Cluster(1, 64)).config.engine_args["max_model_len"] == expected
    assert resolve(EPDConfig(model=GPU_MODEL), Cluster(1, 64)).config.engine_args == {}
    assert resolve(EPDConfig(), CPU_ONLY).config.engine_args == {}


SPREAD = [Cluster(8, 64, nodes_with_gpus=2), Cluster(0, 64, elastic=True)]


@pytest.mark.parametrize("cluster", SPREAD, ids=["two nodes", "nodes to come"])
def test_embeddings_go_from_engine_to_engine_where_stages_are_on_several_nodes(cluster: Cluster) -> None:
    def connector(**args: Any) -> str:
        return resolve(EPDConfig(accelerator="cuda", **args), cluster).config.ec.connector

    assert connector() == connector(ec={"max_bytes": 1 << 31}) == "ECCPUConnector"
    for ec in ({"storage_path": "/shared"}, {"connector": "SharedFolderECConnector"}):
        assert connector(ec=ec) == "SharedFolderECConnector"
    assert connector(advanced={"ec": {"lease_s": 9}}) == "SharedFolderECConnector"
    assert connector(encoder=None) == "SharedFolderECConnector"
    alone = resolve(EPDConfig(accelerator="cuda"), Cluster(8, 64)).config
    on_cpus = resolve(EPDConfig(accelerator="cpu"), Cluster(0, 64, elastic=True)).config
    assert alone.ec.connector == on_cpus.ec.connector == "SharedFolderECConnector"


def test_no_gpu_fits_none() -> None:
    config = EPDConfig()
    assert [c.gpus_per_replica for c in fit_gpus(config, Accelerator.CPU, CPU_ONLY).values()] == [0, 0, 0]
    with pytest.raises(ConfigError, match=r"needs 3 GPUs \(encoder 1, prefill 1, decode 1\).* has 0"):
        fit_gpus(config, Accelerator.CUDA, CPU_ONLY)


def test_tensor_parallel_stage_claims_a_card_for_each_rank() -> None:
    config = EPDConfig(decode={"engine_args": {"tensor_parallel_size": 2}})
    assert gpus(resolve(config, Cluster(4, 64))) == {"encoder": 1, "prefill": 1, "decode": 2}


def test_too_few_cards_for_tensor_parallel_are_one_sentence_with_the_claims() -> None:
    config = EPDConfig(decode={"engine_args": {"tensor_parallel_size": 2}})
    with pytest.raises(ConfigError) as caught:
        resolve(config, Cluster(3, 64))
    message = str(caught.value)
    assert "needs 4 GPUs (encoder 1, prefill 1, decode 2) and the Ray cluster has 3" in message
    assert "\n" not in message


def test_explicit_claims_are_kept() -> None:
    config = EPDConfig(
        encoder={"gpus_per_replica": 0.25}, prefill={"gpus_per_replica": 0.25}, decode={"gpus_per_replica": 0.5}
    )
    assert gpus(resolve(config, Cluster(1, 64))) == {"encoder": 0.25, "prefill": 0.25, "decode": 0.5}


def test_explicit_claim_beside_open_ones_leaves_those_whole_cards() -> None:
    config = EPDConfig(encoder={"gpus_per_replica": 0})
    assert gpus(resolve(config, Cluster(2, 64))) == {"encoder": 0, "prefill": 1, "decode": 1}


def test_claims_that_the_cluster_can_never_meet_are_refused() -> None:
    config = EPDConfig(encoder={"gpus_per_replica": 0.2})
    with pytest.raises(ConfigError, match=r"needs 2\.2 GPUs .* lower `gpus_per_replica`"):
        resolve(config, Cluster(2, 64))


@pytest.mark.parametrize("cards", [0, 1, 2, 4])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_resolving_again_changes_nothing(topology: str, cards: int) -> None:
    cluster = Cluster(cards, 64)
    once = resolve(EPDConfig(**TOPOLOGIES[topology]), cluster).config
    assert resolve(once, cluster).config == once
    assert EPDConfig.model_validate(once.model_dump(exclude_unset=True)) == once
    assert once.topology == topology


def test_what_is_configured_survives_resolving() -> None:
    config = EPDConfig(
        advanced={"kv": {"lease_s": 9}},
        ec={"storage_path": "/x"},
        ingress_cpus=3,
        engine_args={"max_model_len": 99},
        prefill={"cpus_per_replica": 2, "env": {"A": "b"}},
    )
    resolved = resolve(config, CPU_ONLY).config
    assert (resolved.advanced, resolved.ec, resolved.ingress_cpus) == (config.advanced, config.ec, 3)
    assert resolved.engine_args == {"max_model_len": 99}
    assert resolved.prefill is not None
    assert (resolved.prefill.cpus_per_replica, resolved.prefill.env) == (2, {"A": "b"})
    assert resolved.decode.cpus_per_replica == 0.1


@pytest.mark.parametrize(
    ("config", "cluster"),
    [
        ({"encoder": {"engine_args": {"gpu_memory_utilization": 0.9}}}, Cluster(1, 64)),
        ({"ec": {"connector": "ECCPUConnector"}}, CPU_ONLY),
        (
            {"decode": {"devices": "0", "engine_args": {"tensor_parallel_size": 2}}},
            Cluster(4, 64),
        ),
    ],
    ids=["memory beyond the share", "ECCPUConnector on auto = cpu", "fewer devices than ranks"],
)
def test_mistake_that_shows_only_when_resolved_is_a_config_error(config: dict[str, Any], cluster: Cluster) -> None:
    with pytest.raises(ConfigError):
        resolve(EPDConfig(**config), cluster)


@pytest.mark.parametrize(
    ("selector", "why"),
    [({"zone": "a b"}, "Invalid label selector value `a b`"), ({"-": "a"}, "Invalid label key name `-`")],
)
def test_labels_that_ray_would_refuse_are_a_config_error_before_anything_starts(
    selector: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^`decode\.label_selector`: {re.escape(why)}"):
        resolve(EPDConfig(decode={"label_selector": selector}), CPU_ONLY)


def test_labels_that_ray_knows_are_taken() -> None:
    selector = {"example.org/zone": "in(a, b)", "spot": "!yes"}
    assert resolve(EPDConfig(decode={"label_selector": selector}), CPU_ONLY).config.decode.label_selector == selector


@pytest.mark.parametrize(("cpus", "claim"), [(2, 0.1), (7.9, 0.1), (8, 1.0), (64, 1.0)])
def test_small_machines_claim_tenths_of_a_cpu(cpus: float, claim: float) -> None:
    assert cpus_per_replica(4, Cluster(0, cpus)) == claim
    resolved = resolve(EPDConfig(), Cluster(0, cpus)).config  # 3 stages and the ingress
    assert {c.cpus_per_replica for c in resolved.stages.values()} | {resolved.ingress_cpus} == {claim}


def test_plain_stage_claims_only_its_cpus() -> None:
    config = StageConfig(cpus_per_replica=0.1, gpus_per_replica=0)
    assert actor_options(config, Accelerator.CPU) == {"num_cpus": 0.1}


def test_stage_claims_gpus_resources_labels_and_environment() -> None:
    config = StageConfig(
        cpus_per_replica=1,
        gpus_per_replica=0.5,
        resources={"fast": 1},
        label_selector={"zone": "a"},
        env={"UCX_TLS": "tcp"},
    )
    assert actor_options(config, Accelerator.CUDA) == {
        "num_cpus": 1,
        "num_gpus": 0.5,
        "resources": {"fast": 1},
        "label_selector": {"zone": "a"},
        "runtime_env": {"env_vars": {"UCX_TLS": "tcp"}},
    }


@pytest.mark.parametrize(
    ("accelerator", "env"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}),
        ("xpu", {"ZE_AFFINITY_MASK": "1", "RAY_EXPERIMENTAL_NOSET_ONEAPI_DEVICE_SELECTOR": "1"}),
    ],
)
def test_named_devices_replace_the_ones_ray_would_pick(accelerator: str, env: dict[str, str]) -> None:
    config = StageConfig(cpus_per_replica=1, gpus_per_replica=1, devices="1", env={"A": "b"})
    options = actor_options(config, Accelerator(accelerator))
    assert options["runtime_env"] == {"env_vars": {"A": "b"} | env}
    assert config.env == {"A": "b"}


def test_two_nodes_of_a_card_each_are_not_shared_as_one_with_two() -> None:
    """Encoder and prefill could be placed apart, and no whole card would be left for decode."""
    with pytest.raises(ConfigError, match="needs 3 GPUs"):
        resolve(EPDConfig(), Cluster(2, 64, nodes_with_gpus=2))
    assert gpus(resolve(EPDConfig(prefill=None), Cluster(2, 64, nodes_with_gpus=2))) == {"encoder": 1, "decode": 1}


@pytest.mark.parametrize(
    ("config", "cards"),
    [
        ({"gpus_per_replica": 0.45}, [3]),
        ({"gpus_per_replica": 1}, []),
        ({"gpus_per_replica": 2, "devices": "0,1"}, ["0", "1"]),
    ],
)
def test_shares_and_named_cards_may_be_shared(config: dict[str, Any], cards: list[Any]) -> None:
    assert shared_cards(StageConfig(**config), [3]) == cards


CLAIMS = {"gpus_per_replica": 0.45, "resources": {"fast": 1}, "env": {"UCX_TLS": "tcp"}}


@pytest.mark.parametrize(
    ("assigned", "environ", "lacking"),
    [
        ({"CPU": 1.0, "GPU": 0.45, "fast": 1.0}, {"UCX_TLS": "tcp", "HOME": "/"}, None),
        ({"GPU": 1.0, "fast": 2.0}, {"UCX_TLS": "rc"}, None),
        ({"GPU": 0.4499, "fast": 1.0}, {"UCX_TLS": "tcp"}, None),
        ({"CPU": 1.0, "fast": 1.0}, {"UCX_TLS": "tcp"}, "0.45 GPU"),
        ({"CPU": 2.0, "GPU": 0.1}, {}, "0.45 GPU, 1 fast, UCX_TLS"),
    ],
    ids=["all", "more", "as Ray rounds it", "no card", "next to nothing"],
)
def test_replica_without_its_claims_says_what_took_their_place(
    assigned: dict[str, float], environ: dict[str, str], lacking: str | None
) -> None:
    def check() -> None:
        config = StageConfig(cpus_per_replica=1, **CLAIMS)
        check_claims(Stage.DECODE, config, Accelerator.CUDA, assigned, environ)

    if lacking is None:
        return check()
    with pytest.raises(ConfigError) as refused:
        check()
    assert f"lacks what its stage claims ({lacking}): `ray_actor_options` under `deployments:`" in str(refused.value)


def test_xpu_engines_see_the_cards_that_ray_picked() -> None:
    assert xpu_affinity(Accelerator.XPU, [2, 3], {}) == {"ZE_AFFINITY_MASK": "2,3"}
    assert xpu_affinity(Accelerator.XPU, [2], {"ZE_AFFINITY_MASK": "1"}) == {}
    assert xpu_affinity(Accelerator.XPU, [], {}) == {}
    assert xpu_affinity(Accelerator.CUDA, [2], {}) == {}
