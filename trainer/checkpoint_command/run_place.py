"""A run in its store, found by its URI, and what to say when it is not there."""

from __future__ import annotations

import dataclasses
import difflib
from typing import NamedTuple

from trainer.checkpoint import layout
from trainer.checkpoint.address import Address, parse_address
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.inventory import Inventory
from trainer.checkpoint.store import Store, StoreConfig, open_store
from trainer.schema import ConfigError

_MOST_NAMES = 10


class RunPlace(NamedTuple):
    """A run, or one checkpoint of it, in an opened store.

    Attributes:
        address: What the URI names.
        store: The store of all runs.
        catalogue: The run's checkpoints.
    """

    address: Address
    store: Store
    catalogue: Catalogue

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.address.run

    @property
    def uri(self) -> str:
        """Address of the run."""
        return self.address.run_uri

    @property
    def images(self) -> int | None:
        """The checkpoint, where the URI named one."""
        return self.address.images

    def inventory(self) -> Inventory:
        """Look at everything under the run's checkpoints.

        Raises:
            ConfigError: If there is nothing, saying what is there instead.
            StoreError: If the store fails.
        """
        inventory = self.catalogue.inventory()
        if not inventory.folders:
            raise self._nothing_there()
        return inventory

    def committed(self, images: int | None) -> Inventory:
        """Look at the committed checkpoints, or at one of them.

        Raises:
            ConfigError: If there is none, or not that one.
            StoreError: If the store fails.
        """
        found = self.inventory()
        there = sorted({*found.manifests, *found.damaged})
        if not there:
            raise ConfigError(f"no checkpoint of {self.uri} was finished: it has objects alone")
        if images is None:
            return found
        if images not in there:
            raise ConfigError(
                f"{self.uri} has no checkpoint of {images:,} images; it has those of "
                f"{_joined([f'{each:,}' for each in there])}"
            )
        return dataclasses.replace(
            found,
            manifests={k: v for k, v in found.manifests.items() if k == images},
            damaged={k: v for k, v in found.damaged.items() if k == images},
        )

    def is_committed(self, images: int) -> bool:
        """Tell whether a checkpoint has a manifest at this moment."""
        key = layout.manifest_key(self.run, images)
        return key in self.store.list(key)

    def _nothing_there(self) -> ConfigError:
        runs = self.address.runs
        keys = [key.split("/") for key in self.store.list("")]
        names = sorted({parts[0] for parts in keys if parts[1:]})
        if self.run not in names:
            close = difflib.get_close_matches(self.run, names, n=1, cutoff=0.4)
            hint = f"; did you mean {runs}/{close[0]}?" if close else ""
            there = f"the runs there are {_joined(names)}" if names else "there are no runs"
            return ConfigError(f"there is no run {self.run} in {runs}{hint} ({there})")
        below = sorted(
            {
                parts[1]
                for parts in keys
                if parts[0] == self.run and len(parts) > 3 and parts[2] == "checkpoints"
            }
        )
        if below:
            return ConfigError(
                f"{self.uri} is no run but holds runs ({_joined(below)}): give for example "
                f"{self.uri}/{below[0]}"
            )
        return ConfigError(
            f"the run at {self.uri} has no checkpoint yet: one is saved every "
            "checkpoint.interval_images, at the run's end, and when it is stopped"
        )


def open_run(uri: str, config: StoreConfig) -> RunPlace:
    """Open what a URI names; nothing is contacted yet.

    Args:
        uri: A run (`…/runs/NAME`) or a checkpoint (`…/runs/NAME/checkpoints/000000128000`).
        config: How to reach its store.

    Raises:
        CheckpointError: If it is neither, or if the URI or the settings are no store's.
    """
    address = parse_address(uri)
    store = open_store(address.runs, config)
    return RunPlace(address, store, Catalogue(store, run=address.run))


def _joined(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
