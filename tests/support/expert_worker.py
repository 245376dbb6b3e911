"""What the tests of expert shards run on every rank, beside those that all engines pass."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from benchmarks.experts.training import live_bytes
from benchmarks.experts.wire import WireCounter
from cluster.contract import WorkerContext
from cluster.placement import Placement
from models.axes import Bands
from models.transformer.config import Ties, TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from tests.support.engine_worker import (
    BATCH,
    OPTIM,
    build,
    of_all_ranks,
    state,
    tell_once,
    updates,
)
from tests.unit.models.kept import kept_bytes
from trainer.engine.exchange import Exchange
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
        TransformerConfig(**{"depth": 3, "width": 24, "heads": 3} | options),
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


def form(cases: list[dict[str, Any]]) -> dict[int, Exchange]:
    """Form the expert groups of all cases, once for each size."""
    sizes = sorted({size for case in cases for size in case["placement"].values()})
    return {size: ExpertShards.of(Placement((size,) * SCALES)).exchanges[0] for size in sizes}


def partitioned(case: dict[str, Any], formed: dict[int, Exchange]) -> LapFlowTransformer:
    """Build the network of a case as this rank holds it."""
    sharded = Placement.of(case["placement"], scales=SCALES).sharded
    shards = ExpertShards(
        exchanges={k: formed[size] for k, size in sharded.items()},
        regather=case.get("regather", True),
    )
    model = network(case.get("options", {}), shards.partition)
    model.checkpoint_activations(case.get("checkpointed", ()))
    shards.join(model)
    return model


def gradients(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Compare loss and averaged gradients of sharded and whole experts; tell the worst errors."""
    world = context.world_size
    formed = form(payload["cases"])
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
        model = partitioned(case, formed)
        own = loss_of(model, rank=context.rank, active=active)
        own.backward()
        held = shards_of(model)
        errors, same = [], []
        for name, parameter in model.named_parameters():
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


def collectives(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Tell the calls and bytes of every case's collectives in a forward and backward pass."""
    formed = form(payload["cases"])
    for case in payload["cases"]:
        model = partitioned(case, formed)
        with WireCounter() as counter:
            loss_of(model, rank=context.rank, active=case.get("active", SCALES)).backward()
        tell_once(context, {"calls": dict(counter.calls), "bytes": sum(counter.bytes.values())})


def kept(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Tell the bytes that every case keeps for the backward pass."""
    formed = form(payload["cases"])
    for case in payload["cases"]:
        model = partitioned(case, formed)
        # Buffers of exchanges, which a first pass makes, are not kept for the backward pass.
        loss_of(model, rank=context.rank, active=SCALES)
        # A thread of gloo lets go of an exchange some time after it: that can only add.
        passes = [kept_bytes(model, list(IMAGES), channels=3, size=16) for _ in range(3)]
        tell_once(context, {"bytes": min(passes)})


def buffered(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Tell the bytes that are there after every case's pass and were not before."""
    for case in payload["cases"]:
        model = partitioned(case, form([case]))
        before = settled_bytes()
        loss_of(model, rank=context.rank, active=SCALES).backward()
        model.zero_grad(set_to_none=True)
        tell_once(context, {"bytes": settled_bytes() - before})


def settled_bytes() -> int:
    """Count the bytes of live tensors when gloo's threads, too, have let go of theirs."""
    looks = []
    for _ in range(3):
        time.sleep(0.05)
        looks.append(live_bytes())
    return min(looks)


def trajectories(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train every variant alike; tell losses, norms and, after each update, the whole state."""
    batch = 12
    micro = batch // context.world_size
    # Without a memory, the first moment is the clipped gradient.
    optim = replace(OPTIM, beta1=0.0)
    for variant in payload["variants"]:
        engine = build(
            context,
            micro_batch=micro,
            # The first block is whole in every placement.
            model={"depth": 3},
            scales=SCALES,
            batch=batch,
            optim=optim,
            **variant,
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


def unlike_nodes(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train where one half of the ranks adds up norms to another last bit; tell ranks' states."""
    add_up = nn.utils.get_total_norm

    def add_up_otherwise(gradients: list[torch.Tensor]) -> torch.Tensor:
        norm = add_up(gradients)
        return norm.nextafter(norm + 1) if 2 * context.rank >= context.world_size else norm

    micro = BATCH // context.world_size
    engine = build(context, micro_batch=micro, kind="plain", placement=payload["placement"])
    with mock.patch.object(nn.utils, "get_total_norm", add_up_otherwise):
        history = updates(engine, context, count=3, micro_batch=micro)
    held = {
        (fragment.name, fragment.start): fragment.tensors["master"].tolist()
        for fragment in engine.fragments()
    }
    tell_once(context, {"ranks": of_all_ranks((history, held))})


def group_ranks(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Build engines; tell the ranks of each process group that an engine formed with this rank."""
    for variant in payload["variants"]:
        before = set(distributed_c10d._world.pg_group_ranks)
        engine = build(context, micro_batch=BATCH // context.world_size, **variant)
        formed = [
            tuple(ranks)
            for group, ranks in distributed_c10d._world.pg_group_ranks.items()
            if group not in before and context.rank in ranks
        ]
        updates(engine, context, count=1, micro_batch=BATCH // context.world_size)
        tell_once(context, {"formed": formed})


def sampled_between(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train, run the model on more images than training does, train on; tell buffers' bytes."""
    micro = BATCH // context.world_size
    images = 4 * BATCH
    states = (torch.zeros(images, 1, 4, 4), torch.zeros(images, 1, 8, 8))
    for variant in payload["variants"]:
        engine = build(context, micro_batch=micro, **variant)
        told = []
        for borrow in (engine.ema_weights, engine.initial_weights):
            updates(engine, context, count=1, micro_batch=micro)
            told.append(_buffered(engine))
            with borrow() as model, torch.no_grad():
                model(states, torch.zeros(images), torch.zeros(images, dtype=torch.long))
                told.append(_buffered(engine))
            told.append(_buffered(engine))
        tell_once(context, {"bytes": told})


def _buffered(engine: Any) -> int:
    exchanges = set(engine._shards.values())
    return sum(kept.nbytes for each in exchanges for kept in each.buffers._kept.values())
