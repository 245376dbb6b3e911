"""Most memory that building XL takes on one of eight ranks, against what the rank keeps of it.

The weights are real, and the process stands for rank 0 of eight. Each part of the model is divided
as soon as it is drawn, so at no time more than the rank's own and one whole block should exist.
"""

import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from benchmarks import command
from benchmarks.experts.full_size import join_alone
from benchmarks.experts.training import add_ranks
from benchmarks.experts.variant import Variant
from models.transformer.cost import parameters
from trainer.config.job import JobConfig
from trainer.config.reading import from_dict, to_dict
from trainer.data.loading import return_large_blocks
from trainer.engine.expert_shards import ExpertShards
from trainer.planning.placing import model_shape, resolve_placement
from trainer.training.assembly import initial_model

_MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts building", description=__doc__ or "", rounds=1)
    add_ranks(parser, model="xl_2", ranks=8)
    options = parser.parse_args(arguments)
    setting = command.setting("experts building", options)
    ranks = options.ranks
    for placement in (
        "replicated",
        f"{{2:{ranks},1:{ranks}}}",
        f"{{2:{ranks},1:{ranks},0:{ranks}}}",
    ):
        variant = Variant(scales=3, zero_stage=0, placement=placement)
        job = variant.job(model=options.model, ranks=ranks, images=6)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(build, to_dict(job)).result()
        setting.report.add(**{"held as": variant.name}, **found)
    setting.deliver()
    return 0


def build(values: dict[str, Any]) -> dict[str, float]:
    """Build the model of a job as rank 0 holds it; return the memory it took, in MiB."""
    job = from_dict(JobConfig, values)
    # As a worker does.
    return_large_blocks()
    join_alone(job)
    shards = ExpertShards.of(resolve_placement(job))
    # What torch needs for itself, so that it does not count.
    nn.Linear(1000, 1000)(torch.randn(10, 1000)).sum().backward()
    before = _peak_resident_mib()
    model = initial_model(job, shards.partition)
    most = _peak_resident_mib() - before
    kept = sum(each.numel() * each.element_size() for each in model.parameters()) / _MIB
    shape = model_shape(job)
    block = 4 * sum(parameters(shape).per_scale) / shape.depth / _MIB
    return {
        "MiB at most": most,
        "kept": kept,
        "a whole block": block,
        "ratio": most / (kept + block),
        "all weights": 4 * parameters(shape).total / _MIB,
    }


def _peak_resident_mib() -> float:
    """The most memory this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
