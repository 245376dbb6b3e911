"""Which checkpoints a URI means: one, the newest of a run, or all of a run."""

from __future__ import annotations

from typing import Literal, NamedTuple

from trainer.checkpoint.address import parse_address
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.store import Store, StoreConfig, open_store
from trainer.resume import open_checkpoint
from trainer.schema import ConfigError


class ChosenCheckpoints(NamedTuple):
    """Checkpoints of one run."""

    runs: str
    """Place of all runs."""
    store: Store
    """The same, opened."""
    manifests: list[Manifest]
    """Oldest first; at least one."""


def choose_checkpoints(
    uri: str, *, which: Literal["newest", "all"], config: StoreConfig
) -> ChosenCheckpoints:
    """Find the valid checkpoints that are meant.

    Args:
        uri: A checkpoint (`…/runs/NAME/checkpoints/000000100000`) or a run (`…/runs/NAME`).
        which: Of a run, its newest checkpoint or all of them.
        config: How to reach the store.

    Raises:
        ConfigError: If there is none, or if all are asked for of what is one checkpoint.
        CheckpointError: If the URI is neither, or the store fails.
    """
    address = parse_address(uri)
    if address.images is not None:
        if which == "all":
            raise ConfigError(
                f"checkpoints=all needs the URI of a run, but {uri} is one checkpoint; give "
                f"checkpoint={address.run_uri}"
            )
        store, _, manifest = open_checkpoint(uri, config)
        return ChosenCheckpoints(address.runs, store, [manifest])
    store = open_store(address.runs, config)
    found = _valid(CheckpointReader(store, run=address.run), only_newest=which == "newest")
    if not found:
        raise ConfigError(f"there is no valid checkpoint of a run at {uri}; list the folder")
    return ChosenCheckpoints(address.runs, store, found)


def _valid(checkpoints: CheckpointReader, *, only_newest: bool) -> list[Manifest]:
    found: list[Manifest] = []
    manifest = checkpoints.newest_valid()
    while manifest is not None:
        found.insert(0, manifest)
        if only_newest:
            break
        manifest = checkpoints.newest_valid(before=manifest.images)
    return found
