"""The actor between a run's driver and its workers: events one way, the stop request the other."""

import asyncio
import itertools
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.contract import ClusterConfig, Message
from cluster.failure import Failure

_MORE_CALLS = 100
"""Calls at a time beside those that wait for the stop request."""


@dataclass(frozen=True)
class Started:
    """The workers of an attempt began."""

    attempt: int


@dataclass(frozen=True)
class Finished:
    """A worker of an attempt returned."""

    attempt: int
    rank: int


@dataclass(frozen=True)
class Note:
    """A line for a person about what the cluster does."""

    text: str


Event: TypeAlias = Message | Failure | Started | Finished | Note


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

    def sender(self, name: str) -> "Sender":
        """What one process sends its events by; no other has its name."""
        return Sender(self._actor, name)

    def report_line(self, text: str) -> None:
        """Sends a line for a person; unlike a sender's, notes may overtake each other."""
        self.sender(f"note {uuid.uuid4()}").send(Note(text))

    def fetch(self) -> list[Event]:
        """All events since the last call, in the order of arrival, each sender's in its own."""
        events: list[Event] = ray.get(self._actor.fetch.remote())
        return events

    def ask_to_stop(self) -> None:
        """Asks all workers to stop, of this attempt and of any later."""
        ray.get(self._actor.ask_to_stop.remote())

    def wait_for_stop(self) -> None:
        """Returns once the driver asks for a stop; one call that waits, however long it takes."""
        ray.get(self._actor.wait_for_stop.remote())


class Sender:
    """One process's way into the mailbox.

    Args:
        actor: The handle of the mailbox's actor.
        name: The sender's, unlike any other's.
    """

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name
        self._numbers = itertools.count()

    def send(self, event: Event) -> None:
        """Sends an event and does not wait for its arrival."""
        self._put(event)

    def send_last(self, event: Finished | Failure) -> None:
        """Sends the last event and waits until all it sent has arrived."""
        ray.get(self._put(event))

    def _put(self, event: Event) -> Any:
        return self._actor.put.remote(self._name, next(self._numbers), event)


def open_mailbox(config: ClusterConfig) -> Mailbox:
    """Starts a mailbox on the driver's node, as long-lived as the driver's connection to Ray.

    Args:
        config: How many workers wait at it for the stop request, in how many attempts.
    """
    here = ray.get_runtime_context().get_node_id()
    waiting = config.workers * (config.max_failures + 2)
    return Mailbox(
        ray.remote(Box)
        .options(
            num_cpus=0,
            max_concurrency=waiting + _MORE_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )


class Box:
    """The actor.

    Its calls are coroutines, so that any number of workers can wait for the stop request by one
    call each. Ray may run such calls in another order than they were made in, so each sender
    numbers its events, and what comes early waits for its turn.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._next: Counter[str] = Counter()
        self._early: dict[tuple[str, int], Event] = {}
        self._attempts = 0
        self._stop = asyncio.Event()

    async def begin(self) -> int:
        """Opens an attempt and returns its number."""
        attempt = self._attempts
        self._attempts += 1
        self._events.append(Started(attempt))
        return attempt

    async def put(self, sender: str, number: int, event: Event) -> None:
        """Takes a sender's event of that number, from 0."""
        self._early[sender, number] = event
        while (turn := (sender, self._next[sender])) in self._early:
            self._events.append(self._early.pop(turn))
            self._next[sender] += 1

    async def fetch(self) -> list[Event]:
        """Gives the events since the last call."""
        events, self._events = self._events, []
        return events

    async def ask_to_stop(self) -> None:
        """Lets all go that wait for the stop request."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Returns once a stop is asked for."""
        await self._stop.wait()
