"""Exports of a checkpoint's weights: one safetensors file, or a folder with a model card."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import Store
from trainer.export.description import ModelDescription
from trainer.export.folder import FILES, write_folder
from trainer.export.output import check_file, check_folder, written_whole
from trainer.export.weights import write_weights
from trainer.schema import ConfigError
from trainer.trained.model import Weights


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to export, and where to.

    Attributes:
        output: Folder or file to write.
        file: "folder" for diffusers and torch, or "safetensors" for one file of weights.
        weights: "ema", "master" for the weights without averaging, or, in a folder, "both": then
            the EMA is loaded by default, and master as diffusers' variant of that name.
        overwrite: Replace the file, or the folder of an earlier export, at `output`.
    """

    output: str = field(metadata={"place": "path"})
    file: Literal["folder", "safetensors"] = "folder"
    weights: Literal["ema", "master", "both"] = "ema"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.file == "safetensors" and self.weights == "both":
            raise ConfigError(
                "weights=both does not fit into file=safetensors, one set of weights; export twice "
                "with weights=ema and weights=master, or set file=folder"
            )


def export_checkpoint(store: Store, manifest: Manifest, settings: ExportSettings) -> Path:
    """Write a checkpoint's weights, whole or not at all, and return where they are.

    Host memory holds one set of weights at a time, in float32.

    Args:
        store: The store of the run.
        manifest: The checkpoint.
        settings: What to export, and where to.

    Raises:
        ConfigError: For an output that exists or cannot be written.
        CheckpointError: If the checkpoint is damaged, holds values that are not finite or other
            weights than its model has, lacks those asked for, or if the store fails.
    """
    # Normalised, for "." has no name to give to what is written beside it.
    output = Path(os.path.abspath(Path(settings.output).expanduser()))
    if settings.file == "folder":
        check_folder(output, own=FILES, overwrite=settings.overwrite)
    else:
        check_file(output, overwrite=settings.overwrite)
    description = ModelDescription.of(manifest)
    weights: tuple[Weights, ...] = (
        ("ema", "master") if settings.weights == "both" else (settings.weights,)
    )
    with written_whole(output) as partial:
        if settings.file == "folder":
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
