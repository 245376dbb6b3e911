"""What a worker, its launcher and their caller agree on, whichever backend runs the workers.

A worker is a plain function `worker(context, payload)`. When it is called, the process group of
`torch.distributed` spans all workers (nccl on GPUs, gloo otherwise) and the usual variables
(`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`) are set. When it returns on every rank the
run is finished. The callable must be importable by name, and the payload is plain data.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from cluster.hardware import HardwareConfig

_NO_ADDRESS = frozenset("@?#/")

Message: TypeAlias = dict[str, Any]
Payload: TypeAlias = dict[str, Any]


class ClusterConfigError(ValueError):
    """A cluster setting that cannot work, with the value and the fix."""


class ClusterTooSmall(ValueError):
    """The cluster does not have, or does not have free, what the workers ask for."""


class ClusterUnavailable(RuntimeError):
    """No cluster could be started or reached, or the connection to it was lost."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the workers run and what each of them gets.

    Attributes:
        backend: `ray`, or `local` for plain processes of this machine (no restarts, no Ray).
        workers: Number of worker processes, one device each. `cluster.workers=4..16` on a command
            line sets `min_workers` too.
        min_workers: Ray only. With how many workers at least the run goes on where nodes are lost,
            by counts that the batch, its stages and groups of expert shards can be dealt to; None
            insists on `workers`.
        cpus_per_worker: Cores reserved for a worker; also its number of compute threads.
        gpus_per_worker: 0 or 1; `auto` is 1 where the cluster (or this machine) has any GPU.
        address: Ray only. `auto` joins the cluster of `RAY_ADDRESS` (set inside a Ray job) or the
            one that `ray start` left running on this machine, and starts a private one otherwise;
            `local` always starts a private one; `host:port` joins that cluster.
        max_failures: Ray only. After how many failures the workers are started again: one of them
            died, was lost with its node, or raised anything but a ValueError. Each new checkpoint
            of the run gives one back.
        max_failures_in_place: Ray only. So many failures in a row at the same update, without a new
            checkpoint in between, end the run; 0 does not look.
        max_failures_of_node: Ray only. So many failures in a row that began on one node have it
            avoided while other nodes suffice; 0 does not look.
        max_preemptions: Ray only. After how many announced losses of nodes, likewise given back.
        start_timeout_s: How long to wait for free resources, for the workers' processes, for all
            workers to meet, and for them to connect.
        preflight_s: How long a node gets to look at itself before workers may be placed on it; 0
            looks at none.
        room_timeout_s: Ray only. How long a run that has begun waits for nodes to come back, and
            tries to start its workers.
        shrink_after_s: Ray only. How long a start waits for all of its workers, if fewer will do.
        grow: Ray only. When a run on fewer workers takes more again: `checkpoint`, after the next
            one; `now`, as soon as there is room; or `never`. All of them save before.
        spares: Ray only. Whether each node keeps as many processes as it may have to run workers,
            with everything imported, for a faster restart: some 400 MiB of memory for each. `auto`
            does on a cluster that is joined, and not on a private one.
        beside_cpus: Ray only. Cores of what runs beside the workers, such as an evaluation with
            `eval.during.where=beside`.
        beside_gpus: Ray only. Its GPUs; `auto` is one where workers have one.
        scratch_dir: Parent of the run's temporary directory (Ray's sessions and logs); None is the
            system's. Keep it short: Ray puts sockets there, whose paths may have 107 characters.
        hardware: What the nodes are made of, to plan with.
    """

    backend: Literal["ray", "local"] = "ray"
    workers: int = 2
    min_workers: int | None = None
    cpus_per_worker: int = 1
    gpus_per_worker: int | Literal["auto"] = "auto"
    address: str = "auto"
    max_failures: int = 3
    max_failures_in_place: int = 3
    max_failures_of_node: int = 2
    max_preemptions: int = 20
    start_timeout_s: float = 120.0
    preflight_s: float = 60.0
    room_timeout_s: float = 3600.0
    shrink_after_s: float = 30.0
    grow: Literal["checkpoint", "now", "never"] = "checkpoint"
    spares: bool | Literal["auto"] = "auto"
    beside_cpus: int = 1
    beside_gpus: int | Literal["auto"] = "auto"
    scratch_dir: str | None = field(default=None, metadata={"place": "path"})
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.backend not in ("ray", "local"):
            raise ClusterConfigError(
                f"cluster.backend is {self.backend!r}; it must be 'ray' or 'local'."
            )
        for name, lowest in (
            ("workers", 1),
            ("cpus_per_worker", 1),
            ("beside_cpus", 1),
            ("max_failures", 0),
            ("max_failures_in_place", 0),
            ("max_failures_of_node", 0),
            ("max_preemptions", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ClusterConfigError(
                    f"cluster.{name} is {value!r}; it must be a whole number of at least {lowest}."
                )
        least = self.min_workers
        if least is not None and not (isinstance(least, int) and 1 <= least <= self.workers):
            raise ClusterConfigError(
                f"cluster.min_workers is {least!r}; it must be null or a whole number from 1 to "
                f"cluster.workers={self.workers}."
            )
        if self.grow not in ("checkpoint", "now", "never"):
            raise ClusterConfigError(
                f"cluster.grow is {self.grow!r}; it must be 'checkpoint', 'now' or 'never'."
            )
        if self.spares not in (True, False, "auto"):
            raise ClusterConfigError(
                f"cluster.spares is {self.spares!r}; it must be true, false or 'auto'."
            )
        for name, advice in (
            ("gpus_per_worker", "use more workers for more GPUs"),
            ("beside_gpus", "what runs beside them uses no more"),
        ):
            if getattr(self, name) not in (0, 1, "auto"):
                raise ClusterConfigError(
                    f"cluster.{name} is {getattr(self, name)!r}; a process drives one device, so "
                    f"it must be 0, 1 or 'auto': {advice}."
                )
        for name, may_be_zero in (
            ("shrink_after_s", True),
            ("preflight_s", True),
            ("start_timeout_s", False),
            ("room_timeout_s", False),
        ):
            value = getattr(self, name)
            if not (value >= 0 if may_be_zero else value > 0):
                must = "not be negative" if may_be_zero else "be positive"
                raise ClusterConfigError(f"cluster.{name} is {value!r}; it must {must}.")
        if not _NO_ADDRESS.isdisjoint(self.address):
            is_plain = {"@", "?", "#"}.isdisjoint(self.address)  # what passwords come with
            raise ClusterConfigError(
                f"cluster.address is {repr(self.address) if is_plain else 'not quoted here'}; Ray "
                "is joined by 'host:port', without a scheme or a user. An http:// address is that "
                "of the job server: use it with `ray job submit`."
            )


def has_spares(config: ClusterConfig, *, private: bool) -> bool:
    """Whether processes are to be kept for the next start of the workers.

    Args:
        config: The run's.
        private: Whether the cluster is the run's own.
    """
    return not private if config.spares == "auto" else config.spares


Level: TypeAlias = Literal["INFO", "WARNING", "ERROR"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a worker.

    Attributes:
        rank: The worker.
        node: The address of its node; "" where all of them are on the caller's.
        attempt: Which start of the workers it belongs to.
        level: What `WorkerContext.log` was given; None of what else the process has written.
        text: The line.
    """

    rank: int
    node: str
    attempt: int
    level: Level | None
    text: str

    @property
    def place(self) -> str:
        """The worker and its node, in words."""
        return f"worker {self.rank} on {self.node}" if self.node else f"worker {self.rank}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class LostWorkers:
    """Workers that ended without a word of their own.

    Attributes:
        attempt: Which start of the workers they belonged to.
        ranks: Those that ended so.
        cause: Why the attempt failed, in words.
    """

    attempt: int
    ranks: tuple[int, ...]
    cause: str


