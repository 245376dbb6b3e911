"""What KubeRay takes: the fields that manifests use, strictly, and its operator's own rules.

Pods are Kubernetes' own kind, so those of a manifest are held against its schemas too.

`python -m tests.support.kuberay ARCHIVE` holds manifests against the real CRDs: KubeRay's own
schemas, which pass over a field they do not know, made strict. `.ci/run` does, if KUBERAY_CRDS
names an archive, and else says that nothing was checked.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from pipelines.console import say
from trainer.cli.manifests import main as manifests

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^\d+(Gi)?$"}
NAME = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Any:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: Any, least: int = 1) -> Any:
    """A list."""
    return {"type": "array", "items": item, "minItems": least}


RESOURCES = fields({"cpu": QUANTITY}, {"memory": QUANTITY, "nvidia.com/gpu": QUANTITY})
CONTAINER = fields(
    {
        "name": NAME,
        "image": TEXT,
        "env": several(fields({"name": TEXT, "value": TEXT})),
        "resources": fields({"requests": RESOURCES, "limits": RESOURCES}),
        "securityContext": fields(
            {
                "allowPrivilegeEscalation": {"const": False},
                "capabilities": fields({"drop": {"const": ["ALL"]}}),
            }
        ),
        "volumeMounts": several(fields({"name": NAME, "mountPath": TEXT})),
    },
    {
        "ports": several(fields({"name": NAME, "containerPort": COUNT})),
        "envFrom": several(fields({"secretRef": fields({"name": TEXT})})),
    },
)
VOLUME = fields(
    {"name": NAME},
    {
        "emptyDir": fields({}, {"medium": {"const": "Memory"}, "sizeLimit": QUANTITY}),
        "persistentVolumeClaim": fields({"claimName": TEXT}),
    },
)
POD = fields(
    {
        "spec": fields(
            {
                "terminationGracePeriodSeconds": COUNT,
                "automountServiceAccountToken": {"const": False},
                "securityContext": fields(
                    {
                        "runAsNonRoot": {"const": True},
                        "runAsUser": COUNT,
                        "runAsGroup": COUNT,
                        "fsGroup": COUNT,
                        "seccompProfile": fields({"type": {"const": "RuntimeDefault"}}),
                    }
                ),
                "containers": several(CONTAINER),
                "volumes": several(VOLUME),
            }
        )
    }
)
PASSWORD = fields({"valueFrom": fields({"secretKeyRef": fields({"name": TEXT, "key": TEXT})})})
CLUSTER = fields(
    {
        "rayVersion": TEXT,
        "authOptions": fields({"mode": {"const": "token"}}),
        "headGroupSpec": fields({"rayStartParams": TEXTS, "template": POD}),
        "workerGroupSpecs": several(
            fields(
                {
                    "groupName": NAME,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": TEXTS,
                    "template": POD,
                }
            )
        ),
    },
    {"gcsFaultToleranceOptions": fields({"redisAddress": TEXT}, {"redisPassword": PASSWORD})},
)
RULE = fields(
    {
        "policy": {"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]},
        "condition": fields(
            {"jobStatus": {"enum": ["SUCCEEDED", "FAILED"]}}, {"ttlSeconds": COUNT}
        ),
    }
)
JOB = fields(
    {
        "entrypoint": TEXT,
        "backoffLimit": COUNT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
        "runtimeEnvYAML": TEXT,
        "rayClusterSpec": CLUSTER,
    },
    {
        "suspend": {"type": "boolean"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "deletionStrategy": fields({"deletionRules": several(RULE)}),
    },
)
VERSIONS = ("1.28", "1.37")
"""Of Kubernetes: an old one, and the newest whose schemas are known."""
SPECS = {"RayJob": JOB, "RayCluster": CLUSTER}
LONGEST = {"RayJob": 47, "RayCluster": 53}


def document(kind: str) -> Any:
    """The strict schema of a manifest."""
    metadata = fields({"name": NAME | {"maxLength": LONGEST[kind]}}, {"labels": TEXTS})
    return fields(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": metadata,
            "spec": SPECS[kind],
        }
    )


def check(manifest: Mapping[str, Any]) -> None:
    """Holds a manifest against the fields, and against what the operator refuses beyond them."""
    jsonschema.Draft202012Validator(document(manifest["kind"])).validate(manifest)
    spec = manifest["spec"]
    job = manifest["kind"] == "RayJob"
    cluster = spec["rayClusterSpec"] if job else spec
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        _check_pod(group["template"]["spec"])
        check_template(group["template"])
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if job:
        _check_ending(spec)
        assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)


def check_template(template: Mapping[str, Any]) -> None:
    """Holds the template of a pod against Kubernetes' schemas, made strict, of several versions."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)


