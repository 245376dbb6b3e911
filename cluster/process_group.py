"""The process group of a run: how a worker enters it, proves itself, and leaves it.

Workers that share a machine meet at a file that no other user can read or write, and talk over the
loopback interface. Others meet at a store that listens on the one address that they know it by
(torch alone would listen on every interface), and gloo talks on the interface that carries the
node's address: left alone it follows the host's name, which many Linux systems resolve to a
loopback address that other nodes cannot reach.

gloo believes whoever connects first: another user of the machine, or another host, can take a
rank's place by sending a small number to a port. So every group is asked, right after it was formed
and over the very connections that it will use, for a proof that only a rank of this run can give.
What comes after goes over the same connections. They are not encrypted: who can change packets on
their way is not kept out (docs/scale-out.md).

torch is imported where it is used: the driver and Ray Train's controller import this file, and use
no torch, whose import takes seconds.
"""

import hashlib
import hmac
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import psutil

from cluster.tested import TESTED_TORCH, require_tested

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A collective that waits longer than this fails; a peer that dies is noticed at once."""
_GLOO_GROUPS = 4
"""How many groups of gloo's a worker has at least, each with a connection to each other worker."""
_OTHER_FILES = 256
_NAMED = 8
"""So many workers that did not come are named."""
_HERE = "here"
_ALL_HERE = "all here"
_BYTES = 32
"""Length of the secret, of a challenge, and of a proof."""


class WorkersAbsent(RuntimeError):
    """Not all workers came to the meeting in time, or they could not connect to each other.

    Args:
        ranks: Those that did not come; none if that is not known.
        text: What happened, without them.
    """

    def __init__(self, ranks: Sequence[int], text: str) -> None:
        super().__init__(tuple(ranks), text)  # as it is made again elsewhere
        self.ranks = tuple(ranks)
        self.text = text

    def __str__(self) -> str:
        named = ", ".join(f"worker {rank}" for rank in self.ranks[:_NAMED])
        more = f" and {len(self.ranks) - _NAMED} more" if len(self.ranks) > _NAMED else ""
        return f"{self.text}: {named}{more}" if named else self.text


class PeerUnproven(RuntimeError):
    """Something that does not know the run's secret took a rank's place."""


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One worker's place in the group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the workers of an attempt meet, and what they know each other by.

    Attributes:
        place: Path of a file in a folder of this user's alone, or host and port of a store.
        timeout_s: How long they wait for one another, and then may take to connect.
        secret: Known to them only.
    """

    place: str | tuple[str, int]
    timeout_s: float
    secret: bytes = field(repr=False)


_file_stores: list[Any] = []
"""Those this process has met by, kept until it ends. One that goes signs off in its file, in two
steps. Where rank 0 removed the folder between them, it would wait for the file, for as long as a
collective may take."""


class _Proofs:
    """What this process needs to tell its run's ranks from others; one of them for the process."""

    rendezvous: Rendezvous | None = None
    proven: ClassVar[set[str]] = set()
    """Names of the groups in which that was done."""


def new_secret() -> bytes:
    """A secret for one attempt of a run."""
    return secrets.token_bytes(_BYTES)


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


