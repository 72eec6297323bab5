"""k8s/: what KubeRay, Kubernetes, Ray Serve and this application each read of the files there, they take; and the pods are
large enough for the replicas. Nothing here needs a cluster."""

import functools
import os
import re
import subprocess
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.serve._private.application_state import _get_shared_build_app_label_selector
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from serve_app.app import ONE_LOOP, check_vllm_args, parse
from serve_app.config import EPDConfig, StageConfig
from serve_app.launch.ec_folder import folder_of
from serve_app.launch.placement import Cluster, actor_options, resolve
from tests.repo.test_examples import keys_that_ray_would_drop

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
SCHEMA = yaml.safe_load((Path(__file__).parent / "rayservice_v1.yaml").read_text())
FILES = {"rayservice.yaml": "E+PD", "rayservice-one-gpu.yaml": "E+P+D", "rayservice-cpu.yaml": "E+P+D"}
# What the patch makes of rayservice.yaml is one more of them.
VARIANTS = FILES | {"rdma.patch": "E+P+D"}
KUBERNETES = ["1.31", kubernetes_validate.latest_version()]

every_file = pytest.mark.parametrize("name", VARIANTS)


def text_of(name: str) -> str:
    if not name.endswith(".patch"):
        return (K8S / name).read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "k8s/rayservice.yaml"
        copy.parent.mkdir()
        copy.write_text(text_of("rayservice.yaml"))
        subprocess.run(["git", "apply", K8S / name], cwd=folder, check=True)
        return copy.read_text()


@functools.cache
def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text_of(name)))


def service(name: str) -> dict[str, Any]:
    (only,) = [document for document in documents(name) if document["kind"] == "RayService"]
    return only


def cluster(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = service(name)["spec"]["rayClusterConfig"]
    return spec


def groups(name: str) -> list[dict[str, Any]]:
    """The worker groups."""
    return list(cluster(name)["workerGroupSpecs"])


def templates(name: str) -> dict[str, dict[str, Any]]:
    """Pod templates by group; the head's first."""
    return {"head": cluster(name)["headGroupSpec"]["template"]} | {g["groupName"]: g["template"] for g in groups(name)}


def container(template: dict[str, Any]) -> dict[str, Any]:
    """The one that runs Ray: KubeRay takes the first."""
    first: dict[str, Any] = template["spec"]["containers"][0]
    return first


def serve_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service(name)["spec"]["serveConfigV2"])
    return config


def application(name: str) -> dict[str, Any]:
    (only,) = serve_config(name)["applications"]
    return dict(only)


def resolved(name: str) -> EPDConfig:
    """As the application is built on KubeRay: before any worker is there."""
    return resolve(parse(application(name)["args"]), Cluster(gpus=0, cpus=0, elastic=True)).config


def test_every_file_is_tested() -> None:
    assert {path.name for path in K8S.iterdir() if path.suffix in (".yaml", ".patch")} == set(VARIANTS)


# ---- KubeRay and Kubernetes


@every_file
def test_kuberay_takes_every_field(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(service(name), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "serveConfig"], ""),
        (["spec", "upgradeStrategy", "type"], "Recreate"),
        (["spec", "upgradeStrategy", "type"], "NewClusterWithIncrementalUpgrade"),
        (["spec", "rayClusterConfig", "workerGroups"], []),
        (["spec", "rayClusterConfig", "enableInTreeAutoscaling"], False),
        (["spec", "rayClusterConfig", "autoscalerOptions", "version"], "v1"),
        (["spec", "rayClusterConfig", "autoscalerOptions", "idleTimeoutMinutes"], 1),
        (["spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "labels"], "a=b"),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 1, "minReplica"], 1),
        (["spec", "rayClusterConfig", "workerGroupSpecs", 1, "template", "spec", "restartPolicy"], "Always"),
    ],
    ids=str,
)
def test_mistake_in_a_rayservice_is_seen(path: list[Any], value: Any) -> None:
    document = yaml.safe_load(yaml.safe_dump(service("rayservice.yaml")))
    parent = functools.reduce(lambda at, key: at[key], path[:-1], document)
    parent[path[-1]] = value

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"} | template.get("metadata", {})} | {
        "spec": template["spec"]
    }


