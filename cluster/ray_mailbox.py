"""The actor between a run's driver and its workers: events one way, the stop request the other."""

import asyncio
import contextlib
import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.contract import ClusterConfig, Message
from cluster.failure import Failure

_MORE_CALLS = 100
"""Calls at a time beside those of workers that wait for a request."""
_LOOK_S = 0.5
"""How often the controller, while it waits for the driver's word, looks whether it is given up."""
HEAR_S = 5.0
"""How long a worker's call waits for a request before it is made again. That it is answered tells
the worker that its driver is there."""
ANSWER_S = 15.0
"""How long a worker waits for an answer, twice, before it takes its driver for lost."""


@dataclass(frozen=True)
class Request:
    """What the driver wants of the workers.

    Attributes:
        kind: To `go` on; to `stop` for good; or to `leave`, since they will be started again.
        grace_s: How long they have; None if nothing hurries them.
    """

    kind: Literal["go", "leave", "stop"]
    grace_s: float | None = None


GO = Request("go")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker of an attempt runs.

    Attributes:
        node: Ray's name of its node.
        address: The node's address.
        host: The node's name for people.
        pid: The worker's process there.
        output: The files there that take what the worker writes.
    """

    node: str
    address: str
    host: str
    pid: int
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """The processes of an attempt's workers are there; who runs where, in the order of ranks."""

    attempt: int
    seats: tuple[Seat, ...]


@dataclass(frozen=True)
class Begun:
    """The workers of an attempt have met and are at work."""

    attempt: int


@dataclass(frozen=True)
class Finished:
    """A worker of an attempt returned."""

    attempt: int
    rank: int


@dataclass(frozen=True)
class Left:
    """A worker of an attempt returned because it was asked to leave."""

    attempt: int
    rank: int


@dataclass(frozen=True)
class Advanced:
    """An attempt has trained so many images of the run."""

    attempt: int
    images: int


@dataclass(frozen=True)
class Kept:
    """There is a checkpoint of so many images of the run."""

    images: int


@dataclass(frozen=True)
class Output:
    """What a worker of an attempt has written: bytes of a file of its, from one of them on."""

    attempt: int
    rank: int
    stream: str
    start: int
    data: bytes


@dataclass(frozen=True)
class Note:
    """A line for a person about what the cluster does."""

    text: str


@dataclass(frozen=True)
class Lacking:
    """Workers cannot be started now, and why."""

    text: str


@dataclass(frozen=True)
class Readmitted:
    """Nodes that were avoided are used again, for the others do not suffice."""


@dataclass(frozen=True)
class Broken:
    """Ray Train's controller cannot go on, and waits to be told whether it is to try again.

    Attributes:
        kind: `workers` failed, their `start` did, or `else` something that no start would cure.
        failures: Of the workers, as far as it knows; of no attempt in particular.
        text: What it says itself.
        absent: The ranks that did not come to meet the others in time.
    """

    kind: Literal["workers", "start", "else"]
    failures: tuple[Failure, ...]
    text: str
    absent: tuple[int, ...] = ()


Event: TypeAlias = (
    Message
    | Failure
    | Started
    | Begun
    | Finished
    | Left
    | Advanced
    | Kept
    | Output
    | Note
    | Lacking
    | Readmitted
    | Broken
)