class Listener(Protocol):
    """Takes what workers write, in the caller's thread."""

    def take(self, line: Line) -> None:
        """Takes each line of each worker, once."""
        ...

    def lose(self, lost: LostWorkers) -> None:
        """Takes which workers were lost, after their last lines."""
        ...


def _ignore(_images: int) -> None:
    """Stand in where nobody asks how far a run is."""


def _do_nothing() -> None:
    """Stand in where nobody asks whether the work is at its end."""


def _lose(_level: Level, _text: str) -> None:
    """Stand in where nobody reads a worker's log."""


def _no_limit() -> float | None:
    """Stand in where no node is taken away."""
    return None


class BesideFailed(RuntimeError):
    """What was run beside the workers raised, or its process was lost; the message says which."""


class BesideTask(Protocol):
    """A function that runs, or waits for room to run, beside the workers."""

    def has_begun(self) -> bool:
        """Whether it had room to begin."""
        ...

    def join(self, timeout_s: float) -> bool:
        """Waits for its end, but no longer than so; whether it has ended."""
        ...

    def result(self) -> Payload:
        """What it returned, once it has ended.

        Raises:
            BesideFailed: It raised, or was lost.
        """
        ...

    def cancel(self) -> None:
        """Ends it, wherever it is."""
        ...


