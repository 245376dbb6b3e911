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
    """The mailbox as the driver and the workers hold it; it can be sent to workers.

    Args:
        actor: The handle of the actor behind it.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self) -> int:
        """Opens an attempt, called by its rank 0; returns the attempt's number, from 0."""
        attempt: int = ray.get(self._actor.begin.remote())
        return attempt

    def tell(self, message: Message) -> None:
        """Sends a message and does not wait for its arrival."""
        self._actor.put.remote(message)

    def end(self, news: Ended | Failure) -> None:
        """Sends a worker's last news and waits until all it sent has arrived."""
        ray.get(self._actor.put.remote(news))

    def fetch(self) -> list[News]:
        """All news since the last call, in the order of arrival, each worker's in its own."""
        news: list[News] = ray.get(self._actor.fetch.remote())
        return news

    def ask_to_stop(self) -> None:
        """Asks all workers to stop, of this attempt and of any later."""
        ray.get(self._actor.ask_to_stop.remote())

    def stop_asked(self) -> bool:
        """Whether the driver asked for a stop."""
        asked: bool = ray.get(self._actor.stop_asked.remote())
        return asked


def open_mailbox() -> Mailbox:
    """Starts a mailbox on the driver's node, as long-lived as the driver's connection to Ray."""
    here = ray.get_runtime_context().get_node_id()
    return Mailbox(
        ray.remote(_Box)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
        .remote()
    )


class _Box:
    """The actor. One call runs at a time, so that each worker's news stay in order."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._attempts = 0
        self._stop = False

    def begin(self) -> int:
        attempt = self._attempts
        self._attempts += 1
        self._news.append(Begun(attempt))
        return attempt

    def put(self, news: News) -> None:
        self._news.append(news)

    def fetch(self) -> list[News]:
        news, self._news = self._news, []
        return news

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop
