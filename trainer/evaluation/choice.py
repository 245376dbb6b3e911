"""Which checkpoints a URI means: one, the newest of a run, or all of a run."""

from __future__ import annotations

from typing import Literal, NamedTuple

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.reading import ConfigError
from trainer.host_group import HostGroup
from trainer.storage.checkpoint_uri import check_no_credentials, parse_checkpoint_uri
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig


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
    address = parse_checkpoint_uri(uri)
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


def parse_uri(uri: str) -> tuple[str, str, int]:
    """Split a checkpoint's URI into the place of its runs, the run's name and images seen.

    Raises:
        ConfigError: If it is not the URI of a checkpoint.
        InvalidStoreUri: If it may carry credentials.
    """
    check_no_credentials(uri)
    try:
        address = parse_checkpoint_uri(uri)
    except InvalidStoreUri:
        address = None
    if address is None or address.images is None:
        raise ConfigError(
            f"{uri!r} is neither auto, never, nor the URI of a checkpoint, which looks like "
            "…/runs/NAME/checkpoints/000000100000"
        )
    return address.runs, address.run, address.images


def open_checkpoint(
    uri: str, config: StoreConfig, *, ranks: HostGroup | None = None
) -> tuple[Store, CheckpointReader, Manifest]:
    """Open a checkpoint by its URI; a collective call where there are several ranks.

    Args:
        uri: Where it is.
        config: How to reach its store.
        ranks: How this rank agrees with the others, if there are any.

    Returns:
        The store of its run, the run's checkpoints, and this one's manifest.

    Raises:
        ConfigError: If there is no valid checkpoint there.
    """
    runs, run, images = parse_uri(uri)
    store = open_store(runs, config)
    checkpoints = CheckpointReader(store, run=run, ranks=ranks)
    manifest = checkpoints.manifest(images)
    if manifest is None:
        raise ConfigError(f"there is no valid checkpoint at {uri}; list the folder above it")
    return store, checkpoints, manifest
