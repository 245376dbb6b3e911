"""What MLflow's page says of a run: where it comes from, what it is trained on, and how."""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import torch

from pipelines.console import typed, visible
from trainer.config import paths
from trainer.config.job import JobConfig
from trainer.data.splits import Split
from trainer.metrics.mlflow_tracker import MlflowTracker

_PACKAGES = ("torch", "deepspeed", "ray", "mosaicml-streaming", "mlflow")
_ROOT = Path(__file__).resolve().parents[2]
_GIT_S = 5.0


def origin_of(words: Sequence[str]) -> dict[str, str]:
    """Tell what a launch comes from: its command, its user, and the commit of its source.

    Args:
        words: The words of the command line.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = str(os.getuid())
    command = f"{typed('trainer.launch')} {shlex.join(words)}"
    return {"command": command, "user": user, "commit": _commit()}


def _commit() -> str:
    """Return the commit of the source, marked where files differ from it; "" outside of git."""
    told = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            ran = subprocess.run(
                ["git", "-C", str(_ROOT), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=_GIT_S,
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        told.append(ran.stdout.strip())
    commit, changed = told
    return f"{commit}{'+changes' * bool(changed)}"


def describe_run(
    tracker: MlflowTracker,
    job: JobConfig,
    fingerprint: str,
    *,
    images: Split,
    origin: Mapping[str, str],
) -> None:
    """Fill the run's page.

    Args:
        tracker: The run's.
        job: The configuration.
        fingerprint: Digest of its science.
        images: What it is trained on.
        origin: What `origin_of` told.
    """
    tracker.tags(_tags(job, fingerprint, origin))
    tracker.dataset(
        job.data.name,
        digest=images.digest,
        uri=" ".join(paths.data_prefixes(job)),
        images=len(images),
    )
    tracker.page(_page(job, len(images), origin))


def about_run(
    job: JobConfig, *, origin: Mapping[str, str], images: int, device: torch.device
) -> dict[str, str]:
    """Tell what somebody needs to train the run again: command, commit, versions, machines, data.

    Neither the user nor the machine is named.

    Args:
        job: The configuration.
        origin: What `origin_of` told.
        images: How many images it is trained on.
        device: What the first rank computes on.
    """
    told = {
        "command": origin.get("command", ""),
        "commit": origin.get("commit", ""),
        "training images": str(images),
        "workers": str(job.cluster.workers),
        "backend": job.cluster.backend,
        "device": _device_name(device),
        "host": f"{os.cpu_count()} processors, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        **_versions(),
    }
    return {name: value for name, value in told.items() if value}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"version.python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[f"version.{package}"] = metadata.version(package)
    return versions


def _tags(job: JobConfig, fingerprint: str, origin: Mapping[str, str]) -> dict[str, str]:
    tags = {
        "mlflow.source.name": origin.get("command", ""),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": origin.get("user", ""),
        "mlflow.source.git.commit": origin.get("commit", ""),
        "fingerprint": fingerprint,
        "cluster": f"{job.cluster.workers} workers, {job.cluster.backend}",
        **_versions(),
    }
    return {name: value for name, value in tags.items() if value}


def _page(job: JobConfig, images: int, origin: Mapping[str, str]) -> str:
    rows = {
        "data": f"{job.data.name}, {images:,} images",
        "length": f"{job.train.total_images:,} images in batches of {job.train.global_batch:,}",
        "model": f"depth {job.model.depth}, width {job.model.width}, {job.flow.scales} scales",
        "learning rate": f"{job.optim.learning_rate:g}",
        "workers": f"{job.cluster.workers} on {job.cluster.backend}, {job.engine.precision}",
        "checkpoints": f"{paths.run_uri(job)}/checkpoints",
    }
    table = "\n".join(f"| {name} | {_as_text(value)} |" for name, value in rows.items())
    command = visible(origin.get("command", "")).replace("`", "'")
    return (
        (f"```\n{command}\n```\n\n" if command else "")
        + f"| setting | value |\n| --- | --- |\n{table}\n\n"
        # MLflow's pages serve artifacts beside themselves.
        + "![samples](get-artifact?path=samples.png&run_uuid={run_id})\n"
    )


def _as_text(value: str) -> str:
    """Have Markdown show a text as it is."""
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#!" else each for each in visible(value))
