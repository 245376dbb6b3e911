"""Bytes of live tensors on a rank, against the prediction, by placement and ZeRO stage.

The engines are the real ones, on gloo ranks, after a backward pass and before its update: when
weights, gradients, optimizer state and EMA all exist. DeepSpeed's buffers for collectives are kept
small, so that they do not hide what is measured. Activations are not in it.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks import command
from benchmarks.experts.training import Training, add_ranks, live_bytes, run_on_ranks
from benchmarks.experts.variant import Variant, variants
from cluster.contract import WorkerContext
from trainer.config.job import JobConfig
from trainer.config.reading import to_dict
from trainer.planning.memory import rank_memory
from trainer.planning.placing import is_zero, resolve_placement, workload, zero_stage

_MIB = 2**20
_BUCKET = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts memory", description=__doc__ or "", rounds=1)
    add_ranks(parser, model="s_2", ranks=2)
    parser.add_argument("--scales", type=command.whole_numbers, default=(2, 3), help="default 2,3")
    parser.add_argument(
        "--stages", type=stages, default=(0, 1, 2, 3), help="ZeRO stages; default 0,1,2,3"
    )
    parser.add_argument(
        "--passes", type=command.whole_numbers, default=(1, 2), help="of an update; default 1,2"
    )
    options = parser.parse_args(arguments)
    setting = command.setting("experts memory", options)
    for scales, passes in product(options.scales, options.passes):
        # Sums of several passes are in fp32, with ZeRO-1 whole; the plain engine always has those.
        possible = tuple(stage for stage in options.stages if stage or passes == 1)
        for variant in variants(
            scales, ranks=options.ranks, stages=possible, grad_accum_steps=passes
        ):
            job = variant.job(model=options.model, ranks=options.ranks, images=scales)
            setting.report.add(**measure(variant, shrink_buckets(job)))
    setting.deliver()
    return 0


def stages(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of ZeRO stages, for argparse."""
    found = tuple(int(part) for part in text.split(","))
    if not set(found) <= {0, 1, 2, 3}:
        raise argparse.ArgumentTypeError(f"{text} must be some of 0,1,2,3")
    return found


def measure(variant: Variant, job: JobConfig) -> dict[str, Any]:
    """Measure one variant; the row of the table."""
    told = run_on_ranks(hold, {"job": to_dict(job)}, ranks=job.cluster.workers)
    most = max(each["bytes"] for each in told)
    memory = rank_memory(workload(job), resolve_placement(job), zero_stage=zero_stage(job))
    predicted = memory.weights + memory.gradients + memory.optimizer + memory.ema
    return {
        "held as": variant.name,
        "MiB": most / _MIB,
        "predicted": predicted / _MIB,
        "ratio": most / predicted,
        "weights": memory.weights / _MIB,
        "gradients": memory.gradients / _MIB,
        "optimizer": memory.optimizer / _MIB,
        "EMA": memory.ema / _MIB,
    }


def hold(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Train one update and the first pass of another, and tell what is alive."""
    before = live_bytes()
    training = Training(payload["job"], context)
    training.update()
    training.backward(last=training.grad_accum_steps == 1)
    context.report({"bytes": live_bytes() - before})


def shrink_buckets(job: JobConfig) -> JobConfig:
    """Keep what DeepSpeed holds besides small beside the state of even a small model.

    Its buffers for collectives, and small weights, which ZeRO-3 otherwise leaves whole.
    """
    if is_zero(job):
        job.engine.deepspeed["zero_optimization"] = {
            "reduce_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 1000,
        }
    return job
