"""A Ray Train worker's side of a run: what surrounds the worker function on each rank."""

import contextlib
import threading

import ray
import ray.train
import ray.train.collective

from cluster.contract import Payload, Worker, WorkerContext
from cluster.failure import attend
from cluster.ray_mailbox import Ended, Mailbox
from cluster.ray_rendezvous import device, forget_meeting


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
    threading.Thread(target=_hear, args=(mailbox, stop), name="hear", daemon=True).start()
    sender = mailbox.sender(f"attempt {attempt} rank {rank}")
    context = WorkerContext(
        rank=rank,
        world_size=place.get_world_size(),
        local_rank=place.get_local_rank(),
        local_world_size=place.get_local_world_size(),
        attempt=attempt,
        device=device(gpu=gpu),
        stop_requested=stop.is_set,
        tell=sender.tell,
    )
    failure = attend(worker, context, payload)
    forget_meeting()
    sender.end(failure or Ended(attempt, rank))
    # A refusal is the driver's to raise: here it would be retried.
    if failure is not None and failure.kind != "refused":
        raise RuntimeError(failure.text)


def _hear(mailbox: Mailbox, stop: threading.Event) -> None:
    """Sets `stop` once the driver asks for it; if the mailbox is lost, so is the driver."""
    with contextlib.suppress(ray.exceptions.RayError):
        mailbox.wait_for_stop()
        stop.set()
