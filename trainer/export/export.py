"""Exports of a checkpoint's weights: one safetensors file, or a folder with a model card."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.checkpoint.store import StoreConfig
from trainer.export.description import ModelDescription
from trainer.export.folder import FILES, write_folder
from trainer.export.output import check_file, check_folder, written_whole
from trainer.export.weights import write_weights
from trainer.resume import open_checkpoint
from trainer.schema import ConfigError
from trainer.trained.model import Weights


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to.

    Attributes:
        checkpoint: URI of the checkpoint.
        output: Folder or file to write.
        file: "folder" for diffusers and torch, or "safetensors" for one file of weights.
        weights: "ema", "master" for the weights without averaging, or, in a folder, "both": then
            the EMA is loaded by default, and master as diffusers' variant of that name.
        overwrite: Replace the file, or the folder of an earlier export, at `output`.
        store: How to reach the store.
    """

    checkpoint: str
    output: str
    file: Literal["folder", "safetensors"] = "folder"
    weights: Literal["ema", "master", "both"] = "ema"
    overwrite: bool = False
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.file == "safetensors" and self.weights == "both":
            raise ConfigError(
                "weights=both does not fit into file=safetensors, one set of weights; export twice "
                "with weights=ema and weights=master, or set file=folder"
            )


def export_checkpoint(config: ExportConfig) -> Path:
    """Write a checkpoint's weights, whole or not at all, and return where they are.

    Host memory holds one set of weights at a time, in float32.

    Raises:
        ConfigError: For a checkpoint that is not there, or an output that exists or cannot be
            written.
        CheckpointError: If the checkpoint is damaged, holds values that are not finite or other
            weights than its model has, lacks those asked for, or if the store fails.
    """
    # Normalised, for "." has no name to give to what is written beside it.
    output = Path(os.path.abspath(Path(config.output).expanduser()))
    if config.file == "folder":
        check_folder(output, own=FILES, overwrite=config.overwrite)
    else:
        check_file(output, overwrite=config.overwrite)
    store, _, manifest = open_checkpoint(config.checkpoint, config.store)
    description = ModelDescription.of(manifest)
    weights: tuple[Weights, ...] = (
        ("ema", "master") if config.weights == "both" else (config.weights,)
    )
    with written_whole(output) as partial:
        if config.file == "folder":
            write_folder(
                partial,
                name=output.name,
                store=store,
                manifest=manifest,
                description=description,
                weights=weights,
            )
        else:
            write_weights(partial, store, manifest, weights[0])
    return output
