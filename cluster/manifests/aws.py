"""AWS by Ray's own cluster launcher: a file for `ray up`."""

from dataclasses import dataclass
from typing import Any

from cluster.manifests.deployment import FOLDER, Deployment, check_image, check_name, to_yaml

_PORT = 6379
_USER_HOME = "/home/ray"
_DISK_GB = {"head": 100, "worker": 1000}
_HEADING = """\
{name}: {nodes} of {instance} with {workers} workers, for Ray's cluster launcher.
(umask 077; ray get-auth-token --generate > /dev/null); export RAY_AUTH_MODE=token
ray up FILE; ray dashboard FILE    forwards port 8265 by SSH, as nothing but SSH is open
python -m cluster.jobs submit --address http://127.0.0.1:8265 --working-dir . -- \\
    {entrypoint}
ray down FILE
The profile lets a node reach the store, and the head start nodes.{spot}"""
_SPOT = """
Each spot instance asks EC2 whether it is taken away, and has Ray know (cluster.spot_notice): runs
then save at once. One that ends without a notice is a node lost, at most a checkpoint's interval.
What it heard is in /tmp/spot_notice.log, in the container."""
_WATCH = (
    f"cd {FOLDER} && {{ RAY_AUTH_MODE=token setsid nohup flock --nonblock /tmp/spot_notice.lock "
    "python -m cluster.spot_notice >> /tmp/spot_notice.log 2>&1 < /dev/null & }"
)
"""It outlives the terminal of the command, and is there once, however often `ray up` is called."""
_UNHEARD = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""It is for SIGTERM at `ray start --block`. Here the first process of a container is a terminal's
shell, which heeds no SIGTERM and passes none on."""


@dataclass(frozen=True, kw_only=True)
class Aws:
    """What is known of the AWS account.

    Attributes:
        image: The container's image, which has this project (`cluster.manifests container`).
        region: Region.
        instance: Instance type of nodes with workers.
        head_instance: Instance type of the head.
        ami: Machine image with Docker and, for GPUs, NVIDIA's driver and container toolkit.
        profile: Name of the instance profile of all nodes.
        spot: Whether nodes with workers are spot instances.
    """

    image: str
    region: str
    instance: str
    ami: str
    profile: str
    head_instance: str = "m7i.2xlarge"
    spot: bool = False

    def __post_init__(self) -> None:
        check_image(self.image)
        for name in ("region", "instance", "head_instance", "ami", "profile"):
            check_name(f"--{name.replace('_', '-')}", getattr(self, name))


def cluster_yaml(job: Deployment, place: Aws) -> str:
    """A file for `ray up`: a head without workers, and the nodes of the job."""
    worker = _node(place, place.instance, _DISK_GB["worker"])
    if place.spot:
        worker["InstanceMarketOptions"] = {"MarketType": "spot"}
    exports = " ".join(f"{name}={value}" for name, value in _environment(job).items())
    start = f"ulimit -n 65536; {exports} ray start"
    values: dict[str, Any] = {
        "cluster_name": job.name,
        "max_workers": job.nodes,
        "provider": {"type": "aws", "region": place.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": _containers(job, place),
        "head_node_type": "head",
        "available_node_types": {
            "head": {
                "node_config": _node(place, place.head_instance, _DISK_GB["head"]),
                "resources": {"CPU": 0},
                "min_workers": 0,
                "max_workers": 0,
            },
            "worker": {
                "node_config": worker,
                "resources": {"CPU": job.cpus_per_node, "GPU": job.gpus_per_node},
                "min_workers": job.nodes,
                "max_workers": job.nodes,
            },
        },
        # Nodes stay for as long as the cluster does, also while a job is started again.
        "idle_timeout_minutes": 60,
        "file_mounts": {f"{_USER_HOME}/.ray/auth_token": "~/.ray/auth_token"},
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port={_PORT} --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start} --address=$RAY_HEAD_IP:{_PORT}",
            *([_WATCH] if place.spot else []),
        ],
    }
    heading = _HEADING.format(
        name=job.name,
        nodes=job.nodes,
        instance=place.instance,
        workers=job.workers,
        entrypoint=job.entrypoint,
        spot=_SPOT if place.spot else "",
    )
    return to_yaml(values, heading=heading)


def _containers(job: Deployment, place: Aws) -> dict[str, Any]:
    limits = ("--ulimit=nofile=65536:65536", "--ulimit=memlock=-1")
    return {
        "image": place.image,
        "container_name": "lapflow",
        "pull_before_run": True,
        "run_options": ["--shm-size=16g", *limits],
        "worker_run_options": ["--gpus=all"] if job.gpus_per_node else [],
    }


def _environment(job: Deployment) -> dict[str, str]:
    usual = {name: value for name, value in job.environment.items() if name != _UNHEARD}
    return {"RAY_AUTH_MODE": "token", **usual}


def _node(place: Aws, instance: str, disk_gb: int) -> dict[str, Any]:
    """Parameters of EC2's RunInstances."""
    disk = {"VolumeSize": disk_gb, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": instance,
        "ImageId": place.ami,
        "IamInstanceProfile": {"Name": place.profile},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Credentials of the profile for those alone who can ask with a header, containers included.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
    }