class Mailbox:
    """The mailbox as the driver and the workers hold it; it can be sent to workers.

    Args:
        actor: The handle of the actor behind it.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._answer_s = ANSWER_S

    def begin(self, seats: Sequence[Seat]) -> int:
        """Opens an attempt, and gives its number, from 0."""
        attempt: int = ray.get(self._actor.begin.remote(tuple(seats)))
        return attempt

    def ask(self, broken: Broken, *, meanwhile: Callable[[], None]) -> None:
        """Returns once the driver wants the workers to be started again; if it does not, never.

        Args:
            broken: What happened.
            meanwhile: Is called now and then while this waits; what it raises ends the wait.
        """
        asked = [self._actor.ask.remote(broken)]
        while not ray.wait(asked, timeout=_LOOK_S)[0]:
            meanwhile()
        ray.get(asked)

    def allow(
        self, workers: int, *, most: int | None = None, avoided: Collection[str] = ()
    ) -> None:
        """Lets the controller go on that asks.

        Args:
            workers: How many are to be started, if there is room for them.
            most: How many may be, whatever room there is; None for any number.
            avoided: Nodes that are to be left alone while others suffice.
        """
        ray.get(self._actor.allow.remote(workers, most, frozenset(avoided)))

    def avoided(self) -> frozenset[str]:
        """The nodes that are to be left alone while others suffice."""
        avoided: frozenset[str] = ray.get(self._actor.avoided.remote())
        return avoided

    def readmit(self) -> None:
        """Tells the driver that no node is avoided any more, for the others do not suffice."""
        ray.get(self._actor.readmit.remote())

    def wanted(self) -> int | None:
        """How many workers the driver wants to be started; None before it said so."""
        workers: int | None = ray.get(self._actor.wanted.remote())
        return workers

    def most(self) -> int | None:
        """How many workers may be started; None for any number."""
        most: int | None = ray.get(self._actor.most.remote())
        return most

    def admit(self, nodes: frozenset[str]) -> None:
        """Says to which nodes workers may go, and to no others."""
        ray.get(self._actor.admit.remote(nodes))

    def admitted(self) -> frozenset[str] | None:
        """The ids of the nodes to which workers may go; None for any."""
        nodes: frozenset[str] | None = ray.get(self._actor.admitted.remote())
        return nodes

    def tell_lacking(self, text: str) -> None:
        """Tells the driver, and does not wait, why workers cannot be started now."""
        self.sender(f"lacking {uuid.uuid4()}").send(Lacking(text))

    def sender(self, name: str) -> "Sender":
        """What one process sends its events by; no other has its name."""
        return Sender(self._actor, name)

    def report_line(self, text: str) -> None:
        """Sends a line for a person; unlike a sender's, notes may overtake each other."""
        self.sender(f"note {uuid.uuid4()}").send(Note(text))

    def inbox(self) -> "Inbox":
        """What the driver reads events by; there is one."""
        return Inbox(self._actor)

    def ask_to_stop(self, grace_s: float | None) -> None:
        """Asks all workers to stop, of this attempt and of any later, within that time."""
        ray.get(self._actor.ask_to_stop.remote(grace_s))

    def ask_to_leave(self, attempt: int, grace_s: float | None) -> None:
        """Asks the workers of one attempt to leave, all of them at their next common moment."""
        ray.get(self._actor.ask_to_leave.remote(attempt, grace_s))

    def hear(self, attempt: int, known: Request) -> Request:
        """Waits some seconds for another request than the known one, and gives what is wanted.

        Args:
            attempt: The worker's.
            known: What it heard last.

        Raises:
            ray.exceptions.GetTimeoutError: The mailbox is out of reach.
            ray.exceptions.RayError: It is gone, and the driver with it.
        """
        call = self._actor.hear.remote(attempt, known)
        heard: Request = ray.get(call, timeout=self._answer_s)
        return heard


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

    def send_last(
        self, event: Finished | Left | Failure, *, timeout_s: float | None = None
    ) -> None:
        """Sends the last event and waits until all it sent has arrived.

        Args:
            event: The event.
            timeout_s: How long it waits; None for ever.

        Raises:
            ray.exceptions.RayError: The mailbox is gone, or does not answer in time.
        """
        ray.get(self._put(event), timeout=timeout_s)

    def _put(self, event: Event) -> Any:
        return self._actor.put.remote(self._name, next(self._numbers), event)


