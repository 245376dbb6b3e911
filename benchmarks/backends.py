"""What Ray costs a job: in steady state, and at its start on a cluster that runs."""

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import command

if TYPE_CHECKING:
    from tests.support.job import Job

_DESCRIPTION = """\
Digits on two workers of this machine; the ways to start them take turns.

  steady   seconds for 1,000 images in the fastest interval, of `cluster.backend=ray` on a running
           cluster and of `local`. Target: Ray takes at most 1 % more.
  start    seconds from the command to the first update: on a running cluster, by torchrun (the same
           worker, the same checks before it, no driver), and `local`. Target: at most 15 s over
           torchrun.

  python -m benchmarks.backends start
  python -m benchmarks.backends steady --rounds 3 --intervals 8"""

_SETTINGS = (
    "+exp=digits",
    "train.total_images=100000000",
    "eval.grid_interval_images=0",
    "cluster.gpus_per_worker=0",
)
_UPDATE = r"the first update is done"
_RATE = r"images \(\d+%\)\s+([\d,]+) images/s"
_LIMIT_S = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("backends", description=_DESCRIPTION, rounds=3)
    parser.add_argument("what", choices=["steady", "start"])
    parser.add_argument(
        "--intervals", type=command.positive, default=6, help="of 6,400 images each; default 6"
    )
    parser.add_argument("settings", nargs="*", help="more settings of the job, as key=value")
    options = parser.parse_args(arguments)
    # So that the jobs and clusters end with this command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    setting = command.setting(f"backends {options.what}", options)
    found = _take_turns(options)
    baseline = min(found["torchrun" if options.what == "start" else "local"])
    for name, taken in found.items():
        row = {"shortest_s": min(taken), "longest_s": max(taken)}
        if options.what == "start":
            row["over_s"] = min(taken) - baseline
        else:
            row["over_share"] = min(taken) / baseline - 1
        setting.report.add(way=name, rounds=len(taken), **row)
    setting.deliver()
    return 0


def _take_turns(options: argparse.Namespace) -> dict[str, list[float]]:
    """Measure each way once a round: a start, or the time of 1,000 images."""
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster(cpus=2, dashboard=False) as cluster:
        ways = {
            "ray": ("trainer.launch", f"cluster.address={cluster.address}"),
            "local": ("trainer.launch", "cluster.backend=local"),
        }
        if options.what == "start":
            ways["torchrun"] = ("torch.distributed.run", "cluster.backend=local")
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds):
            for name in ways if turn % 2 == 0 else reversed(ways):
                module, place = ways[name]
                with _job(options, module, place, cluster.environment) as launched:
                    found[name].append(_MEASURES[options.what](launched, options))
    return found


@contextmanager
def _job(
    options: argparse.Namespace, module: str, place: str, environment: dict[str, str]
) -> Iterator["Job"]:
    from tests.support.job import job

    words = (*_SETTINGS, place, *options.settings)
    if module != "trainer.launch":
        ranks = ("--standalone", "--nproc-per-node", "2", "-m", "benchmarks.torchrun_rank")
        words = (*ranks, *words)
    with (
        tempfile.TemporaryDirectory(prefix="backends-") as home,
        job(*words, home=Path(home), environment=environment, module=module) as launched,
    ):
        yield launched


def _measure_start(launched: "Job", _options: argparse.Namespace) -> float:
    began_s = time.monotonic()  # the process was forked milliseconds ago
    launched.wait_for(_UPDATE, _LIMIT_S)
    return time.monotonic() - began_s


def _measure_steady(launched: "Job", options: argparse.Namespace) -> float:
    """Seconds for 1,000 images in the fastest interval but the first, which has the start in it."""
    launched.wait_for(rf"(?s)(?:{_RATE}.*?){{{options.intervals + 1}}}", _LIMIT_S)
    rates = [float(rate.replace(",", "")) for rate in re.findall(_RATE, launched.output)]
    return 1000 / max(rates[1:])


_MEASURES: dict[str, Callable[["Job", argparse.Namespace], float]] = {
    "start": _measure_start,
    "steady": _measure_steady,
}


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
