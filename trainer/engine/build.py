"""The engine that the configuration names."""

from __future__ import annotations

from torch import nn

from trainer.engine.plain import PlainEngine
from trainer.engine.protocol import Engine, EngineConfig
from trainer.engine.zero import ZeroEngine
from trainer.schedule import OptimConfig


def build_engine(
    model: nn.Module,
    *,
    config: EngineConfig,
    optim: OptimConfig,
    micro_batch: int,
    rank_batch: int,
    world_size: int,
) -> Engine:
    """Wrap a model.

    Args:
        model: The model with its initial weights, alike on every rank, on its device.
        config: Which engine, and how it shards.
        optim: Optimizer settings.
        micro_batch: Images per rank and forward pass.
        rank_batch: Images per rank and update; a multiple of `micro_batch`.
        world_size: Number of ranks.
    """
    accumulation = rank_batch // micro_batch
    if config.kind == "plain":
        return PlainEngine(model, config=config, optim=optim, accumulation=accumulation)
    return ZeroEngine(
        model,
        config=config,
        optim=optim,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
    )
