"""What the engine tests run on every rank; results go back as plain lists of numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from cluster.contract import WorkerContext
from cluster.placement import Placement
from models.ema import EmaConfig
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from trainer import rng
from trainer.engine import compiled
from trainer.engine.build import build_engine
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import Engine, EngineConfig

_UNPICKLE = distributed_c10d._tensor_to_object

BATCH = 8
# AdamW divides by the gradient's size, so with its usual epsilon a gradient of almost nothing turns
# rounding into a full step. This epsilon keeps the update a smooth function of the gradient.
EMA = EmaConfig(decay=0.9, decays=(0.5,), warmup=False)
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, epsilon=1e-3)


def tiny_model(on_built: OnBuilt = no_op, *, scales: int = 2, **sizes: Any) -> LapFlowTransformer:
    """Build a tiny LapFlow with the same initial weights in every call."""

    def randomised(part: torch.nn.Module) -> None:
        # Zero-initialised output layers would leave most gradients of the first updates at 0.
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        on_built(part)

    torch.manual_seed(0)
    return LapFlowTransformer(
        TransformerConfig(**{"depth": 2, "width": 16, "heads": 2} | sizes),
        scales=scales,
        channels=1,
        image_size=8,
        classes=3,
        on_built=randomised,
    )


def build(
    context: WorkerContext,
    *,
    micro_batch: int,
    placement: dict[int, int] | None = None,
    model: dict[str, Any] | None = None,
    scales: int = 2,
    batch: int = BATCH,
    optim: OptimConfig = OPTIM,
    ema: EmaConfig = EMA,
    **engine: Any,
) -> Engine:
    """Wrap a tiny LapFlow with the same initial weights on every rank and in every call."""

    return build_engine(
        lambda on_built: tiny_model(on_built, scales=scales, **(model or {})),
        config=EngineConfig(**engine),
        placement=Placement.of(placement or {}, scales=scales),
        optim=optim,
        ema=ema,
        micro_batch=micro_batch,
        rank_batch=batch // context.world_size,
        world_size=context.world_size,
        device=torch.device("cpu"),
    )


def updates(
    engine: Engine,
    context: WorkerContext,
    *,
    count: int,
    first: int = 0,
    micro_batch: int,
    stages: list[int] | None = None,
    scales: int = 2,
    batch: int = BATCH,
    rate: float = OPTIM.learning_rate,
) -> list[tuple[float, float]]:
    """Run updates on images that are a function of their position; return (loss, norm).

    Each update has the stage listed for it; without a list the stages are stratified.
    """
    choice = "stratified" if stages is None else "one_per_step"
    objective = Objective(Flow(FlowConfig(scales=scales, stage_choice=choice)))
    share = batch // context.world_size
    results = []
    for update in range(first, first + count):
        start = update * batch + context.rank * share
        total = 0.0
        for offset in range(0, share, micro_batch):
            place: dict[str, Any] = {"first": start + offset, "count": micro_batch}
            images = rng.normals(1, "images", size=64, **place).view(-1, 1, 8, 8)
            loss = objective(
                engine,
                bands=split(images, scales),
                labels=(torch.arange(micro_batch) + start + offset) % 3,
                uniforms=rng.uniforms(1, "time", **place),
                noise=rng.normals(1, "noise", size=64, **place),
                stage=None if stages is None else stages[update],
            ).total
            engine.backward(loss, last=offset + micro_batch >= share)
            total += loss.item() * micro_batch / share
        outcome = engine.update(learning_rate=rate, ema_decays=EMA.decays_at(0))
        assert outcome.applied
        results.append((mean_over_ranks(total), float(outcome.gradient_norm)))
    return results


def mean_over_ranks(value: float) -> float:
    """Average a number over ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    return float(tensor / torch.distributed.get_world_size())


def state(engine: Engine) -> dict[str, list[float]]:
    """Gather every parameter's master, moments and EMA over all ranks, whole."""
    wholes: dict[str, torch.Tensor] = {}
    mine = [
        (f.name, f.start, f.shape, {k: t.clone() for k, t in f.tensors.items()})
        for f in engine.fragments()
    ]
    for rank in of_all_ranks(mine):
        for name, start, shape, tensors in rank:
            for kind, tensor in tensors.items():
                size = int(torch.Size(shape).numel())
                whole = wholes.setdefault(f"{kind}/{name}", torch.full((size,), float("nan")))
                whole[start : start + tensor.numel()] = tensor
    return {name: whole.tolist() for name, whole in wholes.items()}


