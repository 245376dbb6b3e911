"""What a worker, its launcher and their caller agree on, whichever backend runs the workers.

A worker is a plain function `worker(context, payload)`. When it is called, the process group of
`torch.distributed` spans all workers (nccl on GPUs, gloo otherwise) and the usual variables
(`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`) are set. When it returns on every rank the
run is finished. The callable must be importable by name, and the payload is plain data.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

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
        workers: Number of worker processes, one device each.
        cpus_per_worker: Cores reserved for a worker; also its number of compute threads.
        gpus_per_worker: 0 or 1; `auto` is 1 where the cluster (or this machine) has any GPU.
        address: Ray only. `auto` joins the cluster of `RAY_ADDRESS` (set inside a Ray job) or the
            one that `ray start` left running on this machine, and starts a private one otherwise;
            `local` always starts a private one; `host:port` joins that cluster.
        max_failures: Ray only. How many times the workers are started again after one of them died
            or raised anything but a ValueError.
        start_timeout_s: How long to wait for free resources, and for all workers to meet.
        scratch_dir: Parent of the run's temporary directory (Ray's sessions and logs); None is the
            system's. Keep it short: Ray puts sockets there, whose paths may have 107 characters.
        hardware: What the nodes are made of, to plan with.
    """

    backend: Literal["ray", "local"] = "ray"
    workers: int = 2
    cpus_per_worker: int = 1
    gpus_per_worker: int | Literal["auto"] = "auto"
    address: str = "auto"
    max_failures: int = 3
    start_timeout_s: float = 120.0
    scratch_dir: str | None = field(default=None, metadata={"place": "path"})
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.backend not in ("ray", "local"):
            raise ClusterConfigError(
                f"cluster.backend is {self.backend!r}; it must be 'ray' or 'local'."
            )
        for name, least in (("workers", 1), ("cpus_per_worker", 1), ("max_failures", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ClusterConfigError(
                    f"cluster.{name} is {value!r}; it must be a whole number of at least {least}."
                )
        if self.gpus_per_worker not in (0, 1, "auto"):
            raise ClusterConfigError(
                f"cluster.gpus_per_worker is {self.gpus_per_worker!r}; a worker drives one device, "
                "so it must be 0, 1 or 'auto'. Use more workers for more GPUs."
            )
        if not self.start_timeout_s > 0:
            raise ClusterConfigError(
                f"cluster.start_timeout_s is {self.start_timeout_s!r}; it must be positive."
            )
        if not _NO_ADDRESS.isdisjoint(self.address):
            is_plain = {"@", "?", "#"}.isdisjoint(self.address)  # what passwords come with
            raise ClusterConfigError(
                f"cluster.address is {repr(self.address) if is_plain else 'not quoted here'}; Ray "
                "is joined by 'host:port', without a scheme or a user. An http:// address is that "
                "of the job server: use it with `ray job submit`."
            )


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
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    attempt: int
    device: str
    stop_requested: Callable[[], bool]
    report: Callable[[Message], None]


Worker: TypeAlias = Callable[[WorkerContext, Payload], None]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """How a run and who started it reach each other; all of it in the caller's thread.

    Attributes:
        on_message: Takes each message that a worker tells. What it raises ends the run.
        stop: Asks the workers to stop once it is set.
        report: Takes lines for a person.
    """

    on_message: Callable[[Message], None]
    stop: threading.Event
    report: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: `stopped` if the workers returned after a stop request, else `finished`.
        restarts: How many times the workers had to be started again.
    """

    status: Literal["finished", "stopped"]
    restarts: int = 0
