"""How evenly ranks are busy: the mean of their step times over the longest of them, simulated.

Each rank's images are dealt to stages by the training objective itself, at the rank's own positions
in the run; the queues of its GPU are then simulated with what it carries of each scale. Ranks of an
expert group wait for the one that has most. An update is as long as its slowest rank, so what is
missing to 1 is time that GPUs wait. "by chance" is what it would be if each image drew its stage by
itself; that is by formula, for then there are hundreds of cases. "state" is the same ratio of what
ranks hold of the weights with ZeRO-3.

What is not simulated: how long samples take to decode, which the loader hides, and other work on
the machines.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks import command
from benchmarks.command import Cell
from benchmarks.experts.variant import Variant
from cluster.placement import expert_group
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.transformer.lapflow import LapFlowTransformer
from trainer import rng
from trainer.config.job import JobConfig, micro_batch
from trainer.planning.placing import model_shape, resolve_placement, workload, zero_stage
from trainer.planning.queues import simulate
from trainer.planning.step_time import Timing, step_time

Carried: TypeAlias = tuple[float, ...]
"""Images of a rank's pass that carry each scale, coarse to fine, on average over an update."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("ranks balance", description=__doc__ or "", rounds=1)
    parser.add_argument("--model", default="xl_2", help="member of configs/model; default xl_2")
    parser.add_argument("--images", type=command.positive, default=33, help="a rank; default 33")
    parser.add_argument(
        "--ranks", type=command.whole_numbers, default=(8, 64, 512, 1000), help="8,64,512,1000"
    )
    parser.add_argument("--updates", type=command.positive, default=1, help="default 1")
    options = parser.parse_args(arguments)
    setting = command.setting("ranks balance", options)
    for ranks in options.ranks:
        for variant in variants(ranks):
            job = variant.job(model=options.model, ranks=ranks, images=options.images)
            row = measure(job, updates=options.updates)
            setting.report.add(**{"held as": variant.name, **row})
        job = replace(job, flow=replace(job.flow, stage_choice="one_per_step"))
        row = measure(job, updates=options.updates)
        setting.report.add(**{"held as": f"{variant.name}, one stage a step", **row})
    setting.deliver()
    return 0


def variants(ranks: int) -> list[Variant]:
    """What is compared: replicated experts, and coarse ones sharded over as many as eight ranks."""
    group = math.gcd(8, ranks)
    return [
        Variant(scales=3, zero_stage=1),
        Variant(scales=3, zero_stage=1, grad_accum_steps=2),
        Variant(scales=3, zero_stage=1, placement=f"{{2:{group},1:{group}}}"),
        Variant(scales=3, zero_stage=3),
    ]


def measure(job: JobConfig, *, updates: int) -> dict[str, Cell]:
    """Simulate some updates of a job; the row of the table."""
    seconds = rank_seconds(job, simulate)

    def of(
        deal: Callable[[JobConfig, int], list[Carried]], seconds: Callable[[Carried], float]
    ) -> float:
        busy, longest = 0.0, 0.0
        for update in range(updates):
            own = deal(job, update)
            busy += sum(map(seconds, own)) / len(own)
            longest += max(map(seconds, most_of_groups(job, own)))
        return busy / longest

    return {
        "ranks": job.cluster.workers,
        "step s": seconds(carried(job, 0)[0]),
        "balance": of(carried, seconds),
        "by chance": of(carried_by_chance, rank_seconds(job, None)),
        "state": state_balance(job),
    }


def rank_seconds(job: JobConfig, timing: Timing | None) -> Callable[[Carried], float]:
    """Return what tells the seconds of a step of a rank that carries so much.

    Without what is equal for all ranks and would hide how they differ: the update on the device,
    images that are encoded, and the host's time to launch kernels.

    Args:
        job: The job.
        timing: Tells how long a pass takes; None is by formula.
    """
    work, placement = workload(job), resolve_placement(job)

    @cache
    def seconds(images: Carried) -> float:
        loads = tuple(
            replace(load, images=own) for load, own in zip(work.scales, images, strict=True)
        )
        step = step_time(
            replace(work, scales=loads),
            placement,
            zero_stage=zero_stage(job),
            hardware=job.cluster.hardware,
            timing=timing,
        )
        return step.busy - step.update - step.encoding

    return seconds


def carried(job: JobConfig, update: int) -> list[Carried]:
    """Return what each rank carries in an update, as the objective deals images to stages."""
    flow, scales = Flow(job.flow), job.flow.scales
    objective, size = Objective(flow), 2**scales
    images, share = micro_batch(job), job.train.global_batch // job.cluster.workers
    seen: list[list[int]] = []

    def network(states: tuple[Tensor, ...], time: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        seen.append([len(state) for state in states] + [0] * (scales - len(states)))
        return states

    def stage() -> int | None:
        if job.flow.stage_choice == "stratified":
            return None
        first = update * job.train.global_batch
        return int(rng.uniforms(job.train.seed, "stage", first=first, count=1).item() * scales)

    found = []
    for rank in range(job.cluster.workers):
        seen.clear()
        for start in range(0, share, images):
            first = update * job.train.global_batch + rank * share + start
            objective(
                network,
                bands=tuple(
                    torch.zeros(images, 1, size >> k, size >> k) for k in reversed(range(scales))
                ),
                labels=torch.zeros(images, dtype=torch.long),
                uniforms=rng.uniforms(job.train.seed, "time", first=first, count=images),
                noise=torch.zeros(images, flow.noise_size(channels=1, image_size=size)),
                stage=stage(),
            )
        found.append(tuple(np.mean(seen, axis=0).tolist()))
    return found


def carried_by_chance(job: JobConfig, update: int) -> list[Carried]:
    """Return what each rank would carry if each image drew its stage by itself."""
    scales, batch = job.flow.scales, job.train.global_batch
    draws = rng.uniforms(job.train.seed, "stage of an image", first=update * batch, count=batch)
    stages = (draws.numpy().reshape(job.cluster.workers, -1) * scales).astype(int)
    passes = batch // job.cluster.workers // micro_batch(job)
    counts = [(stages <= k).sum(axis=1) / passes for k in reversed(range(scales))]
    return [tuple(each) for each in np.stack(counts, axis=1).tolist()]


def most_of_groups(job: JobConfig, own: Sequence[Carried]) -> list[Carried]:
    """Have each rank carry what the rank of its expert group does that carries most."""
    unit = resolve_placement(job).unit
    return [
        tuple(np.max([own[peer] for peer in expert_group(rank, unit)], axis=0).tolist())
        for rank in range(len(own))
    ]


def state_balance(job: JobConfig) -> float:
    """Return the mean of what ranks hold of all weights with ZeRO-3 over the most that one does.

    Each parameter is cut into as many equal parts as there are ranks, of which the last may be
    shorter, or nothing.
    """
    shape, ranks = model_shape(job), job.cluster.workers
    with torch.device("meta"):
        model = LapFlowTransformer(
            job.model,
            scales=shape.scales,
            channels=shape.channels,
            image_size=shape.image_size,
            classes=shape.classes,
        )
    whole = np.array([each.numel() for each in model.parameters()])
    part = -(-whole // ranks)
    held = [int(np.clip(whole - rank * part, 0, part).sum()) for rank in range(ranks)]
    return sum(held) / len(held) / max(held)
