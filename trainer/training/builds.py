"""What a process runs: our code and its packages, which are the same on all nodes of a run.

This module loads without torch, for the launch waits for it on each node.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "mosaicml-streaming",
    "nvidia-dali-cuda130",
    "numpy",
    "safetensors",
    "mlflow",
    "boto3",
)
_CODE = ("cluster", "models", "pipelines", "trainer")
SAME_CODE = "bring both to the same commit, or submit the job with --working-dir ."
"""What to do about other code."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a process runs.

    Attributes:
        code: SHA-256 of the source of our packages.
        versions: Versions of packages that the ranks must agree in, as far as they are there.
    """

    code: str
    versions: Mapping[str, str]


def own_build() -> Build:
    """Return what this process runs."""
    return Build(code=digest_code(), versions=_versions())


def find_differences(
    node: Build, launch: Build, *, others: Mapping[str, str], whose: str
) -> list[str]:
    """Say in what a node that cannot train differs from the launch, each as a clause.

    Args:
        node: What the node runs.
        launch: What the launch runs.
        others: Versions on another node, to compare it with in packages that the launch lacks.
        whose: Name of that node.
    """
    found = []
    if node.code != launch.code:
        found.append(f"its code is another than that of the launch; {SAME_CODE}")
    of_launch = launch.versions.keys()
    own = {name: version for name, version in node.versions.items() if name in of_launch}
    more = {name: version for name, version in node.versions.items() if name not in of_launch}
    wanted = {name: version for name, version in others.items() if name not in of_launch}
    for here, there, has in ((own, launch.versions, "the launch"), (more, wanted, whose)):
        other = [
            f"{name} {here.get(name, 'missing')} (not {there.get(name, 'there')})"
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]
        if other:
            found.append(
                f"it has {', '.join(other)} as {has} has; install the same constraints.txt on all "
                "nodes"
            )
    return found


def digest_code() -> str:
    """Return a SHA-256 of the source of our packages as this process would import it."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in _CODE:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