@every_file
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_field_of_the_pods(name: str, version: str) -> None:
    for template in templates(name).values():
        kubernetes_validate.validate(as_pod(template), version, strict=True)
    options = cluster(name).get("autoscalerOptions", {})
    sidecar = {"name": "autoscaler"} | {key: options[key] for key in ("resources", "securityContext") if key in options}
    kubernetes_validate.validate(as_pod({"spec": {"containers": [sidecar]}}), version, strict=True)


@every_file
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_the_other_objects(name: str, version: str) -> None:
    for document in documents(name):
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, version, strict=True)


def test_mistake_in_a_pod_is_seen() -> None:
    template = yaml.safe_load(yaml.safe_dump(templates("rayservice.yaml")["decode"]))
    container(template)["lifecycle"]["preStart"] = {}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_pod(template), KUBERNETES[-1], strict=True)


@every_file
def test_pods_run_as_a_user_without_privileges(name: str) -> None:
    for group, template in templates(name).items():
        pod, own = template["spec"]["securityContext"], container(template)["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] > 0, group
        assert (own["allowPrivilegeEscalation"], own["capabilities"]) == (False, {"drop": ["ALL"]}), group


@every_file
def test_every_volume_is_mounted_and_every_claim_is_there(name: str) -> None:
    claims = {d["metadata"]["name"]: d["spec"] for d in documents(name) if d["kind"] == "PersistentVolumeClaim"}
    used = set()
    for group in groups(name):
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        assert set(volumes) == {mount["name"] for mount in container(group["template"]).get("volumeMounts", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                used.add(claim["claimName"])
                many = len(groups(name)) > 1 or group["maxReplicas"] > 1
                assert claims[claim["claimName"]]["accessModes"] == ["ReadWriteMany" if many else "ReadWriteOnce"]
    assert used == set(claims)


@every_file
def test_head_has_no_work_and_no_traffic(name: str) -> None:
    assert cluster(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service(name)["spec"]["excludeHeadPodFromServeSvc"]
    # KubeRay takes the service's ports from these, and its own names where there are none.
    assert "ports" not in container(templates(name)["head"])


@every_file
def test_versions_are_the_ones_that_the_image_has(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [d.partition("==")[2] for d in project["dependencies"] if d.startswith("ray[")]
    images = {container(template)["image"] for template in templates(name).values()}
    extra = "cpu" if resolved(name).accelerator == "cpu" else "gpu"

    assert cluster(name)["rayVersion"] == ray
    assert {image.rpartition("/")[2] for image in images} == {f"epd-serve:{project['version']}-{extra}"}


# ---- Ray Serve and this application


@every_file
def test_ray_serve_takes_every_key(name: str) -> None:
    assert keys_that_ray_would_drop(serve_config(name)) == []
    ServeDeploySchema.model_validate(serve_config(name))


@every_file
def test_args_make_the_topology_that_the_deployments_name(name: str) -> None:
    config = parse(application(name)["args"])
    check_vllm_args(config)

    assert config.topology == VARIANTS[name]
    assert [deployment["name"] for deployment in application(name)["deployments"]] == [
        "Ingress",
        *(stage.capitalize() for stage in config.stages),
    ]


@every_file
def test_serve_listens_where_kuberay_looks(name: str) -> None:
    assert serve_config(name)["http_options"] == {"host": "0.0.0.0", "port": 8000}
    for group in groups(name):
        assert {"name": "serve", "containerPort": 8000} in container(group["template"])["ports"]


@every_file
def test_nothing_is_left_to_what_the_cluster_has_when_it_is_read(name: str) -> None:
    """Then there is only the head."""
    config = parse(application(name)["args"])

    assert config.accelerator != "auto" and config.model is not None
    assert all(stage.cpus_per_replica is not None for stage in config.stages.values())
    assert config.accelerator == "cpu" or all(s.gpus_per_replica is not None for s in config.stages.values())


def stages_of(name: str) -> dict[str, list[StageConfig]]:
    """The stages of which a pod of the group can have a replica, by group."""
    stages = resolved(name).stages
    of = {
        group["groupName"]: [s for s in stages.values() if s.label_selector.items() <= group.get("labels", {}).items()]
        for group in groups(name)
        if group.get("labels") != {"epd-stage": "ingress"}
    }
    assert all(of.values())
    return of


def gib(quantity: str) -> int:
    """Bytes of what Kubernetes writes as 8Gi."""
    return int(quantity.removesuffix("Gi")) << 30


def volume_at(template: dict[str, Any], path: Path) -> dict[str, Any]:
    """The volume that a container finds there."""
    mounts = {mount["mountPath"]: mount["name"] for mount in container(template).get("volumeMounts", [])}
    (inside,) = [mount for mount in mounts if path.is_relative_to(mount)]
    (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mounts[inside]]
    return dict(volume)


@every_file
def test_embeddings_have_room(name: str) -> None:
    """Buffers in each pod's /dev/shm, beside Ray's objects; or a folder, which is one pod's own here."""
    config = resolved(name)
    for group in groups(name):
        stages = stages_of(name).get(group["groupName"], [])
        if not stages or (config.ec.uses_folder and config.ec.storage_path is None):
            continue  # the temp folder
        assert config.ec.uses_nixl or len(groups(name)) == 1, "a folder that several pods have takes a shared volume"
        where = Path("/dev/shm") if config.ec.uses_nixl else folder_of(config).path
        room = volume_at(group["template"], where)["emptyDir"]
        objects = int(group["rayStartParams"]["object-store-memory"]) if config.ec.uses_nixl else 0
        each = config.ec.buffer_bytes * len(stages) if config.ec.uses_nixl else config.ec.folder_bytes
        assert room["medium"] == "Memory"  # on a disk an engine's step waits for it
        assert gib(room["sizeLimit"]) >= objects + each + (1 << 30), group["groupName"]


@every_file
def test_what_is_kept_in_memory_leaves_pods_room_for_their_processes(name: str) -> None:
    """KubeRay adds a /dev/shm where there is none; Ray's objects take 30 % of the pod's memory unless told otherwise."""
    for group in groups(name):
        memory = gib(container(group["template"])["resources"]["limits"]["memory"])
        kept = sum(
            gib(v["emptyDir"]["sizeLimit"]) for v in group["template"]["spec"].get("volumes", []) if "emptyDir" in v
        )
        if "object-store-memory" not in group["rayStartParams"]:
            kept += memory * 3 // 10
        assert kept <= memory // 2, group["groupName"]


@every_file
def test_what_is_compiled_outlives_the_pod(name: str) -> None:
    """In the volume of the models, which is there before the next pod. The demo model compiles nothing."""
    if resolved(name).accelerator == "cpu":
        return
    for group in groups(name):
        env = {entry["name"]: entry.get("value") for entry in container(group["template"])["env"]}
        for variable in ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
            assert "persistentVolumeClaim" in volume_at(group["template"], Path(env[variable])), variable


def test_nixl_has_its_cores() -> None:
    """A thread of each of its agents never sleeps on a card: one for embeddings, one for KV blocks. And one for Ray."""
    for name in ("rayservice.yaml", "rayservice-one-gpu.yaml", "rdma.patch"):
        config = resolved(name)
        for group in groups(name):
            stages = stages_of(name).get(group["groupName"], [])
            agents = sum(config.ec.uses_nixl + (config.prefill is not None and s != config.encoder) for s in stages)
            claimed = sum(s.cpus_per_replica or 0 for s in stages)
            if len(groups(name)) == 1 or not stages:
                claimed += config.ingress_cpus or 0
            cpus = int(container(group["template"])["resources"]["requests"]["cpu"])
            assert not stages or cpus >= claimed + agents + 1, (name, group["groupName"])


def test_stages_that_hand_on_kv_blocks_have_rdma_or_one_pod() -> None:
    """cudaIpc does not cross pods: what is left is TCP, 0.5 to 1 GB/s."""
    for name in ("rayservice.yaml", "rayservice-one-gpu.yaml", "rdma.patch"):
        of = stages_of(name)
        config = resolved(name)
        if config.prefill is None or any(config.prefill in s and config.decode in s for s in of.values()):
            continue
        for group in groups(name):
            has = "rdma/ib" in container(group["template"])["resources"]["limits"]
            assert has == (group["groupName"] in ("prefill", "decode")), group["groupName"]


def test_ingress_keeps_the_environment_that_its_options_here_replace() -> None:
    (options,) = [
        d["ray_actor_options"] for d in application("rayservice.yaml")["deployments"] if d["name"] == "Ingress"
    ]
    assert options["runtime_env"] == {"env_vars": ONE_LOOP}


# ---- secrets


def secret_of(template: dict[str, Any], variable: str) -> dict[str, Any] | None:
    for entry in container(template).get("env", []):
        if entry["name"] == variable:
            return dict(entry["valueFrom"]["secretKeyRef"])  # never a plain value
    return None


@pytest.mark.parametrize("name", ["rayservice.yaml", "rayservice-one-gpu.yaml", "rdma.patch"])
def test_keys_come_from_the_secret_and_only_where_they_are_used(name: str) -> None:
    ingress = [g["template"] for g in groups(name) if g.get("labels", {}).get("epd-stage") in (None, "ingress")]
    for group in groups(name):
        key = secret_of(group["template"], "VLLM_API_KEY")
        assert key == ({"name": "epd-secrets", "key": "api-key"} if group["template"] in ingress else None)
        token = {"name": "epd-secrets", "key": "hf-token", "optional": True}
        assert secret_of(group["template"], "HF_TOKEN") == token
    assert "api_key" not in service(name)["spec"]["serveConfigV2"].replace("`api_key`", "")


def commented(name: str, stages: Iterable[str]) -> dict[str, Any]:
    """What a comment of the file says to write in place of these stages."""
    lines = [re.findall(rf"^ *#   ({stage}: .*)$", text_of(name), re.MULTILINE) for stage in stages]
    return {key: value for (line,) in lines for key, value in yaml.safe_load(line).items()}


def test_two_cards_in_one_pod_as_the_comment_has_it() -> None:
    name = "rayservice-one-gpu.yaml"
    args = application(name)["args"] | commented(name, ("encoder", "prefill", "decode"))
    config = resolve(parse(args), Cluster(gpus=2, cpus=8)).config
    claims = {stage: actor_options(c, config.accelerator)["num_gpus"] for stage, c in config.stages.items()}

    assert claims["encoder"] + claims["prefill"] <= 1  # on one card
    assert claims["decode"] == 1
    assert sum(claims.values()) == 2
    assert all(
        args[stage]["cpus_per_replica"] == application(name)["args"][stage]["cpus_per_replica"] for stage in claims
    )


def test_a_small_card_can_do_without_prefill() -> None:
    args = application("rayservice-one-gpu.yaml")["args"]
    decode = args["decode"] | {"gpus_per_replica": 1 - args["encoder"]["gpus_per_replica"]}
    assert parse(args | {"prefill": None, "decode": decode}).topology == "E+PD"


# ---- leaving


@every_file
def test_a_pod_that_leaves_has_the_time_for_what_its_replicas_hold(name: str) -> None:
    """preStop tells Ray less than the pod has, and more than a replica may take to end."""
    ours = resolved(name).timeouts.drain_s
    graceful = max(
        deployment.get("graceful_shutdown_timeout_s", ours) for deployment in application(name)["deployments"]
    )
    for group in groups(name):
        script, seconds = container(group["template"])["lifecycle"]["preStop"]["exec"]["command"]
        assert (ROOT / Path(script).relative_to("/app")).is_file()
        assert graceful < int(seconds) < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_an_old_cluster_stays_until_its_requests_are_answered() -> None:
    spec = service("rayservice.yaml")["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] > resolved("rayservice.yaml").timeouts.request_s


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`ray` writes down what it is called with, `pgrep` finds a raylet twice, then none."""
    for program, text in {
        "ray": 'echo "$*" >>"$CALLS"; exit "${RAY_FAILS:-0}"',
        "pgrep": 'echo "pgrep $*" >>"$CALLS"; [ "$(grep -c pgrep "$CALLS")" -lt 3 ]',
        "sleep": ":",
    }.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / program).chmod(0o755)
    return tmp_path


def drain(programs: Path, **env: str) -> tuple[int, list[str]]:
    calls = programs / "calls"
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "RAY_ADDRESS": "head:6379",
        "HOSTNAME": "pod-1",
    }
    result = subprocess.run([K8S / "drain.sh", "840"], env=environment | env, capture_output=True, timeout=60)
    return result.returncode, calls.read_text().splitlines()


def test_drain_tells_ray_the_deadline_and_waits_for_the_raylet_to_end(programs: Path) -> None:
    code, (told, *waited) = drain(programs)

    assert code == 0
    assert told.startswith("drain-node --address head:6379 --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert told.endswith("--deadline-remaining-seconds 840")
    assert waited == ["pgrep -x raylet"] * 3


def test_drain_that_ray_refuses_ends_at_once(programs: Path) -> None:
    code, calls = drain(programs, RAY_FAILS="1")
    assert code != 0 and len(calls) == 1


def test_ray_has_the_command_that_drain_calls() -> None:
    from ray.scripts.scripts import cli

    script = (K8S / "drain.sh").read_text()
    options = {option for parameter in cli.commands["drain-node"].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", script)) <= options


# ---- room


def replicas(name: str, which: str) -> list[tuple[str, dict[str, Any]]]:
    """Deployment and claims of each replica; ``which``: min or max."""
    config = resolved(name)
    claims = {stage.capitalize(): actor_options(c, config.accelerator) for stage, c in config.stages.items()}
    claims["Ingress"] = {"num_cpus": config.ingress_cpus}
    wanted = []
    for deployment in application(name)["deployments"]:
        scaling = deployment.get("autoscaling_config") or dict.fromkeys(
            ("min_replicas", "max_replicas"), deployment.get("num_replicas", 1)
        )
        options = deployment.get("ray_actor_options") or claims[deployment["name"]]
        wanted += [(deployment["name"], options)] * scaling[f"{which}_replicas"]
    return wanted


def pods_for(name: str, claims: list[dict[str, Any]]) -> Counter[str]:
    """Pods per group in which Ray's autoscaler would place replicas. Fails where it could not place them all."""
    config = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "epd", "namespace": "d"}, "spec": cluster(name)}),
        skip_content_hash=True,
    )
    requests = []
    for options in claims:
        resources = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
        labels = [
            (key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value])
            for key, value in options.get("label_selector", {}).items()
        ]
        shape = {key: amount for key, amount in resources.items() if amount} | options.get("resources", {})
        requests.append(ResourceRequestUtil.make(shape, label_selectors=[labels] if labels else None))
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    assert reply.infeasible_resource_requests == []
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


@every_file
@pytest.mark.parametrize("which", ["min", "max"])
def test_the_groups_have_room_for_all_replicas(name: str, which: str) -> None:
    wanted = replicas(name, which)
    pods = pods_for(name, [options for _, options in wanted])

    for group in groups(name):
        assert group["minReplicas"] <= pods[group["groupName"]] <= group["maxReplicas"]


@every_file
def test_a_pod_is_there_where_ray_builds_the_application(name: str) -> None:
    """Ray pins the task to the nodes that all selectors under `deployments:` agree on. It claims nothing, so that the
    autoscaler need not bring a pod for it."""
    selector = _get_shared_build_app_label_selector(ServeApplicationSchema.model_validate(application(name))) or {}
    there = [g for g in groups(name) if g["minReplicas"] and selector.items() <= g.get("labels", {}).items()]
    assert there


@every_file
def test_a_replica_that_finds_no_group_is_seen(name: str) -> None:
    (_, options), *_ = replicas(name, "min")
    for lost in ({"num_cpus": 99}, options | {"label_selector": {"epd-stage": "nowhere"}}):
        with pytest.raises(AssertionError):
            pods_for(name, [lost])


@pytest.mark.parametrize("name", ["rayservice.yaml", "rdma.patch"])
def test_each_stage_has_pods_of_its_own_group_and_one_to_spare(name: str) -> None:
    largest = Counter(deployment for deployment, _ in replicas(name, "max"))
    for deployment, options in dict(replicas(name, "min")).items():
        group = deployment.lower()
        assert pods_for(name, [options] * 3) == pods_for(name, []) | Counter({group: 3})
        (spec,) = [g for g in groups(name) if g["groupName"] == group]
        assert spec["maxReplicas"] == largest[deployment] + 1


@every_file
def test_pods_ask_kubernetes_for_what_ray_thinks_they_have(name: str) -> None:
    for group, template in templates(name).items():
        resources = container(template)["resources"]
        assert resources["requests"].keys() == resources["limits"].keys() >= {"cpu", "memory"}, group
        assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu"), group


# ---- image


def dockerfile() -> list[str]:
    """Instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", (K8S / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def test_image_starts_from_one_version_of_the_python_that_is_tested() -> None:
    (base,) = [line.split()[1] for line in dockerfile() if line.startswith("FROM")]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)


def test_image_runs_as_the_user_of_the_pods() -> None:
    *_, user = dockerfile()
    ids = {template["spec"]["securityContext"]["runAsUser"] for name in FILES for template in templates(name).values()}
    assert {user} == {f"USER {number}" for number in ids}


def test_image_has_what_is_copied_into_it_and_nothing_is_left_out() -> None:
    kept = re.findall(r"^!(\S+)", (K8S / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    sources = [s for line in dockerfile() if line.startswith("COPY") for s in line.split()[1:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).is_relative_to(keep) for keep in kept), source
    assert {Path(source).parts[0] for source in sources} >= {"serve_app", "deployments", "scripts", "k8s"}
    assert all((ROOT / keep).exists() for keep in kept)


def test_image_is_set_up_like_a_checkout() -> None:
    text = "\n".join(dockerfile())
    assert "ARG EPD_EXTRA=gpu" in text
    assert "EPD_EXTRA=$EPD_EXTRA EPD_DEV=0 PIP_NO_CACHE_DIR=1 bash scripts/setup.sh" in text
    assert "PATH=/app/.venv/bin:$PATH" in text


def test_image_of_the_gpu_build_gets_its_kernels_before_it_gives_up_root() -> None:
    """Without a card vLLM has to be told which platform it is on, and torch would load a module that is copied later."""
    lines = dockerfile()
    (kernels,) = [i for i, line in enumerate(lines) if "vllm download-kernels" in line]
    code = next(i for i, line in enumerate(lines) if line.startswith("COPY serve_app serve_app"))

    assert "ARG EPD_KERNELS=1" in lines
    assert '[ "$EPD_EXTRA" = gpu ] && [ "$EPD_KERNELS" = 1 ]' in lines[kernels]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 VLLM_TARGET_DEVICE=cpu" in lines[kernels]
    assert kernels < code < len(lines) - 1


def test_vllm_has_the_command_that_the_image_calls() -> None:
    from vllm.entrypoints.cli.download_kernels import DownloadKernelsSubcommand

    assert DownloadKernelsSubcommand.name == "download-kernels"


# ---- docs/kubernetes.md (its links: test_docs.py)

PAGE = (ROOT / "docs/kubernetes.md").read_text()
COMMANDS = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL))


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_files_of_the_page_exist() -> None:
    for name in re.findall(r"\bk8s/[\w.-]+", COMMANDS):
        assert (ROOT / name).is_file(), name
    for name in (code for code in CODE if re.fullmatch(r"[\w-]+\.(yaml|sh|patch)", code)):
        assert (K8S / name).is_file(), name


def test_every_file_is_on_the_page() -> None:
    for path in K8S.iterdir():
        assert path.name == "Dockerfile.dockerignore" or f"(../k8s/{path.name})" in PAGE, path.name


def test_keys_on_the_page_exist() -> None:
    """As fields of KubeRay, Kubernetes or Ray Serve in the files, or as keys of this application."""
    known = keys_of(SCHEMA) | {"num_replicas", "gcsFaultToleranceOptions"} | set(EPDConfig.model_fields)
    for name in VARIANTS:
        known |= keys_of(documents(name)) | keys_of(serve_config(name))
    for code in CODE:
        key = code.partition(":")[0]
        if re.fullmatch(r"[a-z]+(_[a-z]+)+|[a-z]+([A-Z][a-z]+)+", key):
            assert key in known, code


def test_names_on_the_page_are_the_ones_in_the_files() -> None:
    names = {service(name)["metadata"]["name"] for name in FILES}
    (only,) = names
    assert set(re.findall(r"rayservice[/ ](\w+)", COMMANDS)) == names
    assert set(re.findall(r"service/(\S+-svc)", COMMANDS)) == {f"{only}-serve-svc"}
    index, group = re.findall(r"workerGroupSpecs/(\d+)/.*ray\.io/group=(\w+)", COMMANDS, re.DOTALL)[0]
    assert groups("rayservice.yaml")[int(index)]["groupName"] == group
    assert set(re.findall(r"-c (ray-\w+)", COMMANDS)) == {container(templates("rayservice.yaml")["head"])["name"]}
    images = {container(template)["image"] for name in FILES for template in templates(name).values()}
    assert set(re.findall(r"-t (\S+)", COMMANDS)) == images
    secrets = {code for code in CODE if f"{code}=" in COMMANDS}
    assert secrets == set(re.findall(r"--from-literal=([\w-]+)=", COMMANDS)) == {"api-key", "hf-token"}
    deployments = {deployment["name"] for deployment in application("rayservice.yaml")["deployments"]}
    assert deployments <= set(CODE)
