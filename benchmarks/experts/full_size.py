"""Bytes of XL's state on one of eight ranks, in the engine itself but without memory.

One process stands for rank 0 of eight: torch's fake process group answers its collectives, and its
tensors are torch's fake tensors, which have a size and no memory. The engine, DeepSpeed included,
does not notice. Gradients, which do not exist yet, are predicted; `memory` shows how well.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import command
from benchmarks.command import Cell
from benchmarks.experts.training import add_ranks, live_bytes
from benchmarks.experts.variant import Variant
from cluster.contract import WorkerContext
from trainer.config.job import JobConfig
from trainer.config.reading import from_dict, to_dict
from trainer.planning.placing import resolve_placement, workload, zero_stage
from trainer.planning.prediction import rank_memory
from trainer.training.worker import build_run_engine

_GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts full_size", description=__doc__ or "", rounds=1)
    add_ranks(parser, model="xl_2", ranks=8)
    options = parser.parse_args(arguments)
    setting = command.setting("experts full_size", options)
    ranks = options.ranks
    rows = [
        Variant(scales=1, zero_stage=1),
        *(Variant(scales=3, zero_stage=stage) for stage in (1, 2, 3)),
        *(
            Variant(scales=3, zero_stage=stage, placement=f"{{2:{ranks},1:{ranks}}}")
            for stage in (1, 2, 3)
        ),
    ]
    baseline = None
    for variant in rows:
        job = variant.job(model=options.model, ranks=ranks, images=6)
        # DeepSpeed keeps the groups of its first engine for all others of a process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            counted = process.submit(count, to_dict(job)).result()
        memory = rank_memory(workload(job), resolve_placement(job), zero_stage=zero_stage(job))
        predicted = memory.weights + memory.optimizer + memory.ema
        # ZeRO-3 has its place for gradients from the start.
        total = counted if variant.zero_stage == 3 else counted + memory.gradients
        predicted += memory.gradients if variant.zero_stage == 3 else 0
        baseline = baseline or total
        row: dict[str, Cell] = {
            "held as": variant.name,
            "GiB counted": counted / _GIB,
            "predicted": predicted / _GIB,
            "ratio": counted / predicted,
            "GiB with gradients": total / _GIB,
            "of DiT": total / baseline,
        }
        setting.report.add(**row)
    setting.deliver()
    return 0


def count(values: dict[str, Any]) -> int:
    """Build the engine of a job as rank 0 of its ranks; return the bytes of its tensors."""
    job = from_dict(JobConfig, values)
    context = join_alone(job)
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "to", _stay):
        engine = build_run_engine(
            job, world_size=context.world_size, device=torch.device(context.device)
        )
        # Moments are made when they are first asked for.
        engine.fragments()
        return live_bytes()


def join_alone(job: JobConfig) -> WorkerContext:
    """Stand for rank 0 of a job's ranks, with a process group that has no others."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(job.cluster.workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    dist.init_process_group("fake", rank=0, world_size=job.cluster.workers, store=FakeStore())
    # The fake group warns of each collective that it does not carry out.
    sys.stderr.flush()
    return WorkerContext(
        rank=0,
        world_size=job.cluster.workers,
        local_rank=0,
        local_world_size=job.cluster.workers,
        attempt=0,
        device="cpu",
        stop_requested=lambda: False,
        report=lambda message: None,
    )


def _stay(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """Stand in for moving a module: fake tensors are where they should be and cannot be moved."""
    return module
