"""Time of an update by placement and ZeRO stage, against replicated experts with the same stage.

All engines live in the same ranks and take turns, so they meet the same machine. On a processor the
ranks share cores and memory and talk through the loopback interface: what a placement costs there
says little about GPUs with links of their own, for which `python -m trainer.plan` predicts it.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import command
from benchmarks.experts.memory import stages
from benchmarks.experts.training import Training, add_ranks, run_on_ranks
from benchmarks.experts.variant import variants
from benchmarks.interleaved import interleave
from cluster.contract import WorkerContext
from trainer.config.reading import to_dict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts step", description=__doc__ or "", rounds=5)
    add_ranks(parser, model="s_2", ranks=2)
    parser.add_argument("--scales", type=command.positive, default=3, help="default 3")
    parser.add_argument("--images", type=command.positive, default=6, help="of a rank; default 6")
    parser.add_argument(
        "--stages", type=stages, default=(1, 2), help="ZeRO stages, 0 for none; default 1,2"
    )
    options = parser.parse_args(arguments)
    setting = command.setting("experts step", options)
    for stage in options.stages:
        found = variants(options.scales, ranks=options.ranks, stages=(stage,))
        jobs = {
            each.name: to_dict(
                each.job(
                    model=options.model,
                    ranks=options.ranks,
                    images=options.images,
                    precision="bf16" if setting.device.type == "cuda" else "fp32",
                )
            )
            for each in found
        }
        payload = {"jobs": jobs, "rounds": options.rounds}
        gpus = int(setting.device.type == "cuda")
        for row in run_on_ranks(take_turns, payload, ranks=options.ranks, gpus=gpus):
            setting.report.add(**row)
    setting.deliver()
    return 0


def take_turns(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Time the updates of several engines in turn; the first rank tells its times."""

    def together(work: Any) -> float:
        dist.barrier()
        began = time.perf_counter()
        work()
        if context.device != "cpu":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - began

    trainings = {name: Training(job, context) for name, job in payload["jobs"].items()}
    timings = interleave(
        {name: training.update for name, training in trainings.items()},
        rounds=payload["rounds"],
        stopwatch=together,
    )
    if context.rank == 0:
        for timing in timings:
            context.report(
                {
                    "held as": timing.name,
                    "ms": 1000 * timing.minimum,
                    "ratio": timing.ratio,
                    "spread": timing.spread,
                }
            )
