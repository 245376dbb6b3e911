"""A Ray Train worker's side of a run: its process group, and what surrounds its function.

Ray's own torch backend would import torch in the driver and in the controller, neither of which
uses it (seconds of each start), listen on every interface, and let gloo follow the host's name.
"""

import contextlib
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.train.backend import Backend, BackendConfig

from cluster.contract import Payload, Worker, WorkerContext
from cluster.failure import run_worker
from cluster.process_group import RankInfo, Rendezvous, join, listen, new_secret
from cluster.ray_mailbox import Finished, Mailbox
from cluster.scratch import make_scratch

_listeners: list[socket.socket] = []
"""Of rank 0's process: the socket between being opened and being joined."""
_folders: list[Path] = []
"""Of rank 0's process: the folder in which workers of one node meet."""


@dataclass(frozen=True, kw_only=True)
class RendezvousConfig(BackendConfig):  # type: ignore[misc]
    """What the workers need to enter the group.

    Attributes:
        gpu: Whether each worker has a GPU.
        threads: Compute threads of a worker.
        timeout_s: How long the workers wait for one another.
        scratch: Parent of the folder in which workers of one node meet; None is the system's.
    """

    gpu: bool
    threads: int
    timeout_s: float
    scratch: str | None

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that Ray Train's controller calls."""
        return _Rendezvous


class _Rendezvous(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        together = len(set(worker_group.execute(_node))) == 1
        place = (
            worker_group.execute_single(0, _make_file, backend_config.scratch)
            if together
            else worker_group.execute_single(0, _open)
        )
        rendezvous = Rendezvous(
            place=place, timeout_s=backend_config.timeout_s, secret=new_secret()
        )
        worker_group.execute(_enter, rendezvous, backend_config)


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _make_file(scratch: str | None) -> str:
    _folders.append(make_scratch(scratch))
    return str(_folders[-1] / "rendezvous")


def _open() -> tuple[str, int]:
    host = ray.util.get_node_ip_address()
    _listeners.append(listen(host))
    return host, _listeners[-1].getsockname()[1]


def remove_rendezvous_folder() -> None:
    """Removes what this process made for the meeting, once nobody meets there any more."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def _enter(rendezvous: Rendezvous, config: RendezvousConfig) -> None:
    context = ray.train.get_context()
    join(
        RankInfo(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            local_world_size=context.get_local_world_size(),
        ),
        rendezvous,
        device=device(gpu=config.gpu),
        threads=config.threads,
        node_address=(
            "127.0.0.1" if isinstance(rendezvous.place, str) else ray.util.get_node_ip_address()
        ),
        listener=_listeners.pop() if _listeners else None,
    )


def device(*, gpu: bool) -> str:
    """This worker's device: its GPU's place among those of the node's workers, all visible."""
    if not gpu:
        return "cpu"
    from ray.train.torch import get_device

    return str(get_device())


def work(worker: Worker, payload: Payload, mailbox: Mailbox, *, gpu: bool) -> None:
    """Runs the worker function, in the thread that Ray Train calls, and tells the driver its end.

    Args:
        worker: The worker function.
        payload: Its payload.
        mailbox: Where to tell and to ask.
        gpu: Whether this worker has a GPU.

    Raises:
        RuntimeError: The worker failed, and Ray Train should start all of them again.
    """
    place = ray.train.get_context()
    rank = place.get_world_rank()
    attempt = ray.train.collective.broadcast_from_rank_zero(mailbox.begin() if rank == 0 else None)
    stop = threading.Event()
    threading.Thread(
        target=_listen_for_stop, args=(mailbox, stop), name="hear", daemon=True
    ).start()
    sender = mailbox.sender(f"attempt {attempt} rank {rank}")
    context = WorkerContext(
        rank=rank,
        world_size=place.get_world_size(),
        local_rank=place.get_local_rank(),
        local_world_size=place.get_local_world_size(),
        attempt=attempt,
        device=device(gpu=gpu),
        stop_requested=stop.is_set,
        report=sender.send,
    )
    failure = run_worker(worker, context, payload)
    remove_rendezvous_folder()
    sender.send_last(failure or Finished(attempt, rank))
    # A refusal is the driver's to raise: here it would be retried.
    if failure is not None and failure.kind != "refused":
        raise RuntimeError(failure.text)


def _listen_for_stop(mailbox: Mailbox, stop: threading.Event) -> None:
    """Sets `stop` once the driver asks for it; if the mailbox is lost, so is the driver."""
    with contextlib.suppress(ray.exceptions.RayError):
        mailbox.wait_for_stop()
        stop.set()
