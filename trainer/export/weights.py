"""Weights of a checkpoint in one safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.safetensors_header import safetensors_header
from trainer.checkpoint.store import Store
from trainer.trained.model import Weights


def write_weights(path: Path, store: Store, manifest: Manifest, which: Weights) -> str:
    """Write whole weights, of which memory holds one copy meanwhile.

    Equal weights make equal files.

    Args:
        path: The file.
        store: The store of the run.
        manifest: The checkpoint.
        which: The moving average, or the weights as trained.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        CheckpointError: If the checkpoint is damaged, holds values that are not finite or lacks
            such weights, or the store fails.
        OSError: The file cannot be written.
    """
    weights = load_weights(store, manifest, which)
    metadata = {
        "format": "pt",
        "run": manifest.run,
        "images": str(manifest.images),
        "weights": which,
        "science_hash": manifest.science_hash,
    }
    shapes = {name: tuple(each.shape) for name, each in weights.items()}
    parts: list[bytes | memoryview] = [safetensors_header(shapes, metadata)]
    parts += [_values(each) for each in weights.values()]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _values(tensor: Tensor) -> memoryview:
    """Return the bytes of a float32 tensor, which are not copied."""
    return tensor.reshape(-1).numpy().data
