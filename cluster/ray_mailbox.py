"""The actor between a run's driver and its workers: news one way, the stop request the other."""

import asyncio
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.contract import Message
from cluster.failure import Failure


@dataclass(frozen=True)
class Begun:
    """The workers of an attempt began."""

    attempt: int


@dataclass(frozen=True)
class Ended:
    """A worker of an attempt returned."""

    attempt: int
    rank: int


News: TypeAlias = Message | Failure | Begun | Ended


class Mailbox:
    """Holds what the workers tell until the driver fetches it, and the stop until they ask."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._attempts = 0
        self._stop = asyncio.Event()

    async def begin(self) -> int:
        """Called by rank 0 of each attempt; returns the attempt's number, from 0."""
        attempt = self._attempts
        self._attempts += 1
        self._news.append(Begun(attempt))
        return attempt

    async def put(self, message: Message) -> None:
        """Takes a message of a worker."""
        self._news.append(message)

    async def end(self, end: Ended | Failure) -> None:
        """Called by each worker when it is done, with what went wrong if anything did."""
        self._news.append(end)

    async def fetch(self) -> list[News]:
        """Hands over all news since the last call, in the order of arrival."""
        news, self._news = self._news, []
        return news

    async def ask_to_stop(self) -> None:
        """Answers every worker that waits in `stop_asked`, now and later."""
        self._stop.set()

    async def stop_asked(self, wait_s: float) -> bool:
        """Whether the driver asked for a stop, waiting up to `wait_s` for it."""
        try:
            await asyncio.wait_for(self._stop.wait(), wait_s)
        except TimeoutError:
            return False
        return True


def open_mailbox(workers: int) -> Any:
    """Starts a mailbox for `workers` workers beside the driver, and as long-lived as it is.

    Returns:
        The actor's handle.
    """
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Mailbox)
        .options(
            num_cpus=0,
            # Every worker has one call waiting in stop_asked all the time.
            max_concurrency=2 * workers + 100,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )
