"""Ranks as threads of one process, with the messages that gloo would carry between them counted.

What is reduced goes around the ring of ranks twice, a broadcast down a tree, and what is gathered
straight to the first rank: of n ranks that is 2 (n - 1), n - 1 and n - 1 messages. So gloo was seen
to do it, by the packets of up to 128 ranks on loopback (docs/log.md).
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

Result = TypeVar("Result")
_NUMBER_BYTES = 8
"""Of a length, or of a value that is agreed on."""


class RankEnded(RuntimeError):
    """Another rank ended while this one waited for it."""


@dataclass
class Traffic:
    """Messages and their bytes.

    Attributes:
        messages: Between all ranks.
        bytes: In them.
        first_messages: Those of them that come to the first rank.
        first_bytes: In these.
    """

    messages: int = 0
    bytes: int = 0
    first_messages: int = 0
    first_bytes: int = 0


@dataclass
class _Round:
    given: dict[int, bytes] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)


class PlayedGroup:
    """What the ranks meet in.

    Args:
        size: How many they are.

    Attributes:
        traffic: What they have sent.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.traffic = Traffic()
        self._rounds: defaultdict[tuple[str, int], _Round] = defaultdict(_Round)
        self._lock = threading.Lock()
        self._has_ended = False

    def meet(self, channel: str, number: int, rank: int, data: bytes) -> dict[int, bytes]:
        """Give data and return what all ranks gave, once they have."""
        with self._lock:
            taken = self._rounds[channel, number]
            taken.given[rank] = data
            if len(taken.given) == self.size or self._has_ended:
                taken.is_over.set()
        taken.is_over.wait()
        if len(taken.given) < self.size:
            raise RankEnded
        return taken.given

    def end(self) -> None:
        """Let nobody wait any more, for a rank failed."""
        with self._lock:
            self._has_ended = True
            for each in self._rounds.values():
                each.is_over.set()

    def count(
        self, *, around: int = 0, down: Sequence[int] = (), to_first: Sequence[int] = ()
    ) -> None:
        """Count what one call sends, on behalf of all ranks.

        Args:
            around: Bytes of what goes around the ring twice.
            down: Bytes of each broadcast by the first rank.
            to_first: Bytes of each message to it.
        """
        others, traffic = self.size - 1, self.traffic
        rings = 2 if around and others else 0
        with self._lock:  # the first rank has two threads
            traffic.messages += (rings + len(down)) * others + len(to_first)
            traffic.bytes += (rings * around + sum(down)) * others + sum(to_first)
            traffic.first_messages += rings + len(to_first)
            traffic.first_bytes += rings * around + sum(to_first)


class PlayedRanks:
    """What one of them agrees with the others over, in the place of `HostGroup`.

    Args:
        group: Where they meet.
        rank: Which it is.
        channel: What this is for; `aside` is for threads that upload.
    """

    def __init__(self, group: PlayedGroup, rank: int, channel: str = "ranks") -> None:
        self._group = group
        self._channel = channel
        self._numbers = itertools.count()
        self.rank = rank
        self.world_size = group.size

    @cached_property
    def aside(self) -> "PlayedRanks":
        """The same for threads that upload."""
        return PlayedRanks(self._group, self.rank, "aside")

    def reduce_min(self, value: int) -> int:
        """Return the least of all ranks' values."""
        given = self._meet(str(value).encode())
        if self.rank == 0:
            told = [_NUMBER_BYTES] * (self.world_size - 1)
            self._group.count(down=[_NUMBER_BYTES], to_first=told)
        return min(map(int, set(given.values())))

    def broadcast(self, data: bytes, *, source: int) -> bytes:
        """Return what rank `source` gives."""
        heard = self._meet(data if self.rank == source else b"")[source]
        if self.rank == 0:
            self._group.count(down=[_NUMBER_BYTES, *filter(None, [len(heard)])])
        return heard

    def gather(self, data: bytes) -> list[bytes]:
        """Return every rank's data on the first rank, and nothing on the others."""
        given = self._meet(data)
        if self.rank > 0:
            return []
        collected = [given[rank] for rank in range(self.world_size)]
        others = list(map(len, collected[1:]))
        self._group.count(to_first=[*[_NUMBER_BYTES] * len(others), *filter(None, others)])
        return collected

    def _meet(self, data: bytes) -> dict[int, bytes]:
        return self._group.meet(self._channel, next(self._numbers), self.rank, data)


def play(group: PlayedGroup, act: Callable[[PlayedRanks], Result]) -> list[Result]:
    """Run `act` in a thread for each rank; return what each returned.

    Raises:
        Exception: What a rank failed with first.
    """
    outcomes: dict[int, Any] = {}
    failures: list[BaseException] = []

    def act_as(rank: int) -> None:
        try:
            outcomes[rank] = act(PlayedRanks(group, rank))
        except BaseException as error:
            failures.append(error)
            group.end()

    threads = [threading.Thread(target=act_as, args=(rank,)) for rank in range(group.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [outcomes[rank] for rank in range(group.size)]