def _check_pod(pod: Mapping[str, Any]) -> None:
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert len({*volumes}) == len(volumes)
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == {*volumes}
        names = [variable["name"] for variable in container["env"]]
        assert len({*names}) == len(names)
        # KubeRay's own, which it refuses or overwrites.
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_REDIS_ADDRESS", "RAY_ADDRESS"} & {
            *names
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]


def _check_ending(spec: Mapping[str, Any]) -> None:
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    assert not (rules and spec.get("shutdownAfterJobFinishes"))
    assert spec.get("shutdownAfterJobFinishes") or not spec.get("suspend")
    seen = [(rule["condition"]["jobStatus"], rule["policy"]) for rule in rules]
    assert len({*seen}) == len(seen)
    after = {
        (rule["condition"]["jobStatus"], rule["policy"]): rule["condition"].get("ttlSeconds", 0)
        for rule in rules
    }
    for status in ("SUCCEEDED", "FAILED"):
        order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
        times = [after[status, policy] for policy in order if (status, policy) in after]
        assert times == sorted(times)


STORED = ("store.uri=s3://bucket/prefix", "tracking.uri=http://mlflow:5000")
JOBS = (
    ("+exp=imagenet_xl", "cluster=h100_8x8"),
    ("+exp=imagenet_xl", "cluster=h100_128x8", "train.global_batch=1024"),
    (
        "+exp=imagenet_xl",
        "cluster=one_24gb",
        "run=1_Strange/Name--of-more-than-40-letters-" + "x" * 9,
    ),
    ("+exp=digits", "cluster.gpus_per_worker=0", "checkpoint.grace_s=600"),
)
OPTIONS = (
    (),
    ("--secret", "s3-and-mlflow", "--queue", "kueue:research"),
    ("--queue", "volcano:research", "--memory", "64"),
    ("--redis", "redis:6379", "--redis-secret", "redis", "--claim", "shared"),
)
IMAGE = "registry.example.org:5000/lapflow:1"


def written(*words: str) -> str:
    """What `python -m cluster.manifests` writes."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = manifests(words)
    assert code == 0, words
    return out.getvalue()


def all_manifests() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Manifests of all kinds, jobs and options, each with its words.

    Each kind has all jobs and all options, but not each job with each option: no field depends on
    both.
    """
    for (shift, kind), place in product(enumerate(("kuberay", "raycluster")), range(len(JOBS))):
        options, job = OPTIONS[(place + shift) % len(OPTIONS)], JOBS[place]
        words = (kind, "--image", IMAGE, *options, *job, *STORED)
        yield words, yaml.safe_load(written(*words))


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses what it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        # ObjectMeta is checked by Kubernetes itself, and stands here without its fields.
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def crds(archive: Path) -> dict[str, Any]:
    """The strict schemas of ray.io/v1 in an archive of KubeRay's CRDs, by kind."""
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            if not re.fullmatch(r"[\w./-]+\.yaml", member.name) or not member.isfile():
                continue
            content = files.extractfile(member)
            assert content is not None
            crd = next(yaml.load_all(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
            (version,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1")
            found[crd["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    for schema in found.values():
        schema["properties"]["metadata"] = {"type": "object"}
    return found


def main(arguments: list[str]) -> int:
    """Runs the check, and says whether there was one."""
    if not any(arguments):
        say("manifests: not checked against KubeRay's CRDs, KUBERAY_CRDS names no archive")
        return 0
    archive = Path(arguments[0])
    if not archive.is_file():
        say(f"error: KUBERAY_CRDS={archive}: there is no such archive")
        return 2
    validators = {
        kind: jsonschema.Draft202012Validator(schema) for kind, schema in crds(archive).items()
    }
    count = 0
    for words, manifest in all_manifests():
        for error in validators[manifest["kind"]].iter_errors(manifest):
            say(f"{' '.join(words)}: {error.json_path}: {error.message}")
            return 1
        count += 1
    say(f"manifests: {count} checked against KubeRay's CRDs, made strict")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
