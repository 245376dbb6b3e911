"""Exports of a checkpoint's weights: one safetensors file, or a folder with a model card."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.domains import Checked
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.errors import CheckpointMismatch
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.objects import safetensors_header
from trainer.config.reading import ConfigError, to_dict
from trainer.evaluation.loading import ModelRecord, Weights
from trainer.evaluation.reports import MeasuredDistance, evaluation_key, read_distances
from trainer.export.model_card import ModelCard, WeightsFile
from trainer.export.output import check_file, check_folder, write_whole
from trainer.storage.store import Store


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
        "science_hash": manifest.config_fingerprint,
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


_CARD = "README.md"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MASTER = "diffusion_pytorch_model.master.safetensors"

FILES = (_CARD, "config.json", "model_index.json", _WEIGHTS, _MASTER)
"""Names of all files that may be in an exported folder."""


def write_folder(
    folder: Path,
    *,
    name: str,
    store: Store,
    manifest: Manifest,
    record: ModelRecord,
    weights: Sequence[Weights],
) -> None:
    """Write a folder that both diffusers and torch can load.

    Args:
        folder: Where to; it must not exist.
        name: What the folder will be called.
        store: The store of the run.
        manifest: The checkpoint.
        record: Its model.
        weights: The weights; the first are loaded by default, and master beside them is diffusers'
            variant "master".

    Raises:
        CheckpointError: If the checkpoint is damaged or lacks such weights, or the store fails.
        OSError: The folder cannot be written.
    """
    folder.mkdir()
    files = [
        WeightsFile(
            name=file,
            weights=which,
            sha256=write_weights(folder / file, store, manifest, which),
        )
        for which, file in zip(weights, (_WEIGHTS, _MASTER), strict=False)
    ]
    _write_settings(folder, record)
    card = ModelCard(
        folder=name,
        manifest=manifest,
        model=record,
        files=files,
        results=_results(store, manifest, weights),
    )
    (folder / _CARD).write_text(card.text(), encoding="utf-8")


def _write_settings(folder: Path, record: ModelRecord) -> None:
    """Let diffusers write its own files, of a model that takes no memory."""
    from trainer.export.diffusers_model import LapFlowTransformer2DModel
    from trainer.export.diffusers_pipeline import LapFlowPipeline

    with torch.device("meta"):
        model = LapFlowTransformer2DModel(**_arguments(record))
    model.save_config(folder)
    LapFlowPipeline(model).save_config(folder)


def _arguments(record: ModelRecord) -> dict[str, Any]:
    """Return what `LapFlowTransformer2DModel` is built from, as JSON values."""
    codec = record.codec
    # Where the autoencoder was is nobody's business outside; which one it is, everybody's.
    latents = {
        "factor": codec.factor,
        "scale": codec.scale,
        "shift": codec.shift,
        "sha256": record.autoencoder_sha256,
    }
    return {
        "transformer": to_dict(record.transformer),
        "flow": to_dict(record.flow),
        "in_channels": record.shape.channels,
        "sample_size": record.shape.size,
        "num_classes": record.shape.classes,
        "label_dropout": record.label_dropout,
        "latents": latents if record.on_latents else None,
    }


def _check_parameters(manifest: Manifest, record: ModelRecord) -> None:
    """Refuse a checkpoint whose parameters are not those of the model that it describes."""
    with torch.device("meta"):
        model = record.build()
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if wanted != manifest.parameters:
        odd = {*wanted.items()} ^ {*manifest.parameters.items()}
        raise CheckpointMismatch(
            f"The checkpoint of {manifest.run} after {manifest.images} images does not hold "
            f"the parameters of the model that it describes, such as {min(odd)[0]}: use the "
            "version of the code that saved it."
        )


def _results(
    store: Store, manifest: Manifest, weights: Sequence[Weights]
) -> list[MeasuredDistance]:
    """Return what was measured of these weights."""
    run, images = manifest.run, manifest.images
    found = read_distances(
        store,
        run,
        images,
        keys=store.list(evaluation_key(run, images, "")),
        attempts=(manifest.attempt,),
    )
    return [each for each in found if each.measurement.weights in weights]


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Checked):
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
        super().__post_init__()
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
    record = ModelRecord.of(manifest.science)
    _check_parameters(manifest, record)
    weights: tuple[Weights, ...] = (
        ("ema", "master") if settings.weights == "both" else (settings.weights,)
    )
    with write_whole(output) as partial:
        if settings.file == "folder":
            write_folder(
                partial,
                name=output.name,
                store=store,
                manifest=manifest,
                record=record,
                weights=weights,
            )
        else:
            write_weights(partial, store, manifest, weights[0])
    return output
