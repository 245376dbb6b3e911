"""A run in whose store somebody puts files, and what a process tells that reads it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.support.remote_store import in_forks, load_state, save_state
from tests.unit.trainer.checkpoint.worlds import RUN, SHAPES, random_state, same_bits
from trainer.checkpoint import layout
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.objects import block_hash
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.errors import CheckpointError
from trainer.storage.store import Store

OLD, NEW = 10, 20
KEY = layout.manifest_key(RUN, NEW)
MEMORY = 512 * 1024**2  # what a reader may take beyond what it has
PASSED_OVER = f"resumed from {OLD}, as it was saved"
"""The newest checkpoint counts as damaged, and the run goes on from the one before."""


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._canary,)


@dataclass(frozen=True)
class Target:
    """A run of two checkpoints, to be attacked.

    Attributes:
        store: The run's store.
        canary: A folder that comes to exist if something is executed.
    """

    store: Store
    canary: Path

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(Payload(str(self.canary)))

    @property
    def torch_file(self) -> bytes:
        file = io.BytesIO()
        torch.save({"weight": torch.ones(500), "payload": Payload(str(self.canary))}, file)
        return file.getvalue()

    @property
    def yaml(self) -> bytes:
        return f"!!python/object/apply:os.mkdir ['{self.canary}']".encode()

    @property
    def body(self) -> dict[str, Any]:
        """The newest manifest."""
        body: dict[str, Any] = json.loads(self.store.get(KEY))
        return body

    @property
    def content(self) -> str:
        """The key of its object."""
        body = self.body
        return layout.object_key(RUN, NEW, body["attempt"], body["objects"][0]["rank"])

    def forge(self, change: Callable[[dict[str, Any]], object], *, key: str = KEY) -> None:
        """Write a changed manifest with the right checksum."""
        body = self.body
        del body["sha256"]
        change(body)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        self.store.put(key, json.dumps(body).encode())

    def plant(self, data: bytes) -> None:
        """Write content whose size and hash are right."""
        self.store.put(self.content, data)
        changes = {"size_bytes": len(data), "block_sha256": [block_hash(data)]}
        self.forge(lambda body: body["objects"][0].update(changes))

    def with_value(self, value: float, *, kind: str) -> None:
        """Plant a value at the end of the values of one kind."""
        data, kinds = bytearray(self.store.get(self.content)), self.body["kinds"]
        values = torch.frombuffer(data, dtype=torch.float32)
        per_kind = sum(map(math.prod, SHAPES.values()))
        values[len(values) - (len(kinds) - kinds.index(kind) - 1) * per_kind - 1] = value
        self.plant(bytes(data))

    def copy(self, run: str, images: int, *, from_run: str = RUN, from_images: int = NEW) -> None:
        """Copy a checkpoint's folder."""
        here = layout.checkpoint_key(from_run, from_images)
        there = layout.checkpoint_key(run, images)
        for key in self.store.list(f"{here}/"):
            self.store.put(key.replace(here, there), self.store.get(key))


def look(target: Target, outcome: Path) -> None:
    """Read as all readers do, within bounds, and write down what came of it."""
    size = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    told: list[str] = []
    try:
        found = load_state(target.store, report=told.append)
        assert found
        images, state, _ = found
        exact = same_bits(state, random_state(images))
        told.append(f"resumed from {images}, {'as it was saved' if exact else 'changed'}")
    except CheckpointError as error:
        told.append(f"{type(error).__name__}: {error}")
    reader = CheckpointReader(target.store, run=RUN)
    if manifest := reader.newest_valid():
        with suppress(CheckpointError):
            load_weights(target.store, manifest)
    with suppress(CheckpointError):
        reader.index.examine(NEW)
    outcome.write_text("\n".join(told))


def looked_at(target: Target, folder: Path) -> str:
    """What a process that reads the run's checkpoints tells of them."""
    outcome = folder / "outcome"
    assert in_forks(partial(look, target, outcome)) == [0]
    text = outcome.read_text()
    assert text.replace("\n", "").isprintable()
    assert len(text) < 2000
    assert not target.canary.exists()
    return text


def attacked(store: Store, folder: Path) -> Target:
    """Save two checkpoints."""
    for images in (OLD, NEW):
        save_state(store, random_state(images), images=images)
    return Target(store, folder / "executed")
