"""Bytes of XL on one of eight ranks, in the engine itself but without memory.

One process stands for rank 0 of eight: torch's fake process group answers its collectives, and its
tensors are torch's fake tensors, which have a size and no memory. The engine, DeepSpeed included,
does not notice. Activations are what autograd keeps of a forward pass of the model as the rank
holds it. Gradients and buffers, which do not exist then, are predicted; `memory` and the tests show
how well.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import command
from benchmarks.experts.training import add_ranks, live_bytes
from benchmarks.experts.variant import Variant
from cluster.contract import WorkerContext
from trainer.config.job import JobConfig, micro_batch
from trainer.config.reading import from_dict, to_dict
from trainer.engine.expert_shards import ExpertShards
from trainer.planning.memory import rank_memory
from trainer.planning.placing import model_shape, resolve_placement, workload, zero_stage
from trainer.training.assembly import build_run_engine, initial_model

_GIB = 2**30
_Told = TypeVar("_Told")


IMAGES = {1: 33, 2: 34, 3: 33}
"""Images of a rank by number of scales: about 33, in equal shares of the stages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts full_size", description=__doc__ or "", rounds=1)
    add_ranks(parser, model="xl_2", ranks=8)
    options = parser.parse_args(arguments)
    setting = command.setting("experts full_size", options)
    ranks = options.ranks
    coarse = f"{{2:{ranks},1:{ranks}}}"
    rows = [
        *(Variant(scales=3, zero_stage=stage) for stage in (1, 2, 3)),
        *(Variant(scales=3, zero_stage=stage, placement=coarse) for stage in (1, 2, 3)),
        Variant(scales=3, zero_stage=1, placement=coarse, keeps_tokens=True),
        Variant(scales=3, zero_stage=1, placement=f"{{2:{ranks}}}"),
        Variant(scales=2, zero_stage=1),
        Variant(scales=2, zero_stage=1, placement=f"{{1:{ranks}}}"),
    ]
    single = Variant(scales=1, zero_stage=1)
    one_scale: dict[int, float] = {}
    for images in sorted(set(IMAGES.values())):
        row = measure(single, single.job(model=options.model, ranks=ranks, images=images))
        one_scale[images] = float(row["in all"])
        setting.report.add(**{**row, "held as": f"{single.name}, {images} images", "of it": 1.0})
    for variant in rows:
        images = IMAGES[variant.scales]
        row = measure(variant, variant.job(model=options.model, ranks=ranks, images=images))
        setting.report.add(**row, **{"of it": float(row["in all"]) / one_scale[images]})
    setting.deliver()
    return 0


def measure(variant: Variant, job: JobConfig) -> dict[str, Any]:
    """Count what one variant holds; the row of the table, in GiB."""
    state, kept = (apart(function, to_dict(job)) for function in (count, count_kept))
    memory = rank_memory(workload(job), resolve_placement(job), zero_stage=zero_stage(job))
    predicted = memory.weights + memory.optimizer + memory.ema
    # ZeRO-3 has its place for gradients from the start.
    beside = 0 if variant.zero_stage == 3 else memory.gradients
    predicted += memory.gradients - beside
    return {
        "held as": variant.name,
        "state": state / _GIB,
        "predicted": predicted / _GIB,
        "ratio": state / predicted,
        "activations": kept / _GIB,
        "as predicted": kept / memory.activations,
        "in all": (state + beside + kept + memory.buffers) / _GIB,
    }


def apart(function: Callable[[dict[str, Any]], _Told], values: dict[str, Any]) -> _Told:
    """Call a function in a process of its own: DeepSpeed keeps groups for all engines of one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, values).result()


def count(values: dict[str, Any]) -> int:
    """Build the engine of a job as rank 0 of its ranks; return the bytes of its tensors."""
    job = from_dict(JobConfig, values)
    context = join_alone(job)
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "to", stay):
        engine = build_run_engine(
            job, world_size=context.world_size, device=torch.device(context.device)
        )
        # Moments are made when they are first asked for.
        engine.fragments()
        return live_bytes()


def count_kept(values: dict[str, Any]) -> int:
    """Run a forward pass of a job's model as rank 0 holds it; return the bytes that it keeps."""
    job = from_dict(JobConfig, values)
    join_alone(job)
    shape, images = model_shape(job), micro_batch(job)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(job.engine.dtype)
        shards = ExpertShards.of(resolve_placement(job), regather=job.engine.regathers)
        model = initial_model(job, shards.partition)
        model.checkpoint_activations(job.engine.recomputed)
        shards.join(model)
        states = tuple(
            torch.randn(
                images * (k + 1) // shape.scales, shape.channels, *[shape.image_size >> k] * 2
            )
            for k in reversed(range(shape.scales))
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(states, torch.rand(images), torch.zeros(images, dtype=torch.long))
        assert len(outputs) == shape.scales
    for held in (*model.parameters(), *model.buffers(), *states):
        kept.pop(held.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


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


def stay(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """Stand in for moving a module: fake tensors are where they should be and cannot be moved."""
    return module