def conformance(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train every variant alike and tell losses, norms and final states."""
    stages = payload.get("stages")
    for variant in payload["variants"]:
        micro = variant.pop("micro_batch", BATCH // context.world_size)
        poisoned = variant.pop("poisoned", False)
        engine = build(context, micro_batch=micro, **variant)
        history = updates(engine, context, count=4, micro_batch=micro, stages=stages)
        told = {"history": history, "state": state(engine)}
        if poisoned:
            told |= poison(engine, context, before=told["state"], micro_batch=micro)
        tell_once(context, told)


def of_all_ranks(value: object) -> list[Any]:
    """Gather any value; a test may unpickle what its own ranks sent."""
    everyone: list[Any] = [None] * dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_tensor_to_object", _UNPICKLE)
        dist.all_gather_object(everyone, value)
    return everyone


def _refuse_unpickling() -> None:
    """Fail from now on where a library would unpickle what came from another rank."""

    def refuse(*_arguments: object) -> None:
        raise AssertionError("something that came over a process group was about to be unpickled")

    distributed_c10d._tensor_to_object = refuse
    with pytest.raises(AssertionError, match="about to be unpickled"):
        dist.all_gather_object([None] * dist.get_world_size(), "a canary")


def course(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Take every engine through all that may happen to one; tell each side of it.

    It trains 4 updates; half way its state is copied and its model is used with other weights. A
    fresh engine goes on from the copy, and gets a NaN at the end.
    """
    _refuse_unpickling()
    compiled.BACKEND = payload.get("backend", compiled.BACKEND)
    micro = BATCH // context.world_size
    for settings in payload["engines"]:
        straight, resumed = (build(context, micro_batch=micro, **settings) for _ in range(2))
        history = updates(straight, context, count=2, micro_batch=micro)
        copies = [
            {kind: tensor.clone() for kind, tensor in fragment.tensors.items()}
            for fragment in straight.fragments()
        ]
        told = other_weights(straight)
        history += updates(straight, context, count=2, first=2, micro_batch=micro)
        for source, target in zip(copies, resumed.fragments(), strict=True):
            for kind, tensor in target.tensors.items():
                tensor.copy_(source[kind])
        resumed.load_fragments(2)
        updates(resumed, context, count=2, first=2, micro_batch=micro)
        told |= {"history": history, "state": state(straight), "resumed": state(resumed)}
        told |= poison(resumed, context, before=told["resumed"], micro_batch=micro)
        tell_once(context, told)


def adding_up(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Add small gradients to a large one; tell the sum in units of the large one.

    All micro-batches are the same, so their gradients are, and a loss that is divided by a power of
    two divides them exactly: the first counts whole, each other 1/512.
    """
    micro, passes = 2, payload["passes"]
    objective = Objective(Flow(FlowConfig(scales=2)))
    images = rng.normals(1, "images", size=64, first=0, count=micro).view(-1, 1, 8, 8)
    batch: dict[str, Any] = {
        "bands": split(images, 2),
        "labels": torch.arange(micro),
        "uniforms": rng.uniforms(1, "time", first=0, count=micro),
        "noise": rng.normals(1, "noise", size=64, first=0, count=micro),
    }
    for variant in payload["variants"]:
        engine = build(
            context, micro_batch=micro, batch=micro * passes * context.world_size, **variant
        )
        norms = []
        for small in (0.0, 1 / 512):
            for number in range(passes):
                loss = objective(engine, **batch).total
                engine.backward(loss * (small if number else 1), last=number == passes - 1)
            # Nothing moves, so that the second gradient is that of the same weights.
            outcome = engine.update(learning_rate=0.0, ema_decays=EMA.decays_at(0))
            norms.append(float(outcome.gradient_norm))
        tell_once(context, {"sum": norms[1] / norms[0]})


def other_weights(engine: Engine) -> dict[str, Any]:
    """Use the model with its averaged and its initial weights, beside whole models with them."""
    inputs = (
        (torch.linspace(-1, 1, 32).view(2, 1, 4, 4), torch.linspace(-1, 1, 64).view(1, 1, 8, 8)),
        torch.tensor([0.25, 0.75]),
        torch.tensor([0, 3]),
    )
    whole = tiny_model()
    averages = state(engine)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(torch.tensor(averages[f"ema/{name}"]).view_as(parameter))
        expected = [velocity.flatten().tolist() for velocity in whole(*inputs)]
        with engine.ema_weights() as model:
            inside = [velocity.flatten().tolist() for velocity in model(*inputs)]
        begun = [velocity.flatten().tolist() for velocity in tiny_model()(*inputs)]
        with engine.initial_weights() as model:
            beginning = [velocity.flatten().tolist() for velocity in model(*inputs)]
    return {"inside": inside, "expected": expected, "beginning": beginning, "begun": begun}


def poison(
    engine: Engine,
    context: WorkerContext,
    *,
    before: dict[str, list[float]],
    micro_batch: int,
) -> dict[str, Any]:
    """Give one rank a NaN loss after 4 updates; every rank's outcome, and what comes after it.

    Args:
        engine: Of several micro-batches it is the first one's loss.
        context: This rank.
        before: The engine's state.
        micro_batch: Images of a forward pass.
    """
    passes = BATCH // context.world_size // micro_batch
    for number in range(passes):
        velocity = engine(
            (torch.ones(2, 1, 4, 4), torch.ones(1, 1, 8, 8)), torch.rand(2), torch.tensor([0, 1])
        )
        loss = sum(v.square().mean() for v in velocity)
        assert isinstance(loss, torch.Tensor)
        bad = context.rank == 1 and number == 0
        engine.backward(loss * (float("nan") if bad else 1.0), last=number == passes - 1)
    outcome = engine.update(learning_rate=1e-2, ema_decays=EMA.decays_at(0))
    applied = of_all_ranks(bool(outcome.applied))
    unmoved = state(engine) == before
    history = updates(engine, context, count=1, first=4, micro_batch=micro_batch)
    return {"applied": applied, "unmoved": unmoved, "next": history}


def tell_once(context: WorkerContext, message: dict[str, Any]) -> None:
    """Tell a message from the first rank."""
    if context.rank == 0:
        context.report(message)
