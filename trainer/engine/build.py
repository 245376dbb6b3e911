"""The engine that the configuration names."""

from __future__ import annotations

import logging

import torch

from cluster.placement import Placement
from models.transformer.lapflow import LapFlowTransformer, Settle
from trainer.engine.cuda_streams import CudaStreams
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.plain import PlainEngine
from trainer.engine.protocol import BuildModel, Engine, EngineConfig
from trainer.engine.zero import ZeroEngine
from trainer.schedule import OptimConfig

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
    accumulation = rank_batch // micro_batch
    shards = ExpertShards.of(placement)

    def build(settle: Settle) -> LapFlowTransformer:
        model = build_model(settle)
        model.recompute(config.activation_checkpointing)
        if config.overlap_exchange and device.type == "cuda":
            model.queue(CudaStreams(device))
        return model

    if config.kind == "plain":
        return PlainEngine(
            build,
            config=config,
            shards=shards,
            optim=optim,
            accumulation=accumulation,
            device=device,
        )
    return ZeroEngine(
        build,
        config=config,
        shards=shards,
        optim=optim,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        device=device,
    )
