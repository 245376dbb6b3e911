"""Weights of a checkpoint in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import Store
from trainer.trained.model import Weights

_ALIGNMENT = 8


def write_weights(path: Path, store: Store, manifest: Manifest, which: Weights) -> str:
    """Write whole weights, of which memory holds one copy meanwhile.

    Equal weights make equal files; safetensors' own writer shuffles the metadata.

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
    parts: list[bytes | memoryview] = [_header(weights, metadata)]
    parts += [_values(each) for each in weights.values()]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _header(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length of the JSON text in 8 bytes, and the text: what lies where after it."""
    bounds = pairwise(accumulate((each.nbytes for each in weights.values()), initial=0))
    contents = {
        name: {"dtype": "F32", "shape": list(each.shape), "data_offsets": place}
        for (name, each), place in zip(weights.items(), bounds, strict=True)
    }
    text = json.dumps({"__metadata__": metadata, **contents}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _values(tensor: Tensor) -> memoryview:
    """Return the bytes of a float32 tensor, which are not copied."""
    return tensor.reshape(-1).numpy().data