def default_environment(device: str, node_address: str) -> dict[str, str]:
    """What a worker tells its libraries, unless the user has told them otherwise.

    Args:
        device: `cpu` or `cuda:N`.
        node_address: The node's address as workers on other nodes know it.
    """
    interface = interface_of(node_address)
    defaults = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}
    if device != "cpu":
        # Tokens, gradients and weights have communicators of their own, on several CUDA streams.
        # torch wants their collectives executed in one order on all ranks (`new_group`), and
        # streams have none. So NCCL starts them in the order in which the program asks for them,
        # which is the same everywhere. A version before 2.26 does not know this and ignores it.
        defaults["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"
    return defaults


def join(
    rank_info: RankInfo,
    rendezvous: Rendezvous,
    *,
    device: str,
    threads: int,
    node_address: str = "127.0.0.1",
    listener: socket.socket | None = None,
) -> None:
    """Sets this process up as a worker and enters the group with all others.

    Args:
        rank_info: This worker's place.
        rendezvous: Where to meet; the same for all.
        device: `cpu` or `cuda:N`; decides the group's backend, gloo or nccl.
        threads: Compute threads of this process.
        node_address: This node's address as workers on other nodes know it.
        listener: The socket behind the rendezvous, if it is an address; rank 0's alone.

    Raises:
        WorkersAbsent: Some worker did not come in time, or they do not reach each other.
        RuntimeError: This process may not open a file, that is a connection, for each of them; or
            another worker ended meanwhile.
        PeerUnproven: Something else came in a worker's place.
    """
    allow_connections(rank_info.world_size)
    os.environ.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(rank_info.local_rank),
        LOCAL_WORLD_SIZE=str(rank_info.local_world_size),
        OMP_NUM_THREADS=str(threads),
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in default_environment(device, node_address).items():
        os.environ.setdefault(name, value)

    import torch

    torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(device)
    store = meet(rank_info, rendezvous, listener)
    _connect(rank_info, store, "gloo" if device == "cpu" else "nccl", rendezvous.timeout_s)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    _Proofs.rendezvous = rendezvous
    prove_peers()


def allow_connections(world_size: int) -> None:
    """Lets this process open as many files as it is allowed to, for each connection is one.

    Args:
        world_size: Number of workers.

    Raises:
        RuntimeError: They are too few for connections to all of them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _GLOO_GROUPS * world_size + _OTHER_FILES
    if hard < needed:
        raise RuntimeError(
            f"A worker may open {hard:,} files here, and connections to {world_size:,} workers "
            f"take {needed:,}: raise the hard limit of open files (ulimit -Hn, LimitNOFILE= of a "
            "service, --ulimit nofile= of a container) on each node."
        )


def meet(rank_info: RankInfo, rendezvous: Rendezvous, listener: socket.socket | None = None) -> Any:
    """Waits at the store until all workers are there.

    torch's own meeting would wait as long as the group's collectives may take, and not say for
    whom. Here a worker sends the store three words, however many others there are.

    Args:
        rank_info: This worker's place.
        rendezvous: Where to meet; the same for all.
        listener: As for `join`.

    Returns:
        The store, of torch's.

    Raises:
        WorkersAbsent: Some worker did not come in time.
        RuntimeError: The worker that serves the store ended meanwhile.
    """
    limit_s, size = rendezvous.timeout_s, rank_info.world_size
    deadline = time.monotonic() + limit_s
    store = _reach_store(rank_info, rendezvous, listener)
    store.set(f"{_HERE}/{rank_info.rank}", "")
    if store.add(_HERE, 1) == size:
        store.set(_ALL_HERE, "")
    try:
        store.wait([_ALL_HERE], timedelta(seconds=max(0.1, deadline - time.monotonic())))
    except RuntimeError as error:
        # Each is looked for, since torch has no type of its own for the end of a wait.
        if absent := _find_absent(store, range(size)):
            raise WorkersAbsent(absent, describe_absence(len(absent), size, limit_s)) from error
    return store


def describe_absence(absent: int, workers: int, timeout_s: float) -> str:
    """Says that workers did not come.

    Args:
        absent: How many.
        workers: Of how many.
        timeout_s: How long they were waited for.
    """
    return (
        f"{absent} of {workers} workers did not come to meet the others within {timeout_s:g} s "
        "(cluster.start_timeout_s), for they load slowly, stand still, or do not reach them"
    )


def _find_absent(store: Any, ranks: Sequence[int]) -> list[int]:
    """Those that have not come, by halves: with a thousand of them most of the answers are one."""
    if store.check([f"{_HERE}/{rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return _find_absent(store, ranks[:half]) + _find_absent(store, ranks[half:])


def _connect(rank_info: RankInfo, store: Any, backend: str, timeout_s: float) -> None:
    """Forms the group of all workers, who have met."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    require_tested("torch", TESTED_TORCH)  # the call that sets a group's timeout is private
    # gloo's connections are made now. NCCL's are made by the first collective, so what is given
    # here counts for that one.
    limit = timedelta(seconds=timeout_s) if backend == "gloo" else COLLECTIVE_TIMEOUT
    began_s = time.monotonic()
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            timeout=limit,
        )
    except RuntimeError as error:
        if time.monotonic() - began_s < timeout_s:
            raise
        said = " ".join(str(error).split())[:200]
        raise WorkersAbsent(
            (),
            f"All {rank_info.world_size} workers came, and could not connect to each other within "
            f"{timeout_s:g} s (cluster.start_timeout_s): a worker stands still, or its node cannot "
            f"be reached at the interface that it uses (docs/scale-out.md, Network): {said}",
        ) from error
    if backend == "gloo":
        distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)


