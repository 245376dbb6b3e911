"""Runs with one checkpoint of a small model whose EMA is not its master."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.flow.config import FlowConfig
from models.transformer.config import Ties, TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from tests.support.saved import save_now
from trainer.autoencoder.config import CodecConfig
from trainer.config.job import DataConfig, JobConfig, config_fingerprint, science
from trainer.config.shapes import flow_shape
from trainer.evaluation.choice import open_checkpoint
from trainer.export.config import ExportSettings
from trainer.export.export import export_checkpoint
from trainer.state import Fragment, TrainState
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

RUN = "small"
IMAGES = 200

MODELS = {
    "plain": (TransformerConfig(depth=1, width=16, heads=2), FlowConfig(scales=2)),
    "one scale": (TransformerConfig(depth=2, width=16, heads=2), FlowConfig(scales=1)),
    "tied": (
        TransformerConfig(
            depth=2, width=16, heads=4, qk_norm=True, attention="full", ties=Ties(scales=(0, 2))
        ),
        FlowConfig(scales=3, noise="independent"),
    ),
    "everything": (
        TransformerConfig(
            depth=1,
            width=24,
            heads=2,
            qk_norm=True,
            positions="aligned",
            class_tokens=3,
            modulation="shared",
            ties=Ties(scales=(0, 1), parts=("mlp", "modulation")),
        ),
        FlowConfig(scales=2, critical_times=(0.4,), path="gvp"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint and the models that were saved."""

    place: Path
    ema: LapFlowTransformer
    master: LapFlowTransformer
    job: JobConfig

    @property
    def uri(self) -> str:
        return f"{self.place}/runs/{RUN}/checkpoints/{IMAGES:012d}"


def build(job: JobConfig, seed: int) -> LapFlowTransformer:
    """The job's model, with random weights everywhere."""
    shape = flow_shape(job.data, job.codec)
    model = LapFlowTransformer(
        job.model,
        scales=job.flow.scales,
        channels=shape.channels,
        image_size=shape.size,
        classes=shape.classes,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def save_run(
    place: Path,
    name: str = "plain",
    *,
    data: DataConfig | None = None,
    codec: CodecConfig | None = None,
    codec_digest: str | None = None,
    changed_science: dict[str, Any] | None = None,
) -> SavedRun:
    model, flow = MODELS[name]
    job = JobConfig(
        run=RUN,
        model=model,
        flow=flow,
        data=data or DataConfig(name="kinds", image_size=8, channels=1, classes=3),
        codec=codec or CodecConfig(),
    )
    saved = SavedRun(place=place, ema=build(job, 1), master=build(job, 2), job=job)
    averages = dict(saved.ema.named_parameters())
    fragments = [
        Fragment(
            name=name,
            start=0,
            shape=tuple(parameter.shape),
            tensors={"master": parameter.flatten(), "ema": averages[name].flatten()},
        )
        for name, parameter in saved.master.named_parameters()
    ]
    chosen = science(job, data_digest="d1" * 32, codec_digest=codec_digest)
    save_now(
        open_store(f"{place}/runs", StoreConfig()),
        run=RUN,
        images=IMAGES,
        fragments=fragments,
        train_state=TrainState(images=IMAGES, updates=7).to_dict(),
        science=chosen | (changed_science or {}),
        config_fingerprint=config_fingerprint(chosen),
    )
    return saved


def export(run: SavedRun, output: Path, **settings: Any) -> Path:
    """Exports the checkpoint."""
    store, _, manifest = open_checkpoint(run.uri, StoreConfig())
    return export_checkpoint(store, manifest, ExportSettings(output=str(output), **settings))


def inputs(job: JobConfig) -> tuple[Any, ...]:
    """States of all scales, coarse to fine, times and labels, the null label among them."""
    shape = flow_shape(job.data, job.codec)
    generator = torch.Generator().manual_seed(3)
    states = tuple(
        torch.randn(2, shape.channels, shape.size >> k, shape.size >> k, generator=generator)
        for k in reversed(range(job.flow.scales))
    )
    return states, torch.rand(2, generator=generator), torch.tensor([1, shape.classes])


def same_outputs(one: torch.nn.Module, other: torch.nn.Module, job: JobConfig) -> bool:
    """Whether two models give the same velocities, bit by bit."""
    pairs = zip(one(*inputs(job)), other(*inputs(job)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def model_class():
    """The model of diffusers: seconds of imports, which the collection of tests need not take."""
    from trainer.export.diffusers_model import LapFlowTransformer2DModel

    return LapFlowTransformer2DModel


def pipeline_class():
    """Its pipeline, likewise."""
    from trainer.export.diffusers_pipeline import LapFlowPipeline

    return LapFlowPipeline
