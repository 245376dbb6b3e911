"""A job's engine on one rank, trained on random latents; and ranks to run it on."""

import argparse
import gc
import threading
from typing import Any

import torch
from torch import Tensor

from benchmarks import command
from cluster.contract import ClusterConfig, Worker, WorkerContext
from cluster.launcher import run
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from trainer.config.job import JobConfig, micro_batch
from trainer.config.reading import from_dict
from trainer.config.shapes import flow_shape
from trainer.training.assembly import build_run_engine


def add_ranks(parser: argparse.ArgumentParser, *, model: str, ranks: int) -> None:
    """Add the options that choose a model and its ranks."""
    parser.add_argument("--model", default=model, help=f"of configs/model; default {model}")
    parser.add_argument("--ranks", type=command.positive, default=ranks, help=f"default {ranks}")


def run_on_ranks(
    worker: Worker, payload: dict[str, Any], *, ranks: int, gpus: int = 0
) -> list[dict[str, Any]]:
    """Run a worker on ranks of this machine, each with so many GPUs; return what they tell."""
    messages: list[dict[str, Any]] = []
    config = ClusterConfig(backend="local", workers=ranks, gpus_per_worker=gpus)
    run(config, worker, payload, on_message=messages.append, stop=threading.Event())
    return messages


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
        self.engine.update(learning_rate=1e-4, ema_decays=(0.999,))


def live_bytes() -> int:
    """Add up the memory of all tensors that Python refers to, each piece of it once.

    What autograd keeps for a backward pass under way is not seen, and there should be none.
    """
    gc.collect()
    found: dict[int, int] = {}
    for tensor in [each for each in gc.get_objects() if isinstance(each, Tensor)]:
        held = (tensor, tensor.grad) if tensor.is_leaf else (tensor,)
        for one in held:
            # On the meta device a tensor is a shape and no memory.
            if one is None or one.device.type == "meta" or one.layout != torch.strided:
                continue
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())
