"""The torch.distributed process group of a run: how a worker enters and leaves it.

The rendezvous store listens on the one address that the workers know it by (torch alone would
listen on every interface), and gloo talks on the interface that carries the node's address: left
alone it follows the host's name, which many Linux systems resolve to a loopback address that other
nodes cannot reach.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A collective that waits longer than this fails; a peer that dies is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One worker's place in the group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the workers meet: the store's address, and how long they wait for one another."""

    host: str
    port: int
    timeout_s: float


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port of `host`, for rank 0 to serve the store on."""
    return socket.create_server((host, 0), backlog=1024)


def interface_of(address: str) -> str | None:
    """The network interface that carries `address` on this machine; None if there is none."""
    if address.startswith("127."):
        address = "127.0.0.1"
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def join(
    seat: Seat,
    rendezvous: Rendezvous,
    *,
    device: str,
    threads: int,
    node_address: str,
    listener: socket.socket | None,
) -> None:
    """Sets this process up as a worker and enters the group with all others.

    Args:
        seat: This worker's place.
        rendezvous: Where to meet; the same for all.
        device: `cpu` or `cuda:N`; decides the group's backend, gloo or nccl.
        threads: Compute threads of this process.
        node_address: This node's address as the others know it.
        listener: The socket behind the rendezvous; rank 0's alone.

    Raises:
        RuntimeError: Some worker did not come in time.
    """
    os.environ.update(
        RANK=str(seat.rank),
        WORLD_SIZE=str(seat.world_size),
        LOCAL_RANK=str(seat.local_rank),
        LOCAL_WORLD_SIZE=str(seat.local_world_size),
        MASTER_ADDR=rendezvous.host,
        MASTER_PORT=str(rendezvous.port),
        OMP_NUM_THREADS=str(threads),
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    interface = interface_of(node_address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        seat.world_size,
        listener is not None,
        timeout=timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    store.set_timeout(COLLECTIVE_TIMEOUT)


def leave() -> None:
    """Leaves the group together with all others, if this process is still in it.

    The barrier is not for show: a rank that tears its connections down while a peer still uses them
    now and then aborts the peer's process.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
