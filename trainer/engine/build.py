"""The engine that the configuration names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster.placement import Placement
from models.transformer.block import Streams
from models.transformer.lapflow import LapFlowTransformer, OnBuilt
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.optimizer import OptimConfig
from trainer.engine.plain import PlainEngine
from trainer.engine.protocol import BuildModel, Engine, EngineConfig
from trainer.engine.zero import ZeroEngine


class CudaStreams(Streams):
    """The current stream, and one more for coarse scales.

    The backward pass follows by itself: autograd runs each operation on the stream of its forward
    pass, and waits where a gradient passes from one stream to the other.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._coarse = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fork(self, tensors: Iterable[Tensor]) -> None:
        """Let the coarse stream use what the current stream has made so far."""
        self._coarse.wait_stream(torch.cuda.current_stream())
        self._share(tensors, self._coarse)

    @contextmanager
    def coarse(self) -> Iterator[None]:
        """Queue the work of a `with` block on the coarse stream."""
        with torch.cuda.stream(self._coarse):
            yield

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use what the coarse stream has made so far."""
        current = torch.cuda.current_stream()
        current.wait_stream(self._coarse)
        self._share(tensors, current)

    def _share(self, tensors: Iterable[Tensor], user: torch.cuda.Stream) -> None:
        for tensor in tensors:
            # Or the allocator would give its memory away when its own stream is done with it.
            tensor.record_stream(user)


logger = logging.getLogger(__name__)


def build_engine(
    build_model: BuildModel,
    *,
    config: EngineConfig,
    placement: Placement,
    optim: OptimConfig,
    micro_batch: int,
    rank_batch: int,
    world_size: int,
    device: torch.device,
) -> Engine:
    """Build a model where the placement and the engine want it; a collective call.

    Args:
        build_model: Builds the model with its initial weights, alike on all ranks.
        config: Which engine, and how it shards.
        placement: Where the experts are.
        optim: Optimizer settings.
        micro_batch: Images per rank and forward pass.
        rank_batch: Images per rank and update; a multiple of `micro_batch`.
        world_size: Number of ranks.
        device: Where this rank computes.
    """
    logger.info("building the model, its optimizer and EMA on %s", device)
    grad_accum_steps = rank_batch // micro_batch
    shards = ExpertShards.of(placement)

    def build(on_built: OnBuilt) -> LapFlowTransformer:
        model = build_model(on_built)
        model.checkpoint_activations(config.activation_checkpointing)
        if config.overlap_exchange and device.type == "cuda":
            model.queue(CudaStreams(device))
        return model

    if config.kind == "plain":
        return PlainEngine(
            build, shards=shards, optim=optim, grad_accum_steps=grad_accum_steps, device=device
        )
    return ZeroEngine(
        build,
        config=config,
        shards=shards,
        optim=optim,
        micro_batch=micro_batch,
        grad_accum_steps=grad_accum_steps,
        world_size=world_size,
        device=device,
    )
