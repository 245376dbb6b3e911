"""A Ray Train worker's side of a run: its process group, and what surrounds its function.

Ray's own torch backend would import torch in the driver and in the controller, neither of which
uses it (seconds of each start), listen on every interface, and let gloo follow the host's name.
"""

import contextlib
import gc
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from cluster.contract import Beside, Message, Payload, Worker, WorkerContext
from cluster.failure import Failure, exit_failure, run_worker
from cluster.process_group import (
    RankInfo,
    Rendezvous,
    WorkersAbsent,
    describe_absence,
    join,
    listen,
    new_secret,
)
from cluster.ray_ear import Board, Ear
from cluster.ray_mailbox import Advanced, Begun, Event, Finished, Kept, Left, Mailbox
from cluster.ray_output import OutputTail, output_paths
from cluster.scratch import make_scratch

_TELL_END_S = 5.0
"""How long a worker that ends itself waits for its driver to know."""
_TELL_S = 1.0
"""How often the driver is told at most how far the run is: each time costs three processes a
millisecond of cores that other workers keep busy."""

_listeners: list[socket.socket] = []
"""Of rank 0's process: the socket between being opened and being joined."""
_folders: list[Path] = []
"""Of rank 0's process: the folder in which workers of one node meet."""
_attempts: list[int] = []
"""Which attempt this process is a worker of."""
_boards: list[Board] = []
"""Where this process writes, or reads, what the first worker of the node hears."""


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
        limit_s = backend_config.timeout_s
        boards = dict(filter(None, gather(worker_group.execute_async(_open_board), limit_s)))
        together = len(boards) == 1
        opening = (
            worker_group.execute_single_async(0, _make_file, backend_config.scratch)
            if together
            else worker_group.execute_single_async(0, _open)
        )
        (place,) = gather([opening], limit_s)
        rendezvous = Rendezvous(place=place, timeout_s=limit_s, secret=new_secret())
        entering = worker_group.execute_async(_enter, rendezvous, backend_config, boards)
        gather(entering, limit_s, each=("to load torch", "to meet", "to connect"))


def gather(calls: Sequence[Any], limit_s: float, each: Sequence[str] = ()) -> list[Any]:
    """What calls of workers gave.

    Args:
        calls: Of each worker one, in the order of ranks.
        limit_s: How long they may take.
        each: What they do one after the other, if each of that may take so long.

    Raises:
        WorkersAbsent: Some did not answer in time.
        ray.exceptions.RayError: One of them failed.
    """
    try:
        given: list[Any] = ray.get(list(calls), timeout=max(1, len(each)) * limit_s)
        return given
    except ray.exceptions.GetTimeoutError as error:
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        absent = [rank for rank, call in enumerate(calls) if call not in done]
        told = describe_absence(len(absent), len(calls), limit_s)
        if each:
            told = (
                f"{len(absent)} of {len(calls)} workers took longer than {limit_s:g} s "
                f"(cluster.start_timeout_s) each {', '.join(each)}"
            )
        raise WorkersAbsent(absent, told) from error


def note_attempt(attempt: int) -> None:
    """Has this process be a worker of an attempt."""
    _attempts[:] = [attempt]


def _open_board() -> tuple[str, str] | None:
    """Makes the board of this node, if this is its first worker; gives the node and the place."""
    _boards.clear()
    if ray.train.get_context().get_local_rank() > 0:
        return None
    _boards.append(Board())
    return _node(), _boards[0].path


def _find_board(boards: Mapping[str, str]) -> None:
    if not _boards:
        with contextlib.suppress(OSError):  # what hides processes from each other hides it too
            _boards.append(Board(boards[_node()]))


class NotJoined(RuntimeError):
    """A worker could not enter the group.

    Args:
        rank: The worker.
        text: Why, headed by the exception's type.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(rank, text)  # as it is made again elsewhere
        self.rank = rank
        self.text = text


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


def _enter(rendezvous: Rendezvous, config: RendezvousConfig, boards: Mapping[str, str]) -> None:
    # Up to the worker's function all is imports, which make no garbage: a fifth of their time.
    gc.disable()
    _find_board(boards)
    try:
        _join(rendezvous, config)
    except WorkersAbsent:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise NotJoined(ray.train.get_context().get_world_rank(), text) from error


def _join(rendezvous: Rendezvous, config: RendezvousConfig) -> None:
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


def work(worker: Worker, payload: Payload, mailbox: Mailbox, *, gpu: bool, beside: Beside) -> None:
    """Runs the worker function, in the thread that Ray Train calls, and tells the driver its end.

    Args:
        worker: The worker function.
        payload: Its payload.
        mailbox: Where to tell and to ask.
        gpu: Whether this worker has a GPU.
        beside: Runs something beside the workers.

    Raises:
        RuntimeError: The worker failed, and Ray Train should start all of them again.
    """
    gc.freeze()
    gc.enable()
    place = ray.train.get_context()
    rank = place.get_world_rank()
    (attempt,) = _attempts
    ear = Ear(mailbox, attempt, _boards[0] if _boards else None)
    ear.start()
    voice = Voice(mailbox, attempt, rank)
    context = WorkerContext(
        rank=rank,
        world_size=place.get_world_size(),
        local_rank=place.get_local_rank(),
        local_world_size=place.get_local_world_size(),
        attempt=attempt,
        device=device(gpu=gpu),
        stop_requested=ear.is_stop_wanted,
        report=voice.report,
        advance=voice.position.advance,
        keep=voice.position.keep,
        grace_s=ear.grace_s,
        complete=ear.note_completion,
        log=voice.tail.log,
        end=voice.end,
        beside=beside,
    )
    failure = run_worker(worker, context, payload)
    leaves = ear.has_interrupted()
    ear.close()
    voice.tail.close()
    remove_rendezvous_folder()
    if failure is not None:
        voice.tell_end(failure)
        # A refusal of the first attempt is the driver's to raise. A later one may be that of a new
        # node, and the driver may want other workers instead.
        if failure.kind != "refused" or attempt > 0:
            raise RuntimeError(failure.text)
    elif leaves:
        voice.tell_end(Left(attempt, rank))
        raise RuntimeError("The worker was asked to leave.")
    else:
        voice.tell_end(Finished(attempt, rank))


class Voice:
    """What a worker tells its driver, and in which order.

    Args:
        mailbox: The line to it.
        attempt: The worker's attempt.
        rank: The worker.

    Attributes:
        tail: Sends what the process writes.
        position: How far the worker has come.
    """

    def __init__(self, mailbox: Mailbox, attempt: int, rank: int) -> None:
        self._attempt, self._rank = attempt, rank
        self._sender = mailbox.sender(f"attempt {attempt} rank {rank}")
        if rank == 0:
            self._sender.send(Begun(attempt))
        self.position = Position(attempt, self._sender.send if rank == 0 else None)
        self.tail = OutputTail(self._sender.send, attempt=attempt, rank=rank, paths=output_paths())
        self.tail.start()

    def report(self, message: Message) -> None:
        """Sends a message, after what was written before it."""
        self.tail.flush()
        self._sender.send(message)

    def tell_end(self, event: Finished | Left | Failure, *, timeout_s: float | None = None) -> None:
        """Sends the last event, and waits until all has arrived; see `Sender.send_last`."""
        if isinstance(event, Failure):
            event = replace(event, images=self.position.images)
        self._sender.send_last(event, timeout_s=timeout_s)

    def end(self, code: int) -> None:
        """Ends this process, and tells the driver how, if it is in reach.

        A thread of its own tells it: the one that stands still may hold the lock of the tail.
        """
        try:
            telling = threading.Thread(target=self._tell_exit, args=(code,), daemon=True)
            telling.start()
            telling.join(_TELL_END_S)
        finally:
            os._exit(code)

    def _tell_exit(self, code: int) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self.tail.close()
            self.tell_end(exit_failure(self._rank, self._attempt, code), timeout_s=_TELL_END_S)


class Position:
    """How far a worker has come; the driver is told by the first rank.

    Args:
        attempt: The attempt.
        tell: Sends an event; None where another rank does.

    Attributes:
        images: Images of the run that are trained; None before the worker said so.
    """

    def __init__(self, attempt: int, tell: Callable[[Event], None] | None) -> None:
        self._attempt = attempt
        self._tell = tell
        self._told_s = float("-inf")
        self.images: int | None = None

    def advance(self, images: int) -> None:
        """Notes that so many images are trained, and tells it now and then."""
        self.images = images
        now = time.monotonic()
        if self._tell is not None and now - self._told_s >= _TELL_S:
            self._told_s = now
            self._tell(Advanced(self._attempt, images))

    def keep(self, images: int) -> None:
        """Tells that a checkpoint of so many images is there."""
        if self._tell is not None:
            self._tell(Kept(images))
