"""What a job asks of whoever runs its nodes, whichever that is, and the image that they run."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,252}")
_IMAGE = re.compile(
    r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_UNLIKE_NAME = re.compile(r"[^a-z0-9]+")
_LONGEST_NAME = 47
"""Of a RayJob; KubeRay names clusters, pods and services after it."""
HOME = "/data/lapflow"
"""Where a node keeps its caches, in the container."""
FOLDER = "/opt/lapflow"
"""Where this project is, in the container."""
DRAIN_S = 30
"""What a node gets beyond a last checkpoint: for the notice to come, and for Ray to end."""

_CONTAINER_FILE = f"""\
# The image of head and GPU nodes: docker build -f Containerfile -t IMAGE . in the project's folder.
# CUDA comes with torch's packages, the driver from the node (NVIDIA container toolkit).
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR {FOLDER}
COPY pyproject.toml constraints.txt install.sh README.md LICENSE ./
COPY install install
COPY cluster cluster
COPY configs configs
COPY models models
COPY pipelines pipelines
COPY trainer trainer
COPY benchmarks benchmarks
RUN TORCH_BUILD=gpu ./install.sh python3 /opt/venv

FROM python:3.11-slim-bookworm
# wget is what KubeRay's probes call, rsync what `ray up` does.
RUN apt-get update && apt-get install -y --no-install-recommends wget rsync && \\
    rm -rf /var/lib/apt/lists/* && \\
    useradd --uid 1000 --create-home ray && install -d -o ray -g ray {HOME} && \\
    echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/lapflow.sh  # for login shells
COPY --from=build /opt/venv /opt/venv
COPY --from=build {FOLDER} {FOLDER}
ENV PATH=/opt/venv/bin:$PATH \\
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \\
    LAPFLOW_HOME={HOME} RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 \\
    MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1
USER 1000
WORKDIR {FOLDER}
"""


class ManifestError(ValueError):
    """No manifest can be made of these settings; the text has the fix."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A job and the nodes that it needs.

    Attributes:
        run: The run's name.
        command: The command that trains, as words.
        nodes: Nodes with workers.
        workers: Ranks of all nodes together.
        cpus_per_worker: Cores of a rank.
        gpus_per_worker: 0 or 1.
        memory_gib: Memory of a node in GiB that a job may take; None is not known.
        stop_grace_s: What the job takes to save its last state once it is asked to stop, and to
            end.
        ray: Version of Ray.
    """

    run: str
    command: tuple[str, ...]
    nodes: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    memory_gib: float | None
    stop_grace_s: int
    ray: str

    @property
    def name(self) -> str:
        """The run's name as Kubernetes, Slurm and AWS take it: short, of a-z, 0-9 and hyphens."""
        plain = _UNLIKE_NAME.sub("-", self.run.lower()).strip("-")
        if not plain[:1].isalpha():
            plain = f"run-{plain}".rstrip("-")
        return plain[:_LONGEST_NAME].rstrip("-")

    @property
    def workers_per_node(self) -> int:
        """Most ranks of a node."""
        return -(-self.workers // self.nodes)

    @property
    def cpus_per_node(self) -> int:
        """Cores that the ranks of a node reserve."""
        return self.workers_per_node * self.cpus_per_worker

    @property
    def gpus_per_node(self) -> int:
        """GPUs that the ranks of a node reserve."""
        return self.workers_per_node * self.gpus_per_worker

    @property
    def entrypoint(self) -> str:
        """The command as a line for a shell."""
        return shlex.join(self.command)

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of every node."""
        return {
            "LAPFLOW_HOME": HOME,
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
            # A node that is taken away tells its workers, and waits for their last checkpoint.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self.stop_grace_s),
            # `ray job stop` likewise.
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_grace_s),
        }


def check_name(option: str, name: str | None) -> None:
    """Refuses what is no name of a thing in a cluster.

    Raises:
        ManifestError: With the option.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ManifestError(f"{option} is {name!r}, which is no name: letters, digits, - . and _")


def check_image(image: str) -> None:
    """Refuses what is no reference to an image.

    Raises:
        ManifestError: With an example.
    """
    if not _IMAGE.fullmatch(image):
        raise ManifestError(f"--image is {image!r}, which is no image: registry/name:tag")


def container_file() -> str:
    """The text of a Containerfile, for docker or podman: an image with this project."""
    return _CONTAINER_FILE


def to_yaml(*documents: Mapping[str, Any], heading: str) -> str:
    """Documents as YAML that can be read without a schema, below comments.

    Args:
        documents: Plain values.
        heading: Text of the comments.
    """
    comments = "".join(f"# {line}\n" if line else "#\n" for line in heading.splitlines())
    return comments + "---\n".join(
        yaml.safe_dump(each, sort_keys=False, width=100, default_flow_style=False)
        for each in documents
    )
