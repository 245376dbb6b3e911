"""From a fault to the next update of a real job, and what the time goes into."""

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks import command

if TYPE_CHECKING:
    from tests.support.job import Job
    from tests.support.ray_cluster import RayCluster

_DESCRIPTION = """\
Digits on two workers. In each round every place has its turn: its job trains, and is hurt so many
times, each time after it has trained for a while, so that spares are there. The clock runs from the
blow to the next update; a row's parts are those of the blow that took the middle time.

  private      kill -9 of a worker; Ray was started by the job
  joined       the same on a cluster of three nodes and a head, all at loopback addresses
  node         kill -9 of all processes of a node with a worker, there: the third node takes over
  local        kill -9 of a worker without Ray: the launch ends, and the same command is given again

  python -m benchmarks.restart
  python -m benchmarks.restart --places joined,node cluster.spares=false"""

_PARTS = {
    "noticed_s": r"the workers start again",
    "processes_s": r"attempt \d+: \d+ workers? on",
    "met_s": r"workers have met",
    "model_s": r"the model is there",
    "restored_s": r"resumed after",
    "batch_s": r"the first batch is there",
    "update_s": r"the first update is done",
}
"""What the launch says at the end of each part, in order."""
_UPDATE = _PARTS["update_s"]
_SETTINGS = (
    "+exp=digits",
    "run=restart",
    "train.total_images=100000000",
    "checkpoint.interval_images=3200",
    "runtime.log_interval_images=3200",
    "eval.grid_interval_images=0",
    "cluster.max_failures=1000",
)
_PLACES = ("private", "joined", "node", "local")
_LIMIT_S = 300.0
_LOOPBACK = "127.0.0."


