"""A job's engine on one rank, trained on random latents."""

from typing import Any

import torch

from cluster.contract import WorkerContext
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from trainer.config.job import JobConfig, micro_batch
from trainer.config.reading import from_dict
from trainer.config.shapes import flow_shape
from trainer.training.worker import build_run_engine


class Training:
    """The engine of a job and one fixed batch for it.

    Args:
        job: The job's configuration as plain values.
        context: This rank.

    Attributes:
        grad_accum_steps: Forward passes of an update.
    """

    def __init__(self, job: dict[str, Any], context: WorkerContext) -> None:
        settings = from_dict(JobConfig, job)
        self.engine = build_run_engine(
            settings, world_size=context.world_size, device=torch.device(context.device)
        )
        shape, images = flow_shape(settings.data, settings.codec), micro_batch(settings)
        self.grad_accum_steps = settings.train.global_batch // settings.cluster.workers // images
        flow = Flow(settings.flow)
        self._objective = Objective(flow)
        device = torch.device(context.device)
        generator = torch.Generator().manual_seed(context.rank)
        latents = torch.randn(images, shape.channels, shape.size, shape.size, generator=generator)
        noise = flow.noise_size(channels=shape.channels, image_size=shape.size)
        self._batch: dict[str, Any] = {
            "bands": split(latents.to(device), settings.flow.scales),
            "labels": torch.randint(shape.classes, (images,), generator=generator).to(device),
            "uniforms": torch.rand(images, generator=generator).to(device),
            "noise": torch.randn(images, noise, generator=generator).to(device),
        }

    def backward(self, *, last: bool) -> None:
        """Run one forward and backward pass, the last of an update or another."""
        self.engine.backward(self._objective(self.engine, **self._batch).total, last=last)

    def update(self) -> None:
        """Run one whole update."""
        for number in range(self.grad_accum_steps):
            self.backward(last=number == self.grad_accum_steps - 1)
        self.engine.update(learning_rate=1e-4, ema_decay=0.999)
