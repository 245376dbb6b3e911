"""A process that saves to S3 is killed at every request that it makes, and half-way through it."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
from boto3.s3.transfer import TransferConfig

from tests.support.remote_store import (
    Moment,
    RemoteStore,
    die_at_request,
    in_forks,
    load_state,
    save_state,
)
from tests.unit.trainer.checkpoint.worlds import KINDS, RUN, State, random_state, same_bits
from trainer.checkpoint import layout
from trainer.storage import s3
from trainer.storage.store import Store

pytestmark = pytest.mark.slow

MOMENTS: tuple[Moment, ...] = ("unsent", "half sent")
SMALLEST_PART = 5 * 1024**2  # of S3


@dataclass(frozen=True)
class World:
    """Two ranks, of which the first one's object travels in two parts, the second one's in one."""

    remote: RemoteStore
    part_bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"large.weight": (self.part_bytes // 4 // len(KINDS) + 1000,), "gain": (5,)}

    @cached_property
    def store(self) -> Store:
        """Of the process that survives."""
        return self.remote.direct()

    @cached_property
    def unused(self) -> Store:
        """For the processes that die: forks must not share connections."""
        return self.remote.direct()

    def state(self, images: int) -> State:
        return random_state(images, self.shapes)

    def save(self, images: int, store: Store) -> None:
        outcomes = save_state(
            store,
            self.state(images),
            images=images,
            cuts=self.shapes["large.weight"],
            shapes=self.shapes,
            keep_last=1,
        )
        assert outcomes == [self.store.uri(layout.checkpoint_key(RUN, images))] * 2

    def save_and_die(self, images: int, number: int, moment: Moment) -> None:
        die_at_request(number, moment)
        self.save(images, self.unused)

    def resumes_from(self) -> int:
        """The position of a checkpoint that gives the bits that were saved, and no others."""
        found = load_state(self.store, shapes=self.shapes)
        assert found
        images, state, _ = found
        assert same_bits(state, self.state(images))
        return images

    def positions(self) -> tuple[set[int | None], set[int | None]]:
        """Where there are objects, and where there are parts that are none."""
        names = (self.store.list(""), self.remote.unfinished())
        objects, parts = ({layout.images_of(RUN, name) for name in each} for each in names)
        return objects, parts


def committed_after_kills(world: World, cases: Iterable[tuple[int, Moment]]) -> list[bool]:
    """Kills saves at requests by number, until one comes to its end before.

    Returns:
        For each whether its checkpoint came to exist.
    """
    old, found, parts_met = 10, [], False
    assert world.unused
    world.save(old, world.store)
    for number, moment in cases:
        if moment == "half sent" and True in found:
            continue  # after the commit no request has a body
        new = old + 10
        (code,) = in_forks(partial(world.save_and_die, new, number, moment))
        case = f"killed at request {number}, {moment}"
        assert code in (0, -signal.SIGKILL), case
        images = world.resumes_from()
        assert images in (old, new), case
        old = new
        if code == 0:
            assert images == new
            break
        found.append(images == new)
        parts_met |= world.positions()[1] == {new}
        # The run goes on and comes by here again. Of what died before now nothing is left.
        world.save(new, world.store)
        objects, parts = world.positions()
        assert objects == {new}, case
        assert parts <= {new}, case
    world.save(old + 10, world.store)  # and what the last ones left is gone as well
    assert world.resumes_from() == old + 10
    assert len(world.store.list("")) == 3
    assert world.remote.unfinished() == []
    assert parts_met
    return found


def test_a_kill_at_any_request_leaves_the_old_or_the_new_checkpoint(
    remote: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = TransferConfig(multipart_threshold=SMALLEST_PART, multipart_chunksize=SMALLEST_PART)
    monkeypatch.setattr(s3, "TRANSFER", parts)
    every = ((number, moment) for number in itertools.count(1) for moment in MOMENTS)
    found = committed_after_kills(World(remote, SMALLEST_PART), every)
    # Each phase was met: the upload, the commit, and what comes after it.
    assert found == sorted(found)
    assert found.count(False) >= 12
    assert found.count(True) >= 6


def test_kills_in_the_midst_of_parts_as_large_as_they_are(remote: RemoteStore) -> None:
    cases: list[tuple[int, Moment]] = [(3, "half sent"), (4, "half sent"), (5, "unsent")]
    world = World(remote, s3.TRANSFER.multipart_threshold)
    assert committed_after_kills(world, cases) == [False] * len(cases)
