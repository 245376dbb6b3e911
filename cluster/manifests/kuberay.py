"""Kubernetes by KubeRay: a RayJob, or a RayCluster that takes jobs.

Fields are those of ray.io/v1 as of KubeRay 1.6. Every node asks for the cluster's token, which
KubeRay makes. Pods run as a user without rights and have as much time to end as a checkpoint takes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from cluster.manifests.deployment import (
    DRAIN_S,
    HOME,
    Deployment,
    ManifestError,
    check_image,
    check_name,
    to_yaml,
)

_ADDRESS = re.compile(r"[\w.-]+:\d+")

_HEAD_CPUS = 4
_HEAD_MEMORY_GIB = 16
_SPARE_CPUS = 2
"""Of a node with workers: Ray's own processes."""
_SHM_GIB = 16
_RETRIES = 3
_KEEP_FAILED_S = 3600
_USER = 1000
_HEADING = """\
{kind} {name}: {nodes} with {workers}, by python -m cluster.manifests.
{how}
Needs KubeRay 1.6 or newer, in whose namespaces its operator works, and the NVIDIA device plugin.
Credentials of store and tracker come from the Secret named under envFrom, if there is one."""


@dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """What is known of the Kubernetes cluster.

    Attributes:
        image: The container's image, which has this project (`cluster.manifests container`).
        secret: Name of a Secret whose keys become environment variables; None for none.
        claim: Name of a PersistentVolumeClaim (ReadWriteMany) that all pods mount; None for none.
        claim_path: Where they mount it.
        redis: Address of a Redis that keeps what Ray's head knows, `host:port`; None for none.
        redis_secret: Name of a Secret with its password, by the key `password`; None for none.
        scheduler: Whose queue the job waits in; None has no queue.
        queue: Name of that queue.
    """

    image: str
    secret: str | None = None
    claim: str | None = None
    claim_path: str = "/shared"
    redis: str | None = None
    redis_secret: str | None = None
    scheduler: Literal["kueue", "volcano"] | None = None
    queue: str | None = None

    def __post_init__(self) -> None:
        check_image(self.image)
        check_name("--secret", self.secret)
        check_name("--claim", self.claim)
        check_name("--redis-secret", self.redis_secret)
        check_name("--queue", self.queue)
        if not self.claim_path.startswith("/"):
            raise ManifestError(f"--claim-path is {self.claim_path!r}; it begins with /")
        if self.redis is not None and not _ADDRESS.fullmatch(self.redis):
            raise ManifestError(f"--redis is {self.redis!r}; write HOST:PORT, without a password")
        if (self.scheduler is None) != (self.queue is None):
            raise ManifestError(
                f"scheduler {self.scheduler} and queue {self.queue} go together; write "
                "--queue kueue:NAME or --queue volcano:NAME"
            )
        if self.redis_secret is not None and self.redis is None:
            raise ManifestError("--redis-secret is the password of --redis HOST:PORT; give both")


def ray_job(job: Deployment, place: Kubernetes) -> str:
    """A RayJob: its own cluster, started anew when the job fails, and gone when it is done."""
    spec: dict[str, Any] = {
        "entrypoint": job.entrypoint,
        # Each of them goes on from the newest checkpoint, on a cluster of its own.
        "backoffLimit": _RETRIES,
        "submissionMode": "K8sJobMode",
        "runtimeEnvYAML": yaml.safe_dump(
            {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_grace_s)}}
        ),
        **_ending(place),
        "rayClusterSpec": _cluster_spec(job, place),
    }
    how = f"kubectl apply -f FILE; kubectl get rayjob {job.name}; kubectl delete rayjob {job.name}"
    return _document("RayJob", job, place, spec, how=how)


def ray_cluster(job: Deployment, place: Kubernetes) -> str:
    """A RayCluster with the job's nodes, which takes one job after the other."""
    how = (
        f"kubectl port-forward service/{job.name}-head-svc 8265\n"
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret "
        f"{job.name} -o jsonpath='{{.data.auth_token}}' | base64 -d)\n"
        "python -m cluster.jobs submit --address http://127.0.0.1:8265 -- "
        f"{job.entrypoint}"
    )
    return _document("RayCluster", job, place, _cluster_spec(job, place), how=how)


