"""The engine of a run with its model, as its settings and its seed decide them."""

from __future__ import annotations

import torch

from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from trainer import rng
from trainer.config.job import JobConfig, micro_batch
from trainer.config.shapes import flow_shape
from trainer.engine.build import build_engine
from trainer.engine.protocol import Engine
from trainer.planning.placing import resolve_placement, settle


def build_run_engine(job: JobConfig, *, world_size: int, device: torch.device) -> Engine:
    """Build the engine of a run with its initial weights; a collective call."""
    job = settle(job)
    return build_engine(
        lambda on_built: initial_model(job, on_built),
        config=job.engine,
        placement=resolve_placement(job),
        optim=job.optim,
        ema=job.train.ema,
        micro_batch=micro_batch(job),
        rank_batch=job.train.global_batch // world_size,
        world_size=world_size,
        device=device,
    )


def initial_model(job: JobConfig, on_built: OnBuilt = no_op) -> LapFlowTransformer:
    """Build the model with the initial weights that the run's seed decides, alike on all ranks.

    Args:
        job: The configuration.
        on_built: What is done with each part of the model as soon as it is built.
    """
    shape = flow_shape(job.data, job.codec)
    torch.manual_seed(rng.derive_seed(job.train.seed, "weights"))
    return LapFlowTransformer(
        job.model,
        scales=job.flow.scales,
        channels=shape.channels,
        image_size=shape.size,
        classes=shape.classes,
        on_built=on_built,
    )
