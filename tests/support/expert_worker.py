"""What the tests of expert shards run on every rank, beside those that all engines pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cluster.contract import WorkerContext
from cluster.placement import Placement
from models.axes import Bands
from models.transformer.config import Ties, TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from tests.support.engine_worker import BATCH, OPTIM, build, state, tell_once, updates
from trainer.engine.expert_shards import ExpertShards, shards_of, whole_shape

SCALES = 3
IMAGES = (3, 2, 1)
"""Images of one rank that carry each scale, coarse to fine."""


def network(options: dict[str, Any], on_built: OnBuilt = no_op) -> LapFlowTransformer:
    """Build a small network in float64 whose every weight is random, alike on all ranks."""

    def randomised(part: torch.nn.Module) -> None:
        part.double()
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        on_built(part)

    options = dict(options)
    if "ties" in options:
        options["ties"] = Ties(**options["ties"])
    torch.manual_seed(3)
    return LapFlowTransformer(
        TransformerConfig(**{"depth": 2, "width": 24, "heads": 3} | options),
        scales=SCALES,
        channels=3,
        image_size=16,
        classes=5,
        on_built=randomised,
    )


def loss_of(model: LapFlowTransformer, *, rank: int, active: int) -> torch.Tensor:
    """Run the model on the images of a rank, which are a function of its number."""
    generator = torch.Generator().manual_seed(rank)

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = IMAGES[:active]
    states: Bands = tuple(
        normals(count, 3, 16 >> k, 16 >> k)
        for k, count in zip(reversed(range(SCALES)), images, strict=False)
    )
    time = torch.rand(images[0], generator=generator, dtype=torch.float64)
    labels = torch.arange(images[0]) + rank
    velocities = model(states, time, labels % 6)
    weights = [normals(*velocity.shape) for velocity in velocities]
    return sum(
        ((v * w).sum() for v, w in zip(velocities, weights, strict=True)),
        start=torch.zeros((), dtype=torch.float64),
    )


def gradients(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Compare loss and averaged gradients of sharded and whole experts; tell the worst errors."""
    world = context.world_size
    sizes = sorted({size for case in payload["cases"] for size in case["placement"].values()})
    formed = {size: ExpertShards.of(Placement((size,) * SCALES)).exchanges[0] for size in sizes}
    wholes: dict[str, tuple[LapFlowTransformer, list[torch.Tensor]]] = {}
    for case in payload["cases"]:
        options, active = case.get("options", {}), case.get("active", SCALES)
        # Many placements are compared with the same whole model.
        if (name := f"{options} {active}") not in wholes:
            whole = network(options)
            losses = [loss_of(whole, rank=rank, active=active) for rank in range(world)]
            torch.stack(losses).mean().backward()
            wholes[name] = whole, [loss.detach() for loss in losses]
        whole, losses = wholes[name]
        shards = ExpertShards(exchanges={k: formed[n] for k, n in case["placement"].items()})
        partitioned = network(options, shards.partition)
        partitioned.checkpoint_activations(case.get("checkpointed", ()))
        own = loss_of(partitioned, rank=context.rank, active=active)
        own.backward()
        held = shards_of(partitioned)
        errors, same = [], []
        for name, parameter in partitioned.named_parameters():
            shard = held.get(name)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient, group=None if shard is None else shard.replica_group)
            expected = whole.get_parameter(name).grad
            if expected is None:
                expected = torch.zeros(whole_shape(parameter.shape, shard), dtype=torch.float64)
            begun = whole.get_parameter(name).detach()
            if shard is not None:
                expected = expected.chunk(shard.ranks)[shard.index]
                begun = begun.chunk(shard.ranks)[shard.index]
            # The same seed gives the same initial weights, whatever the placement.
            same.append(torch.equal(parameter.detach(), begun))
            error = (gradient / world - expected).norm() / expected.norm().clamp(min=1e-3)
            errors.append(float(error))
        loss = float((own - losses[context.rank]).abs() / losses[context.rank].abs())
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, (loss, max(errors), len(held), all(same)))
        tell_once(context, {"errors": everyone})


def trajectories(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train every variant alike; tell losses, norms and, after each update, the whole state."""
    batch = 12
    micro = batch // context.world_size
    # Without a memory, the first moment is the clipped gradient.
    optim = replace(OPTIM, beta1=0.0)
    for variant in payload["variants"]:
        engine = build(
            context, micro_batch=micro, scales=SCALES, batch=batch, optim=optim, **variant
        )
        for update in range(payload["updates"]):
            (history,) = updates(
                engine,
                context,
                count=1,
                first=update,
                micro_batch=micro,
                scales=SCALES,
                batch=batch,
                rate=1e-3,
            )
            # All of the state is gathered only now and then; it takes longer than the updates.
            whole = state(engine) if update + 1 in payload["looks"] else None
            tell_once(context, {"history": history, "state": whole})


def moved(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train, move the state into engines of other placements, and train both on; tell states."""
    micro = BATCH // context.world_size
    source = build(context, micro_batch=micro, **payload["source"])
    updates(source, context, count=2, micro_batch=micro)
    before = state(source)
    updates(source, context, count=2, first=2, micro_batch=micro)
    after = state(source)
    for settings in payload["targets"]:
        target = build(context, micro_batch=micro, **settings)
        for fragment in target.fragments():
            for kind, tensor in fragment.tensors.items():
                values = torch.tensor(before[f"{kind}/{fragment.name}"])
                tensor.copy_(values[fragment.start : fragment.start + fragment.numel])
        target.load_fragments(2)
        arrived = state(target)
        updates(target, context, count=2, first=2, micro_batch=micro)
        told = {"before": before, "arrived": arrived, "after": after, "end": state(target)}
        tell_once(context, told)
