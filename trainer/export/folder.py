"""The exported folder: settings and weights as diffusers names them, and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import Store
from trainer.evaluate.measured import MeasuredDistance, measured_distances
from trainer.evaluate.report import evaluation_key
from trainer.export.description import ModelDescription
from trainer.export.model_card import ModelCard, WeightsFile
from trainer.export.weights import write_weights
from trainer.trained.model import Weights

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
    description: ModelDescription,
    weights: Sequence[Weights],
) -> None:
    """Write a folder that both diffusers and torch can load.

    Args:
        folder: Where to; it must not exist.
        name: What the folder will be called.
        store: The store of the run.
        manifest: The checkpoint.
        description: Its model.
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
    _write_settings(folder, description)
    card = ModelCard(
        folder=name,
        manifest=manifest,
        model=description,
        files=files,
        results=_results(store, manifest, weights),
    )
    (folder / _CARD).write_text(card.text(), encoding="utf-8")


def _write_settings(folder: Path, description: ModelDescription) -> None:
    """Let diffusers write its own files, of a model that takes no memory."""
    from trainer.export.diffusers_model import LapFlowTransformer2DModel
    from trainer.export.diffusers_pipeline import LapFlowPipeline

    with torch.device("meta"):
        model = LapFlowTransformer2DModel(**description.arguments())
    model.save_config(folder)
    LapFlowPipeline(model).save_config(folder)


def _results(
    store: Store, manifest: Manifest, weights: Sequence[Weights]
) -> list[MeasuredDistance]:
    """Return what was measured of these weights."""
    run, images = manifest.run, manifest.images
    found = measured_distances(
        store,
        run,
        images,
        keys=store.list(evaluation_key(run, images, "")),
        attempts=(manifest.attempt,),
    )
    return [each for each in found if each.weights in weights]
