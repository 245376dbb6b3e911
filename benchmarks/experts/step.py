"""Time of an update by placement and ZeRO stage, against replicated experts with the same stage.

All engines live in the same ranks and take turns, so they meet the same machine. On a processor the
ranks share cores and memory and talk through the loopback interface: what a placement costs there
says little about GPUs with links of their own, for which `python -m trainer.plan` predicts it.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import command
from benchmarks.experts.memory import stages
from benchmarks.experts.training import Training
from benchmarks.experts.variant import variants
from benchmarks.interleaved import interleave
from cluster.contract import ClusterConfig, WorkerContext
from cluster.launcher import run
from trainer.config.reading import to_dict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: Command line without the program's name; None takes the process's own.
    """
    parser = command.parser("experts step", description=__doc__ or "", rounds=5)
    parser.add_argument("--model", default="s_2", help="of configs/model; default s_2")
    parser.add_argument("--scales", type=command.positive, default=3, help="default 3")
    parser.add_argument("--ranks", type=command.positive, default=2, help="default 2")
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
        gpu = int(setting.device.type == "cuda")
        told: list[dict[str, Any]] = []
        run(
            ClusterConfig(backend="local", workers=options.ranks, gpus_per_worker=gpu),
            take_turns,
            {"jobs": jobs, "rounds": options.rounds},
            on_message=told.append,
            stop=threading.Event(),
        )
        for row in told:
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
