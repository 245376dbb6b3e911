"""What many ranks cost the cluster: the driver's mailbox, votes, nodes that are probed."""

import asyncio
import operator
import pickle
import resource
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.command import Cell
from benchmarks.ranks.played import PlayedGroup
from cluster import ray_ear
from cluster.ray_ear import Board, Ear
from cluster.ray_mailbox import GO, HEAR_S, Box, Mailbox, Request
from cluster.ray_nodes import are_reachable
from trainer.training import loop
from trainer.training.loop import StopVote

_MINUTE_S = 60.0
_MOST_REAL = 64
"""Ranks of a real group of gloo's in this process: each has a connection to each other."""
_VOTES = 5


class _Line:
    """The mailbox's worker side: asks a mailbox of this process, and counts."""

    def __init__(self) -> None:
        self._box = Box(hear_s=0)
        self._loop = asyncio.new_event_loop()
        self.sizes: list[int] = []
        self.s = 0.0

    def hear(self, attempt: int, known: Request) -> Request:
        """Give what the driver wants, without waiting."""
        began = time.process_time()
        question = pickle.dumps((attempt, known))
        heard = self._loop.run_until_complete(self._box.hear(attempt, known))
        self.sizes.append(len(question) + len(pickle.dumps(heard)))
        self.s += time.process_time() - began
        return heard

    def close(self) -> None:
        self._loop.close()


class _Clock:
    """Stands in for the module `time` of those that listen."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def measure_mailbox(ranks: int, ranks_per_node: int) -> dict[str, Cell]:
    """Have the workers of each node listen for a minute; the row of the table.

    The mailbox itself answers, at once and in this process, and nobody waits between two looks.
    What a node's workers read is their board, in which the first one writes. The seconds are the
    mailbox's work.
    """
    line, clock = _Line(), _Clock()
    with (
        closing(line),
        mock.patch.object(ray_ear, "time", clock),
        mock.patch.object(ray_ear, "_LOOK_S", 0.0),
    ):
        # Nodes have nothing of each other, so one is played after another.
        for first in range(0, ranks, ranks_per_node):
            own = Board()
            others = min(ranks_per_node, ranks - first) - 1
            boards = [own, *(Board(own.path) for _ in range(others))]
            ears = [Ear(cast(Mailbox, line), 0, board) for board in boards]
            for _ in range(round(_MINUTE_S / HEAR_S)):
                clock.now_s += HEAR_S
                for ear in ears:
                    ear.listen()
    return {
        "what": "mailbox, a minute",
        "ranks": ranks,
        "messages": 2 * len(line.sizes),
        "KiB": sum(line.sizes) / 1024,
        "s": line.s,
    }


def measure_stop(ranks: int, ranks_per_node: int) -> dict[str, Cell]:
    """Have one worker of each node hear that all are to stop; the row of the table."""
    nodes = -(-ranks // ranks_per_node)

    async def stop() -> float:
        box = Box(hear_s=3600)
        asked = [asyncio.create_task(box.hear(0, GO)) for _ in range(nodes)]
        await asyncio.sleep(0)
        began = time.perf_counter()
        await box.ask_to_stop(None)
        heard = await asyncio.gather(*asked)
        assert set(heard) == {Request("stop")}
        return time.perf_counter() - began

    return {"what": "stop", "ranks": ranks, "messages": nodes, "s": asyncio.run(stop())}


class _PlayedDist:
    """Stands in for `torch.distributed`: all ranks' reductions, which they start one by one.

    Args:
        group: Counts what they send.
    """

    ReduceOp = dist.ReduceOp

    def __init__(self, group: PlayedGroup) -> None:
        self._group = group
        self._flags: list[torch.Tensor] = []

    def is_initialized(self) -> bool:
        return True

    def new_group(self, *, backend: str) -> PlayedGroup:
        assert backend == "gloo"
        return self._group

    def all_reduce(
        self, flag: torch.Tensor, *, op: object, group: PlayedGroup, async_op: bool
    ) -> "_PlayedDist":
        assert op == dist.ReduceOp.MAX
        assert group is self._group
        assert async_op
        self._flags.append(flag)
        if len(self._flags) % group.size == 0:  # another one of all ranks is under way
            group.count(around=flag.nbytes)
        return self

    def wait(self) -> None:
        """Complete what all ranks have started."""
        most = max(map(float, self._flags), default=0.0)
        while self._flags:
            self._flags.pop().fill_(most)


def measure_votes(ranks: int) -> dict[str, Cell]:
    """Have the training loop's vote at an update taken by all ranks; the row of the table.

    The last rank wants to stop. The seconds are those of a real group of gloo's, whose ranks are
    threads of this process, as far as it can have so many.
    """
    group = PlayedGroup(ranks)
    with mock.patch.object(loop, "dist", _PlayedDist(group)):
        votes = [StopVote(partial(operator.eq, rank, ranks - 1)) for rank in range(ranks)]
        begun, told = ([vote() for vote in votes] for _ in range(2))
    assert not any(begun)
    assert all(told)
    traffic = group.traffic
    return {
        "what": "vote",
        "ranks": ranks,
        "messages": traffic.messages,
        "KiB": traffic.bytes / 1024,
        "to the first": traffic.first_messages,
        "its KiB": traffic.first_bytes / 1024,
        "s": _vote_seconds(ranks) if _can_be_real(ranks) else None,
    }


def _can_be_real(ranks: int) -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ranks <= _MOST_REAL and ranks**2 + 500 < soft


def _vote_seconds(ranks: int) -> float:
    gloo: Any = dist.ProcessGroupGloo
    store, groups = dist.HashStore(), dict[int, Any]()  # type: ignore[attr-defined]

    def form(rank: int) -> None:
        options = gloo._Options()
        options._timeout = timedelta(minutes=10)
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        groups[rank] = gloo(store, rank, ranks, options)

    def vote() -> None:
        flags = [torch.zeros(1) for _ in range(ranks)]
        works = [groups[rank].allreduce([flags[rank]]) for rank in range(ranks)]
        for work in works:
            work.wait()

    in_threads(form, range(ranks))
    vote()
    began = time.perf_counter()
    for _ in range(_VOTES):
        vote()
    return (time.perf_counter() - began) / _VOTES


def in_threads(act: Callable[[int], object], numbers: Sequence[int]) -> None:
    """Call `act` with each number, each in a thread of its own."""
    threads = [threading.Thread(target=act, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_probing(ranks: int, ranks_per_node: int) -> dict[str, Cell]:
    """Probe nodes before a start, each at a port of its own; the row of the table."""
    nodes = -(-ranks // ranks_per_node)
    with ExitStack() as at_last:
        ports = [
            at_last.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(nodes)
        ]
        addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
        began = time.perf_counter()
        answers = are_reachable(addresses)
        seconds = time.perf_counter() - began
        assert all(answers)
        connections = sum(map(_count_connections, ports))
    return {"what": "probing", "ranks": ranks, "messages": connections, "s": seconds}


def _count_connections(port: socket.socket) -> int:
    """Count the connections that were made to a port."""
    port.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            port.accept()[0].close()
            count += 1
    return count
