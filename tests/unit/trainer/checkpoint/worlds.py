"""Small worlds for checkpoint tests: model states, their splits over ranks, ranks as threads."""

from __future__ import annotations

import itertools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.checkpoint import layout
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.upload import SaveReport
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.store import Store

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
SHAPES = {"embed.weight": (5, 7), "scales.0.bias": (3,), "scales.1.weight": (2, 3, 4), "gain": ()}
# Negative zero, the least positive number and its negative, the largest number, one off 1.
DELICATE = (-(2**31), 1, -(2**31) + 1, 0x7F7FFFFF, 0x3F800001)
SCIENCE = {"science": {"flow": {"scales": 2}}, "config_fingerprint": "a1b2"}
RUN = "night-1"
MAX_FALLBACKS = 10

State = dict[str, dict[str, Tensor]]
"""Flat tensors by kind and parameter."""
Result = TypeVar("Result")


def random_state(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> State:
    """Random bits of finite numbers, in larger parameters also what arithmetic might lose."""
    generator = torch.Generator().manual_seed(seed)

    def values(numel: int) -> Tensor:
        bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int32)
        bits[~bits.view(torch.float32).isfinite()] &= 0x007FFFFF  # not finite: all ones there
        if numel > 2 * len(DELICATE):
            bits[: len(DELICATE)] = torch.tensor(DELICATE, dtype=torch.int32)
        return bits.view(torch.float32)

    return {
        kind: {name: values(math.prod(shape)) for name, shape in shapes.items()} for kind in KINDS
    }


def empty_state(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> State:
    return {
        kind: {name: torch.zeros(math.prod(shape)) for name, shape in shapes.items()}
        for kind in KINDS
    }


def same_bits(one: State, other: State) -> bool:
    return all(
        torch.equal(one[kind][name].view(torch.int32), other[kind][name].view(torch.int32))
        for kind in KINDS
        for name in one[kind]
    )


def even_cuts(world: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[int]:
    """Where ZeRO cuts the concatenation of all parameters."""
    total = sum(map(math.prod, shapes.values()))
    return [min(total, rank * -(-total // world)) for rank in range(1, world)]


def split(
    state: State, cuts: Sequence[int], shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> list[list[Fragment]]:
    """The fragments of each rank when the concatenation of all parameters is cut there."""
    bounds = [0, *cuts, sum(map(math.prod, shapes.values()))]
    ranks = []
    for low, high in itertools.pairwise(bounds):
        fragments = []
        offset = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            start, stop = max(low - offset, 0), min(high - offset, numel)
            if start < stop:
                views = {kind: state[kind][name][start:stop] for kind in KINDS}
                fragments.append(Fragment(name=name, start=start, shape=shape, tensors=views))
            offset += numel
        ranks.append(fragments)
    return ranks


class RankEnded(Exception):
    """Another rank ended while this one waited for it: what a process group reports."""


class ThreadGroup:
    """A process group of threads: exchanges in rounds, and ends for all when one rank ends."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._rounds: defaultdict[tuple[str, int], dict[int, bytes]] = defaultdict(dict)
        self._ended = False
        self._changed = threading.Condition()

    def round(self, channel: str, number: int, rank: int, data: bytes) -> list[bytes]:
        """Exchange what every rank gives in one round of one channel."""
        round_ = self._rounds[channel, number]
        with self._changed:
            round_[rank] = data
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or len(round_) == self.world)
        if len(round_) < self.world:
            raise RankEnded
        return [round_[each] for each in range(self.world)]

    def end(self) -> None:
        """Called by a rank that ends early."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class ThreadRanks:
    """What one rank agrees with the others over, and `aside`, what its upload threads do.

    Attributes:
        received: Bytes that each call brought to this rank.
    """

    def __init__(self, group: ThreadGroup, rank: int, channel: str = "ranks") -> None:
        self._group = group
        self._channel = channel
        self._rounds = itertools.count()
        self.rank = rank
        self.world_size = group.world
        self.received: list[int] = []

    @cached_property
    def aside(self) -> ThreadRanks:
        return ThreadRanks(self._group, self.rank, "threads")

    def reduce_min(self, value: int) -> int:
        self.received.append(8)
        return min(map(int, self._round(str(value).encode())))

    def broadcast(self, data: bytes, *, source: int) -> bytes:
        heard = self._round(data if self.rank == source else b"")[source]
        self.received.append(len(heard))
        return heard

    def gather(self, data: bytes) -> list[bytes]:
        collected = self._round(data) if self.rank == 0 else self._round(data)[:0]
        self.received.append(sum(map(len, collected)))
        return collected

    def _round(self, data: bytes) -> list[bytes]:
        return self._group.round(self._channel, next(self._rounds), self.rank, data)


def on_ranks(world: int, act: Callable[[int, ThreadRanks], Result]) -> list[Result | BaseException]:
    """Runs `act(rank, ranks)` in a thread per rank.

    Returns:
        What each rank returned, or what it ended with.
    """
    group = ThreadGroup(world)
    outcomes: list[Any] = [None] * world

    def rank_main(rank: int) -> None:
        try:
            outcomes[rank] = act(rank, ThreadRanks(group, rank))
        except BaseException as error:
            outcomes[rank] = error
            group.end()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


class NotSaved(Exception):
    """A save ended without a checkpoint; the first rank knows why."""


class Savings:
    """A saver, and how each of its saves ended.

    Args:
        store: Where it saves to.
        ranks: What its rank agrees with the others over; a single rank needs none.
        index: The run's checkpoints, if a reader has looked at them.
        stop_requested: Tells that the run was asked to stop.
        fence: Raises before a commit if the run is another's.
        in_use: Checkpoints that somebody reads.
        changes: Settings other than two checkpoints to keep and no patience.
    """

    def __init__(
        self,
        store: Store,
        *,
        ranks: ThreadRanks | None = None,
        index: CheckpointIndex | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        fence: Callable[[], object] = lambda: None,
        in_use: Callable[[], Collection[int]] = tuple,
        **changes: Any,
    ) -> None:
        self.reports: list[SaveReport] = []
        self.late = threading.Semaphore(0)
        self.saver = CheckpointSaver(
            store,
            index=index or CheckpointIndex(store, run=RUN),
            config=CheckpointConfig(**{"keep_last": 2, "patience_s": 0.0, **changes}),
            ranks=ranks or HostGroup(alone=True),
            aside=ranks.aside if ranks else HostGroup(alone=True),
            report=self._keep,
            stop_requested=stop_requested,
            fence=fence,
            in_use=in_use,
        )

    def _keep(self, report: SaveReport) -> None:
        again = any(report.images == before.images for before in self.reports)
        self.reports.append(report)
        if again:
            self.late.release()

    def save(self, *, images: int, **settings: Any) -> str:
        """Save and wait for the end.

        Returns:
            The checkpoint's address.
        """
        self.saver.save(images=images, **settings)
        self.saver.finish()
        if not self.saver.is_saved(images):
            raise NotSaved(*[report.error for report in self.reports[-1:]])
        return self.saver.uri(images)


def save(
    store: Store,
    state: State,
    *,
    images: int,
    world: int = 1,
    keep_last: int = 2,
    science: Mapping[str, Any] = SCIENCE,
) -> list[str | BaseException]:
    """Saves a state by that many ranks; its train state holds `images`."""
    fragments = split(state, even_cuts(world))

    def act(rank: int, ranks: ThreadRanks) -> str:
        savings = Savings(store, ranks=ranks, keep_last=keep_last)
        return savings.save(
            images=images, fragments=fragments[rank], train_state={"images": images}, **science
        )

    return on_ranks(world, act)


def load_newest(store: Store, *, world: int = 1) -> tuple[int, State] | None:
    """What a run that starts on this store resumes from, with fall-back past damaged ones."""
    state = empty_state()
    fragments = split(state, even_cuts(world))

    def act(rank: int, ranks: ThreadRanks) -> int | None:
        mine = CheckpointReader(store, run=RUN, ranks=ranks)
        for _ in range(MAX_FALLBACKS):
            manifest = mine.newest_valid()
            if manifest is None:
                return None
            try:
                counters = mine.restore(manifest, fragments[rank])
                assert counters.get("images", manifest.images) == manifest.images
                return manifest.images
            except DamagedCheckpoint:
                continue
        raise AssertionError("a damaged checkpoint is offered again and again")

    outcomes = on_ranks(world, act)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    assert len(set(outcomes)) == 1
    images = outcomes[0]
    return None if images is None else (images, state)


def manifest_keys(store: Store) -> list[str]:
    return [key for key in store.list("") if key.endswith(layout.MANIFEST_NAME)]


def contents(store: Store, images: int) -> list[str]:
    keys = store.list(layout.checkpoint_key(RUN, images) + "/")
    return [key for key in keys if key.endswith(".safetensors")]


def replace_object(store: Store, key: str, data: bytes) -> None:
    store.delete(key)
    store.put(key, data)


def flip_middle_bit(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    replace_object(store, key, bytes(data))
