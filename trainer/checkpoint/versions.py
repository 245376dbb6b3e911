"""The packages that write a checkpoint."""

from __future__ import annotations

import importlib.metadata
from functools import cache

PACKAGES = ("lapflow-trainer", "torch", "safetensors", "deepspeed")


@cache
def versions() -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