class Inbox:
    """The driver's way to what has come in, in the order of arrival, each sender's in its own.

    A question lies at the mailbox all the time, which answers it with the next event: asking again
    and again would take time from workers that keep all cores busy.

    Args:
        actor: The handle of the mailbox's actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked: Any = None

    def fetch(self, wait_s: float) -> list[Event]:
        """Gives the events since the last call.

        Args:
            wait_s: How long it waits for the first.
        """
        if self._asked is None:
            self._asked = self._actor.fetch.remote(HEAR_S)
        answered, _ = ray.wait([self._asked], timeout=wait_s)
        return self._read() if answered else []

    def fetch_rest(self) -> list[Event]:
        """Gives the events since the last call, of which all that arrived before are some."""
        ray.get(self._actor.answer.remote())
        before = [] if self._asked is None else self._read()
        rest: list[Event] = ray.get(self._actor.fetch.remote(0.0))
        return before + rest

    def _read(self) -> list[Event]:
        asked, self._asked = self._asked, None
        events: list[Event] = ray.get(asked)
        return events


def open_mailbox(config: ClusterConfig) -> Mailbox:
    """Starts a mailbox on the driver's node, as long-lived as the driver's connection to Ray.

    Args:
        config: How many workers wait at it for requests, those of two attempts at a time.
    """
    here = ray.get_runtime_context().get_node_id()
    waiting = 2 * config.workers
    return Mailbox(
        ray.remote(Box)
        .options(
            num_cpus=0,
            max_concurrency=waiting + _MORE_CALLS,
            # Of each call, three processes would tell Ray's head, which keeps it for a dashboard.
            enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )


class Box:
    """The actor.

    Its calls are coroutines, so that any number of workers can wait for a request by one call
    each. Ray may run such calls in another order than they were made in, so each sender numbers
    its events, and what comes early waits for its turn.

    Args:
        hear_s: How long a call waits for a request.
    """

    def __init__(self, hear_s: float = HEAR_S) -> None:
        self._hear_s = hear_s
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._next: Counter[str] = Counter()
        self._early: dict[tuple[str, int], Event] = {}
        self._attempts = 0
        self._stop: Request | None = None
        self._leaving: dict[int, Request] = {}
        self._changed = asyncio.Event()
        self._allowed = asyncio.Event()
        self._wanted: int | None = None
        self._most: int | None = None
        self._avoided: frozenset[str] = frozenset()
        self._admitted: frozenset[str] | None = None

    async def begin(self, seats: tuple[Seat, ...]) -> int:
        """Opens an attempt, and gives its number."""
        attempt = self._attempts
        self._take(Started(attempt, seats))
        self._attempts += 1
        return attempt

    async def put(self, sender: str, number: int, event: Event) -> None:
        """Takes a sender's event of that number, from 0."""
        self._early[sender, number] = event
        while (turn := (sender, self._next[sender])) in self._early:
            self._take(self._early.pop(turn))
            self._next[sender] += 1

    async def fetch(self, wait_s: float) -> list[Event]:
        """Waits for the first event since the last call, but not for long, and gives all."""
        if not self._events:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), wait_s)
        events, self._events = self._events, []
        return events

    async def answer(self) -> None:
        """Has a call of `fetch` wait no longer."""
        self._arrived.set()

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def ask(self, broken: Broken) -> None:
        """Returns once the controller may go on."""
        self._allowed.clear()
        self._take(broken)
        await self._allowed.wait()

    async def allow(
        self, workers: int, most: int | None = None, avoided: frozenset[str] = frozenset()
    ) -> None:
        """Lets the controller go on, to start so many workers."""
        self._wanted, self._most, self._avoided = workers, most, avoided
        self._allowed.set()

    async def avoided(self) -> frozenset[str]:
        """Gives the nodes that are to be left alone."""
        return self._avoided

    async def readmit(self) -> None:
        """Leaves no node alone any more."""
        self._avoided = frozenset()
        self._take(Readmitted())

    async def wanted(self) -> int | None:
        """Gives how many workers are to be started."""
        return self._wanted

    async def most(self) -> int | None:
        """Gives how many workers may be started."""
        return self._most

    async def admit(self, nodes: frozenset[str]) -> None:
        """Has workers go to these nodes only."""
        self._admitted = nodes

    async def admitted(self) -> frozenset[str] | None:
        """Gives the nodes to which workers may go."""
        return self._admitted

    async def ask_to_stop(self, grace_s: float | None) -> None:
        """Wants all workers to stop, whatever it wanted before."""
        self._stop = Request("stop", grace_s)
        self._tell_change()

    async def ask_to_leave(self, attempt: int, grace_s: float | None) -> None:
        """Wants the workers of an attempt to leave."""
        self._leaving[attempt] = Request("leave", grace_s)
        self._tell_change()

    async def hear(self, attempt: int, known: Request) -> Request:
        """Waits for another request than the known one, but not for long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait_for_other(attempt, known), self._hear_s)
        return self._request(attempt)

    async def _wait_for_other(self, attempt: int, known: Request) -> None:
        while self._request(attempt) == known:
            await self._changed.wait()

    def _request(self, attempt: int) -> Request:
        return self._stop or self._leaving.get(attempt, GO)

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
