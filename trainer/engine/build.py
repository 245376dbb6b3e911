"""The engine that the configuration names."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from cluster.placement import Placement
from models.ema import EmaConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.compiled import compile_as_asked
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.optimizer import OptimConfig
from trainer.engine.plain import PlainEngine
from trainer.engine.protocol import Arrange, BuildModel, Engine, EngineConfig
from trainer.engine.streams import CudaStreams

logger = logging.getLogger(__name__)


def build_engine(
    build_model: BuildModel,
    *,
    config: EngineConfig,
    placement: Placement,
    optim: OptimConfig,
    ema: EmaConfig,
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
        ema: Decays of the moving averages, and where they are kept.
        micro_batch: Images per rank and forward pass.
        rank_batch: Images per rank and update; a multiple of `micro_batch`.
        world_size: Number of ranks.
        device: Where this rank computes.
    """
    logger.info("building the model, its optimizer and EMA on %s", device)
    config = replace(config, kind=config.kind_of(world_size))
    grad_accum_steps = rank_batch // micro_batch
    shards = ExpertShards.of(placement, regather=config.regathers)

    arrange = _arrangement(config, placement, shards, device, world_size=world_size)
    if config.precision == "fp32" and device.type == "cuda":
        allow_tf32(config.tf32)
    if config.kind == "plain":
        return PlainEngine(
            build_model,
            arrange=arrange,
            shards=shards,
            optim=optim,
            ema=ema,
            grad_accum_steps=grad_accum_steps,
            device=device,
            dtype=config.dtype,
            sum_dtype=config.sum_dtype(grad_accum_steps),
        )
    # Here, for one device does without DeepSpeed, whose import takes seconds.
    from trainer.engine.zero import ZeroEngine

    return ZeroEngine(
        build_model,
        arrange=arrange,
        config=config,
        shards=shards,
        optim=optim,
        ema=ema,
        micro_batch=micro_batch,
        grad_accum_steps=grad_accum_steps,
        world_size=world_size,
        device=device,
    )


def _arrangement(
    config: EngineConfig,
    placement: Placement,
    shards: ExpertShards,
    device: torch.device,
    *,
    world_size: int,
) -> Arrange:
    def arrange(model: LapFlowTransformer) -> None:
        model.checkpoint_activations(config.recomputed)
        shards.join(model)
        compile_as_asked(model, config)
        # A finest scale that is sharded exchanges on the communicators of coarse ones.
        if config.has_overlap(world_size) and placement.ranks[-1] == 1 and device.type == "cuda":
            model.queue(CudaStreams(device))

    return arrange


def allow_tf32(allowed: bool) -> None:
    """Say how GPUs multiply float32 matrices from here on, in this process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    if allowed:
        logger.info(
            "engine.precision=fp32 on a GPU: matrices are multiplied in TF32, with 10 bits of "
            "mantissa; engine.tf32=false multiplies them in full"
        )
