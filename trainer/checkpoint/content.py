"""The content of checkpoints: slices of parameters in safetensors objects, hashed and checked.

Nothing here is ever unpickled, and nothing is used before its SHA-256 was found right.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint, MissingObject
from trainer.checkpoint.layout import checkpoint_key, tensor_key
from trainer.checkpoint.manifest import Manifest, ObjectEntry
from trainer.checkpoint.spans import Read, Span, plan_reads
from trainer.checkpoint.store import Store
from trainer.state import Fragment


def by_name(fragments: Sequence[Fragment]) -> dict[str, Fragment]:
    """Index fragments by their parameter.

    Raises:
        CheckpointMismatch: Two are slices of the same parameter.
    """
    named = {fragment.name: fragment for fragment in fragments}
    if len(named) != len(fragments):
        raise CheckpointMismatch(
            "A rank holds two slices of one parameter, and checkpoints expect one: join them in "
            "the engine's fragments()."
        )
    return named


def span_of(fragment: Fragment) -> Span:
    """Return the slice a fragment holds."""
    return Span(fragment.start, fragment.numel)


def write(store: Store, key: str, fragments: Collection[Fragment]) -> ObjectEntry:
    """Write fragments as one object and return its entry for the manifest."""
    data = safetensors.save(
        {
            tensor_key(kind, fragment.name, fragment.start): tensor.detach().cpu()
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        }
    )
    store.put(key, data)
    return ObjectEntry(
        key=key,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        fragments={fragment.name: span_of(fragment) for fragment in fragments},
    )


def fill(store: Store, manifest: Manifest, fragments: Sequence[Fragment]) -> None:
    """Fill fragments in place from the objects that overlap them, whoever wrote those.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        fragments: What to fill. After an error their content is undefined.

    Raises:
        DamagedCheckpoint: An object is missing or changed.
        CheckpointMismatch: A parameter, or part of one, is not in the checkpoint, or has another
            shape.
    """
    named = by_name(fragments)
    check_fit(manifest, fragments)
    reads, missing = plan_reads(
        {name: span_of(fragment) for name, fragment in named.items()},
        [entry.fragments for entry in manifest.objects],
    )
    if missing:
        name, gaps = min(missing.items())
        raise CheckpointMismatch(
            f"Checkpoint {_place(store, manifest)} lacks elements {gaps[0].start} to "
            f"{gaps[0].stop} of {name} and slices of {len(missing) - 1} more parameters: it was "
            "not saved by all ranks. Use another checkpoint."
        )
    for source, parts in groupby(reads, key=lambda read: read.source):
        tensors = _read(store, manifest.objects[source])
        for read in parts:
            if not _copied(read, tensors, named[read.name]):
                raise DamagedCheckpoint(
                    f"{store.uri(manifest.objects[source].key)} does not hold {read.name} as its "
                    "manifest says. Use an older checkpoint."
                )


def check_fit(manifest: Manifest, fragments: Sequence[Fragment]) -> None:
    """Check that a checkpoint knows these parameters, in these shapes, with these kinds.

    Raises:
        CheckpointMismatch: It does not.
    """
    for fragment in fragments:
        shape = manifest.parameters.get(fragment.name)
        if shape is None:
            raise CheckpointMismatch(
                f"The model has a parameter {fragment.name} that the checkpoint of {manifest.run} "
                f"after {manifest.images} images lacks: build the model it was saved from."
            )
        if shape != fragment.shape:
            raise CheckpointMismatch(
                f"Parameter {fragment.name} has shape {fragment.shape}, but {shape} in the "
                f"checkpoint of {manifest.run} after {manifest.images} images: build the model it "
                "was saved from."
            )
        if absent := set(fragment.tensors) - set(manifest.kinds):
            raise CheckpointMismatch(
                f"The checkpoint of {manifest.run} after {manifest.images} images holds "
                f"{', '.join(manifest.kinds)} of each parameter, but no {', '.join(absent)}."
            )


def load_weights(
    store: Store, manifest: Manifest, which: Literal["ema", "master"] = "ema"
) -> dict[str, Tensor]:
    """Read whole weights, for sampling.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        which: The moving average, or the weights as trained.

    Returns:
        Each parameter in its shape, float32, on the CPU.

    Raises:
        DamagedCheckpoint: An object is missing or changed.
        CheckpointMismatch: The checkpoint lacks such weights.
    """
    whole = [
        Fragment(name=name, start=0, shape=shape, tensors={which: torch.empty(math.prod(shape))})
        for name, shape in manifest.parameters.items()
    ]
    fill(store, manifest, whole)
    return {fragment.name: fragment.tensors[which].view(fragment.shape) for fragment in whole}


def _read(store: Store, entry: ObjectEntry) -> dict[str, Tensor]:
    try:
        data = store.get(entry.key)
    except MissingObject as error:
        raise DamagedCheckpoint(f"{store.uri(entry.key)} is missing.") from error
    if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedCheckpoint(
            f"{store.uri(entry.key)} changed after it was saved: its {len(data)} bytes do not "
            "have the SHA-256 its manifest names. Use an older checkpoint, and check the store."
        )
    try:
        tensors = safetensors.load(data)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{store.uri(entry.key)} is not safetensors: {error}.") from error
    return tensors


@torch.no_grad()
def _copied(read: Read, tensors: Mapping[str, Tensor], target: Fragment) -> bool:
    """Copy one part of all kinds, bit by bit; False if the object lacks it."""
    for kind, view in target.tensors.items():
        saved = tensors.get(tensor_key(kind, read.name, read.saved.start))
        if saved is None or (saved.dtype, saved.shape) != (view.dtype, (read.saved.numel,)):
            return False
        piece = saved.narrow(0, read.part.start - read.saved.start, read.part.numel)
        view.narrow(0, read.part.start - target.start, read.part.numel).copy_(piece)
    return True


def _place(store: Store, manifest: Manifest) -> str:
    return store.uri(checkpoint_key(manifest.run, manifest.images))
