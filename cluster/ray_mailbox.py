"""The actor between a run's driver and its workers: news one way, the stop request the other."""

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
    """Holds what the workers tell until the driver fetches it, and the stop until they ask.

    One call runs at a time, so that each worker's news stay in order.
    """

    def __init__(self) -> None:
        self._news: list[News] = []
        self._attempts = 0
        self._stop = False

    def begin(self) -> int:
        """Called by rank 0 of each attempt; returns the attempt's number, from 0."""
        attempt = self._attempts
        self._attempts += 1
        self._news.append(Begun(attempt))
        return attempt

    def put(self, news: News) -> None:
        """Takes the news of a worker."""
        self._news.append(news)

    def fetch(self) -> list[News]:
        """Hands over all news since the last call, in the order of arrival."""
        news, self._news = self._news, []
        return news

    def ask_to_stop(self) -> None:
        """Answers `stop_asked` from now on."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether the driver asked for a stop."""
        return self._stop


def open_mailbox() -> Any:
    """Starts a mailbox beside the driver, and as long-lived as it is.

    Returns:
        The actor's handle.
    """
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Mailbox)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        .remote()
    )