@dataclass
class Blows:
    """What the blows of one kind took.

    Attributes:
        parts: For each blow, seconds of each part that the launch told of.
        totals: For each blow, seconds to the next update.
    """

    parts: list[dict[str, float]] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def add(self, began_s: float, lines: Sequence[tuple[float, str]]) -> None:
        """Adds a blow.

        Args:
            began_s: When it fell.
            lines: What the launch said after it, with times of the same clock.
        """
        parts = split(began_s, lines)
        self.parts.append(parts)
        self.totals.append(sum(parts.values()))

    def row(self) -> dict[str, float]:
        """The middle blow's parts, and the totals."""
        order = sorted(range(len(self.totals)), key=self.totals.__getitem__)
        middle = order[len(order) // 2]
        return {
            **{name: self.parts[middle].get(name, 0.0) for name in _PARTS},
            "middle_s": self.totals[middle],
            "shortest_s": min(self.totals),
            "longest_s": max(self.totals),
        }


def split(began_s: float, lines: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Divide the time from a blow to the next update by what the launch said meanwhile.

    Args:
        began_s: When the blow fell.
        lines: What was said after it, with times of the same clock.

    Returns:
        Seconds of each part whose end was told; they add up to the whole.
    """
    parts: dict[str, float] = {}
    last = began_s
    left = list(lines)
    for name, pattern in _PARTS.items():
        at = next((at for at, line in left if re.search(pattern, line)), None)
        if at is None or at < last:
            continue
        parts[name], last = at - last, at
        left = [(when, line) for when, line in left if when >= at]
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("restart", description=_DESCRIPTION, rounds=1)
    parser.add_argument("--blows", type=command.positive, default=3, help="a round; default 3")
    parser.add_argument(
        "--wait", type=command.positive, default=45, help="seconds of training before each"
    )
    parser.add_argument("--places", default=",".join(_PLACES), help=f"of {', '.join(_PLACES)}")
    parser.add_argument("settings", nargs="*", help="more settings of the job, as key=value")
    options = parser.parse_args(arguments)
    # So that the jobs and clusters end with this command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    places = options.places.split(",")
    if unknown := set(places).difference(_PLACES):
        parser.error(f"--places {','.join(sorted(unknown))} must be of {', '.join(_PLACES)}")
    setting = command.setting("restart", options)
    found = {place: Blows() for place in places}
    for turn in range(options.rounds):
        for place in places if turn % 2 == 0 else reversed(places):
            with tempfile.TemporaryDirectory(prefix="restart-") as home:
                visit = Visit(Path(home), options, found[place])
                _VISITS[place](visit)
    for place, blows in found.items():
        setting.report.add(place=place, blows=len(blows.totals), **blows.row())
    setting.deliver()
    return 0


@dataclass(frozen=True)
class Visit:
    """One place's turn.

    Attributes:
        home: An empty folder.
        options: The command line.
        found: Takes what the blows took.
    """

    home: Path
    options: argparse.Namespace
    found: Blows

    def words(self, *place: str) -> tuple[str, ...]:
        """The settings of the job there."""
        return (*_SETTINGS, *place, *self.options.settings)

    def strike(self, launched: "Job", blow: Callable[[], None]) -> None:
        """Hurt a job that has trained for a while, and note what follows."""
        self.train(launched)
        said = len(launched.lines)
        began_s = time.monotonic()
        blow()
        _wait_for(launched, _UPDATE, said)
        self.found.add(began_s, launched.lines[said:])

    def train(self, launched: "Job") -> None:
        """Wait until it has trained for a while, and has saved since."""
        launched.wait_for(_UPDATE, _LIMIT_S)
        time.sleep(self.options.wait)
        _wait_for(launched, r"checkpoint: \S+", len(launched.lines))


def _visit_private(visit: Visit) -> None:
    from tests.support.job import job

    with job(*visit.words("cluster.address=local"), home=visit.home) as launched:
        for _ in range(visit.options.blows):
            visit.strike(launched, partial(_kill_worker, [launched.pid]))


def _visit_local(visit: Visit) -> None:
    from tests.support.job import job

    words = visit.words("cluster.backend=local")
    for _ in range(visit.options.blows):
        with job(*words, home=visit.home) as launched:
            visit.train(launched)
            began_s = time.monotonic()
            next(
                child
                for child in psutil.Process(launched.pid).children()
                if "spawn_main" in _command(child)
            ).kill()
            launched.wait(_LIMIT_S)
            ended_s = time.monotonic()
        with job(*words, home=visit.home) as launched:
            launched.wait_for(_UPDATE, _LIMIT_S)
            noticed = (ended_s, "the launch has ended, and the workers start again by hand")
            visit.found.add(began_s, [noticed, *launched.lines])


def _visit_joined(visit: Visit) -> None:
    with _cluster_job(visit) as (launched, cluster):
        nodes = [process.pid for process in cluster.nodes.values()]
        for _ in range(visit.options.blows):
            visit.strike(launched, partial(_kill_worker, nodes))


def _visit_node(visit: Visit) -> None:
    with _cluster_job(visit) as (launched, cluster):
        for _ in range(visit.options.blows):
            visit.strike(launched, partial(_lose_node, cluster))
            # One that is gone keeps its name in Ray: the next has another.
            cluster.add(f"{_LOOPBACK}{len(cluster.nodes) + 2}", 1)


def _lose_node(cluster: "RayCluster") -> None:
    head = next(iter(cluster.nodes))
    host = next(
        host
        for host, process in cluster.nodes.items()
        if host != head and process.poll() is None and _workers([process.pid])
    )
    cluster.lose(host)


@contextmanager
def _cluster_job(visit: Visit) -> Iterator[tuple["Job", "RayCluster"]]:
    from tests.support.job import job
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster(cpus=0, more_cpus=[1, 1, 1], dashboard=False) as cluster:
        words = visit.words(f"cluster.address={cluster.address}")
        with job(*words, home=visit.home, environment=cluster.environment) as launched:
            yield launched, cluster


def _wait_for(launched: "Job", pattern: str, since: int) -> None:
    """Wait for a line among those from the number `since` on."""
    deadline = time.monotonic() + _LIMIT_S
    while not any(re.search(pattern, line) for _, line in launched.lines[since:]):
        if time.monotonic() > deadline:
            sys.exit(f"error: {pattern!r} did not come in {_LIMIT_S:g} s:\n{launched.output}")
        time.sleep(0.02)


def _kill_worker(parents: Sequence[int]) -> None:
    _workers(parents)[-1].kill()


def _workers(parents: Sequence[int]) -> list[psutil.Process]:
    """Ray's training workers among the descendants of processes."""
    return [
        child
        for parent in parents
        for child in psutil.Process(parent).children(recursive=True)
        if "RayTrainWorker" in _command(child)
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


_VISITS = {
    "private": _visit_private,
    "joined": _visit_joined,
    "node": _visit_node,
    "local": _visit_local,
}


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
