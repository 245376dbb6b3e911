"""The weights of a checkpoint that a URI and a number of images choose, for other programs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.store import StoreConfig
from trainer.checkpoint_command.run_place import open_run
from trainer.command import Outcome
from trainer.export.export import ExportSettings, export_checkpoint
from trainer.schema import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportSettings):
    """Which checkpoint to export, and what of it.

    Attributes:
        uri: URI of a checkpoint, or of a run.
        choose: Images of the run's checkpoint to take; None takes the newest valid one.
        store: How to reach the store.
    """

    uri: str = field(metadata={"place": "run"})
    choose: Annotated[int, Field(ge=0)] | None = None
    store: StoreConfig = field(default_factory=StoreConfig)


def export_chosen_checkpoint(config: ExportConfig) -> Outcome:
    """Export a checkpoint, or the newest valid one of a run.

    Raises:
        ConfigError: If there is no such checkpoint, or `output` cannot be written.
        CheckpointError: If the checkpoint is damaged, or the store fails.
    """
    place = open_run(config.uri, config.store)
    if place.images is not None and config.choose is not None:
        raise ConfigError(
            f"choose={config.choose} needs the URI of a run, but {config.uri} is one checkpoint; "
            f"give {place.uri}"
        )
    images = place.images if config.choose is None else config.choose
    found = place.committed(images)
    if found.newest_valid is None:
        raise DamagedCheckpoint(
            f"{config.uri} cannot be exported: {found.damaged[max(found.damaged)]}"
        )
    for newer in sorted(each for each in found.damaged if each > found.newest_valid.images):
        logger.warning(
            "passing over checkpoint %s: %s", place.catalogue.uri(newer), found.damaged[newer]
        )
    return Outcome(f"{export_checkpoint(place.store, found.newest_valid, config)}")