Beside: TypeAlias = Callable[[Callable[[Payload], Payload], Payload], BesideTask]
"""Has an importable function run beside the workers, with plain data, on resources of its own; it
raises `BesideFailed` where the cluster takes nothing."""


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker knows about its place in the run.

    Attributes:
        rank: This worker among all, from 0.
        world_size: Number of workers.
        local_rank: This worker among those of its node, from 0.
        local_world_size: Number of workers on its node.
        attempt: How many times the workers were started before: 0, and one more after each failure.
        device: `cpu` or `cuda:N`.
        stop_requested: True once the caller asked for a stop. A local flag, free to read at every
            step; ranks may see it at different steps, so they must agree before they act on it.
        report: Sends a small dict to the caller's `on_message`. Does not wait; the messages of one
            rank arrive in order.
        advance: Tells how many images of the run are trained. Cheap enough for every update.
        keep: Tells that a checkpoint of so many images is there, to go on from.
        grace_s: How many seconds are left once a stop was asked, before the worker's node goes;
            None if none is known to go.
        complete: Tells that the work is at its end, and not only interrupted as was asked for.
        log: Takes a line for the caller's log, in which it arrives even if this process dies next.
        end: Ends this process at once, with an exit code that the caller is told.
        beside: Has something run on `cluster.beside_cpus` and `cluster.beside_gpus`, until this
            process ends at the latest; None where the workers have no cluster but a machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    attempt: int
    device: str
    stop_requested: Callable[[], bool]
    report: Callable[[Message], None]
    advance: Callable[[int], None] = _ignore
    keep: Callable[[int], None] = _ignore
    grace_s: Callable[[], float | None] = _no_limit
    complete: Callable[[], None] = _do_nothing
    log: Callable[[Level, str], None] = _lose
    end: Callable[[int], None] = os._exit
    beside: Beside | None = None


Worker: TypeAlias = Callable[[WorkerContext, Payload], None]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """How a run and who started it reach each other; all of it in the caller's thread.

    Attributes:
        on_message: Takes each message that a worker tells. What it raises ends the run.
        stop: Asks the workers to stop once it is set.
        report: Takes lines for a person.
        listener: Takes what workers write.
    """

    on_message: Callable[[Message], None]
    stop: threading.Event
    report: Callable[[str], None]
    listener: Listener


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `stopped` if the workers returned after a stop request, else `finished`.
        restarts: How many times the workers had to be started again.
    """

    status: Literal["finished", "stopped"]
    restarts: int = 0