def _document(
    kind: str, job: Deployment, place: Kubernetes, spec: Mapping[str, Any], *, how: str
) -> str:
    metadata: dict[str, Any] = {"name": job.name, "labels": _queue_labels(place)}
    if not metadata["labels"]:
        del metadata["labels"]
    heading = _HEADING.format(
        kind=kind,
        name=job.name,
        nodes=f"{job.nodes} node{'s' * (job.nodes > 1)}",
        workers=f"{job.workers} worker{'s' * (job.workers > 1)}",
        how=how,
    )
    return to_yaml(
        {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec},
        heading=heading,
    )


def _queue_labels(place: Kubernetes) -> dict[str, str]:
    if place.scheduler == "kueue":
        return {"kueue.x-k8s.io/queue-name": str(place.queue)}
    if place.scheduler == "volcano":
        return {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": str(place.queue)}
    return {}


def _ending(place: Kubernetes) -> dict[str, Any]:
    """What becomes of the cluster when the job is done.

    KubeRay takes rules or the plain shutdown; Kueue holds a job back by suspending it, which
    KubeRay takes with the latter alone.
    """
    if place.scheduler == "kueue":
        return {"suspend": True, "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 60}
    failed = {"jobStatus": "FAILED"}
    return {
        "deletionStrategy": {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}},
                # GPUs at once; the head, with its logs, later.
                {"policy": "DeleteWorkers", "condition": failed},
                {"policy": "DeleteCluster", "condition": failed | {"ttlSeconds": _KEEP_FAILED_S}},
            ]
        }
    }


def _cluster_spec(job: Deployment, place: Kubernetes) -> dict[str, Any]:
    spec: dict[str, Any] = {"rayVersion": job.ray, "authOptions": {"mode": "token"}}
    if place.redis is not None:
        spec["gcsFaultToleranceOptions"] = {"redisAddress": place.redis}
        if place.redis_secret is not None:
            reference = {"name": place.redis_secret, "key": "password"}
            spec["gcsFaultToleranceOptions"]["redisPassword"] = {
                "valueFrom": {"secretKeyRef": reference}
            }
    head = {"cpu": str(_HEAD_CPUS), "memory": f"{_HEAD_MEMORY_GIB}Gi"}
    spec["headGroupSpec"] = {
        # No worker goes there; who has no token is refused on all addresses.
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _pod(job, place, container="ray-head", resources=head, ports=True),
    }
    spec["workerGroupSpecs"] = [
        {
            "groupName": "gpu" if job.gpus_per_node else "cpu",
            "replicas": job.nodes,
            "minReplicas": job.nodes,
            "maxReplicas": job.nodes,
            "rayStartParams": {
                "num-cpus": str(job.cpus_per_node),
                "num-gpus": str(job.gpus_per_node),
            },
            "template": _pod(
                job, place, container="ray-worker", resources=_worker_resources(job), ports=False
            ),
        }
    ]
    return spec


def _worker_resources(job: Deployment) -> dict[str, str]:
    resources = {"cpu": str(job.cpus_per_node + _SPARE_CPUS)}
    if job.memory_gib is not None:
        resources["memory"] = f"{int(job.memory_gib)}Gi"
    if job.gpus_per_node:
        resources["nvidia.com/gpu"] = str(job.gpus_per_node)
    return resources


def _pod(
    job: Deployment,
    place: Kubernetes,
    *,
    container: str,
    resources: Mapping[str, str],
    ports: bool,
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHM_GIB}Gi"}},
        {"name": "home", "emptyDir": {}},
    ]
    mounts = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "home", "mountPath": HOME},
    ]
    if place.claim is not None:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": place.claim}})
        mounts.append({"name": "shared", "mountPath": place.claim_path})
    main: dict[str, Any] = {
        "name": container,
        "image": place.image,
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        # As much as they ask for, so that they are the last to be evicted.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    if ports:
        numbers = {"gcs-server": 6379, "dashboard": 8265}
        main["ports"] = [
            {"name": name, "containerPort": number} for name, number in numbers.items()
        ]
    if place.secret is not None:
        main["envFrom"] = [{"secretRef": {"name": place.secret}}]
    return {
        "spec": {
            "terminationGracePeriodSeconds": job.stop_grace_s + DRAIN_S,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [main],
            "volumes": volumes,
        }
    }
