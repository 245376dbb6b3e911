"""A whole training step around an engine: objective, metrics, watch, counts."""

from __future__ import annotations

import torch

from models.ema import EmaConfig
from models.flow.flow import Flow, FlowConfig
from models.flow.objective import Objective
from models.pyramid import split
from pipelines.loading.loader import Batch
from tests.support.engine_worker import OPTIM
from trainer.config.job import TrainConfig
from trainer.engine.protocol import Engine
from trainer.metrics.buffer import MetricBuffer
from trainer.training.hooks import LossWatch
from trainer.training.step import TrainStep

IMAGES, MICRO_BATCH = 4, 2
EMA = EmaConfig(decay=0.9, decays=(0.5,), warmup=True)


def whole_step(engine: Engine, device: torch.device) -> TrainStep:
    """Return the step of a tiny model of two scales, in two micro-batches."""
    flow = Flow(FlowConfig(scales=2))
    return TrainStep(
        engine=engine,
        objective=Objective(flow),
        config=TrainConfig(global_batch=IMAGES, ema=EMA),
        optim=OPTIM,
        metrics=MetricBuffer(device),
        noise_size=flow.noise_size(channels=1, image_size=8),
        null_label=3,
        micro_batch=MICRO_BATCH,
        device=device,
        watch=LossWatch(
            device,
            interval_images=0,
            total_images=10**9,
            patience_updates=10,
            optim=OPTIM,
            precision="fp32",
        ),
    )


def some_images(device: torch.device) -> Batch:
    """Return a batch as the loader gives it."""
    return Batch(
        bands=split(torch.randn(IMAGES, 1, 8, 8, device=device), 2),
        labels=torch.arange(IMAGES, device=device) % 3,
        sample_ids=torch.arange(IMAGES),
        skipped=0,
    )