def _reach_store(
    rank_info: RankInfo, rendezvous: Rendezvous, listener: socket.socket | None
) -> Any:
    """The store. One that another worker serves may be listened for, and not answer."""
    if isinstance(rendezvous.place, str) or listener is not None:
        return _store(rank_info, rendezvous, listener)
    reached: list[Any] = []

    def reach() -> None:
        try:
            reached.append(_store(rank_info, rendezvous, None))
        except Exception as error:
            reached.append(error)

    # torch tries twice as long as it is told to, and waits for ever for who has taken the
    # connection and says nothing.
    reaching = threading.Thread(target=reach, name="rendezvous", daemon=True)
    reaching.start()
    reaching.join(rendezvous.timeout_s)
    if not reached:
        told = describe_absence(1, rank_info.world_size, rendezvous.timeout_s)
        raise WorkersAbsent((0,), told)
    if isinstance(reached[0], Exception):
        raise reached[0]
    return reached[0]


def _store(rank_info: RankInfo, rendezvous: Rendezvous, listener: socket.socket | None) -> Any:
    import torch.distributed as dist

    timeout = timedelta(seconds=rendezvous.timeout_s)
    if isinstance(rendezvous.place, str):
        file = dist.FileStore(rendezvous.place, rank_info.world_size)  # type: ignore[attr-defined]
        file.set_timeout(timeout)
        _file_stores.append(file)
        return file
    host, port = rendezvous.place
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        rank_info.world_size,
        listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def leave() -> None:
    """Leaves the group together with all others, if this process is still in it.

    The barrier is not for show: a rank that tears its connections down while a peer still uses them
    now and then aborts the peer's process.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _Proofs.rendezvous = None
    _Proofs.proven.clear()


def prove_peers() -> None:
    """Lets the ranks of every group of gloo's that is new since the last call shake hands.

    A collective call of all workers, to be made after each forming of groups and before anything
    is sent over them. It does nothing in a process that did not `join`. NCCL's groups are left out:
    they know each other by a number that goes through the rendezvous.

    Raises:
        PeerUnproven: Something that is no worker of this run took a rank's place.
        UntestedVersion: torch's list of groups is not known in this version.
    """
    rendezvous = _Proofs.rendezvous
    if rendezvous is None:
        return
    from torch.distributed import distributed_c10d

    require_tested("torch", TESTED_TORCH)  # a list that has moved would leave groups unproven
    timeout = timedelta(seconds=rendezvous.timeout_s)
    # In the order of their forming, which is the same on all ranks.
    for group, (backend, _store) in list(distributed_c10d._world.pg_map.items()):
        if "gloo" in backend and group.group_name not in _Proofs.proven:
            shake_hands(group, rendezvous.secret, timeout=timeout)
            _Proofs.proven.add(group.group_name)


def shake_hands(group: Any, secret: bytes, *, timeout: timedelta) -> None:
    """Lets each pair of a group's ranks prove itself to the other; a collective call.

    Each rank sends every other a challenge of its own, and gets back a keyed hash over both
    challenges, the group and who speaks to whom, so that no proof serves for another pair.

    Args:
        group: A process group of gloo's.
        secret: The run's.
        timeout: How long the others may take.

    Raises:
        PeerUnproven: A rank gave a wrong proof, or none.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name = str(group.group_name)
    asked = [secrets.token_bytes(_BYTES) for _ in range(size)]
    were_asked = _exchange_messages(asked, group, timeout)

    def proof(speaker: int, listener: int, challenge: bytes, own: bytes) -> bytes:
        told = f"lapflow\0{name}\0{size}\0{speaker}\0{listener}\0".encode() + challenge + own
        return hmac.digest(secret, told, hashlib.sha256)

    given = _exchange_messages(
        [proof(rank, peer, were_asked[peer], asked[peer]) for peer in range(size)], group, timeout
    )
    for peer in range(size):
        expected = proof(peer, rank, asked[peer], were_asked[peer])
        if not hmac.compare_digest(given[peer], expected):
            raise PeerUnproven(
                f"What answers rank {rank} in place of rank {peer} of the group {name!r} does not "
                "know this run's secret: some other program connected to a port of the run. Run it "
                "where nobody else reaches its ports (docs/scale-out.md, Network)."
            )


def _exchange_messages(messages: list[bytes], group: Any, timeout: timedelta) -> list[bytes]:
    """Send the i-th message to the i-th rank, and return what each sent to this one."""
    import torch
    import torch.distributed as dist

    out = torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8)
    into = torch.zeros_like(out)
    # Directly between the two of each pair; a gather would let others pass messages on.
    work = dist.all_to_all_single(into, out, group=group, async_op=True)
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise PeerUnproven(
            f"The ranks of the group {group.group_name!r} did not prove themselves to each other "
            f"within {timeout.total_seconds():g} s, or lost their connection. A worker died, or "
            "some other program connected to a port of the run (docs/scale-out.md, Network); "
            f"gloo says: {error}"
        ) from error
    data = into.numpy().tobytes()
    return [data[_BYTES * peer :][:_BYTES] for peer in range(len(messages))]
