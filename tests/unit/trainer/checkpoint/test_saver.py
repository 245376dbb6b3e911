"""Saving: whole or not at all, by any number of ranks, one of several writers; and bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.checkpoint.worlds import (
    KINDS,
    RUN,
    SCIENCE,
    SHAPES,
    NotSaved,
    Savings,
    State,
    ThreadRanks,
    contents,
    empty_state,
    even_cuts,
    flip_middle_bit,
    load_newest,
    manifest_keys,
    on_ranks,
    random_state,
    same_bits,
    save,
    split,
)
from trainer.checkpoint import layout
from trainer.checkpoint.errors import (
    CheckpointConflict,
    CheckpointMismatch,
    DamagedCheckpoint,
    InvalidManifest,
    RankFailed,
)
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT
from trainer.checkpoint.reader import CheckpointReader
from trainer.state import Fragment
from trainer.storage.errors import StoreError
from trainer.storage.store import Store

QUICK = settings(max_examples=40, deadline=None)
TOTAL = sum(map(math.prod, SHAPES.values()))


def test_a_state_comes_back_bit_for_bit(store: Store) -> None:
    state = random_state(0)
    uris = save(store, state, images=64, world=3)
    assert uris == [store.uri(f"{RUN}/checkpoints/000000000064")] * 3
    images, loaded = load_newest(store, world=3) or (None, empty_state())
    assert images == 64
    assert same_bits(loaded, state)


def test_another_number_of_ranks_goes_on_from_it(store: Store) -> None:
    state = random_state(1)
    save(store, state, images=64, world=3)
    for world in (1, 2, 5):
        _, loaded = load_newest(store, world=world) or (None, empty_state())
        assert same_bits(loaded, state)


@pytest.mark.slow
@QUICK
@given(st.data(), st.integers(0, 2**31))
def test_any_split_restores_any_other(data: st.DataObject, seed: int) -> None:
    shapes = {
        f"p{index}": tuple(shape)
        for index, shape in enumerate(
            data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
        )
    }
    total = sum(map(math.prod, shapes.values()))
    if total == 0:
        return
    cuts = st.lists(st.integers(0, total), max_size=4).map(sorted)
    state, target, store = random_state(seed, shapes), empty_state(shapes), MemoryStore()
    before = split(state, data.draw(cuts), shapes)
    after = split(target, data.draw(cuts), shapes)
    # Some ranks hold replicas of what others hold, as data-parallel groups do.
    before += [before[n] for n in data.draw(st.lists(st.integers(0, len(before) - 1), max_size=2))]

    def save_rank(rank: int, ranks: ThreadRanks) -> str:
        mine = Savings(store, ranks=ranks)
        return mine.save(images=8, fragments=before[rank], train_state={}, **SCIENCE)

    assert len(set(on_ranks(len(before), save_rank))) == 1
    reader = CheckpointReader(store, run=RUN)
    manifest = reader.newest_valid()
    assert manifest is not None
    assert manifest.world_size == len(before)

    def restore_rank(rank: int, ranks: ThreadRanks) -> dict[str, object]:
        mine = CheckpointReader(store, run=RUN, ranks=ranks)
        return mine.restore(manifest, after[rank])

    assert on_ranks(len(after), restore_rank) == [{}] * len(after)
    assert same_bits(target, state)
    # Nothing was written twice.
    written = sum(map(manifest.content_bytes, manifest.objects))
    assert written == total * len(KINDS) * BYTES_PER_ELEMENT


def test_the_manifest_says_what_was_saved() -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64, world=2)
    manifest = CheckpointReader(store, run=RUN).manifest(64)
    assert manifest is not None
    assert manifest.science == SCIENCE["science"]
    assert manifest.config_fingerprint == SCIENCE["config_fingerprint"]
    assert manifest.kinds == tuple(sorted(KINDS))
    assert manifest.parameters == SHAPES
    assert manifest.world_size == 2
    assert "torch" in manifest.versions
    assert CheckpointReader(store, run=RUN).manifest(63) is None


def test_saving_does_not_change_the_live_state() -> None:
    state, twin = random_state(4), random_state(4)
    save(MemoryStore(), state, images=1, world=2)
    assert same_bits(state, twin)


def test_a_process_knows_what_it_saved_or_restored() -> None:
    mine = Savings(MemoryStore())
    fragments = split(random_state(0), [])[0]
    assert not mine.saver.is_saved(64)
    mine.save(images=64, fragments=fragments, train_state={}, **SCIENCE)
    assert mine.saver.is_saved(64)
    assert not mine.saver.is_saved(65)


def save_each(store: Store, parts: list[list[Fragment]], **changes: object) -> list[object]:
    def act(rank: int, ranks: ThreadRanks) -> str:
        mine = Savings(store, ranks=ranks)
        settings = {"images": 64, "train_state": {}, **SCIENCE}
        settings.update({name: each[rank] for name, each in changes.items()})  # type: ignore[index]
        return mine.save(fragments=parts[rank], **settings)

    return on_ranks(len(parts), act)


def test_ranks_that_do_not_fit_together_save_nothing() -> None:
    store = MemoryStore()
    ranks = split(random_state(0), even_cuts(2))
    gap = [ranks[0], ranks[1][1:]]
    twice = [ranks[0], [*ranks[1], ranks[1][0]]]
    kinds = [
        ranks[0],
        [dataclasses.replace(each, tensors={"ema": each.tensors["ema"]}) for each in ranks[1]],
    ]
    shapes = [
        ranks[0],
        [dataclasses.replace(each, shape=(1000, *each.shape)) for each in ranks[1]],
    ]
    attempts = [
        save_each(store, gap),
        save_each(store, twice),
        save_each(store, kinds),
        save_each(store, shapes),
        save_each(store, [[], []]),
        save_each(store, ranks, images=[64, 65]),
        save_each(store, ranks, config_fingerprint=["a", "b"]),
    ]
    for outcomes in attempts:
        assert [type(outcome) for outcome in outcomes] == [CheckpointMismatch] * 2
        assert len({str(outcome) for outcome in outcomes}) == 1
    assert store.objects == {}


def test_a_train_state_json_cannot_hold_is_refused_by_all_ranks() -> None:
    store = MemoryStore()
    ranks = split(random_state(0), even_cuts(2))
    outcomes = save_each(store, ranks, train_state=[{"loss": math.nan}, {}])
    assert [type(outcome) for outcome in outcomes] == [InvalidManifest] * 2
    assert manifest_keys(store) == []


class FullOnRankOne(MemoryStore):
    """The disk of rank 1 is full."""

    error: Exception = StoreError("Cannot write: the disk is full; free space.")

    def put(self, key: str, data: bytes | memoryview) -> None:
        if key.endswith("rank-00001.safetensors"):
            raise self.error
        super().put(key, data)


def test_a_full_disk_on_one_rank_fails_the_save_on_all() -> None:
    store = FullOnRankOne()
    save(store, random_state(0), images=64, world=1)
    outcomes = save(store, random_state(1), images=128, world=3)
    assert [type(outcome) for outcome in outcomes] == [NotSaved] * 3
    assert str(outcomes[0]) == str(store.error)
    # What the others wrote is gone again: it might be what fills the disk.
    assert contents(store, 128) == []
    assert (load_newest(store) or [None])[0] == 64


def test_an_unforeseen_error_on_one_rank_fails_the_save_on_all() -> None:
    store = FullOnRankOne()
    store.error = MemoryError("host memory")
    outcomes = save(store, random_state(1), images=128, world=3)
    assert [type(outcome) for outcome in outcomes] == [RankFailed] * 3
    assert str(outcomes[0]) == "Rank 1 failed with MemoryError: host memory"


def test_two_writers_of_one_checkpoint_end_with_one() -> None:
    store = MemoryStore()
    states: list[State] = [random_state(n) for n in range(4)]
    outcomes = on_ranks(4, lambda rank, _: save(store, states[rank], images=64, keep_last=1)[0])
    assert len(set(outcomes)) == 1
    assert len(manifest_keys(store)) == 1
    _, loaded = load_newest(store) or (None, empty_state())
    assert any(same_bits(loaded, state) for state in states)
    assert len(store.objects) == 2  # what the losers wrote is gone


def test_a_checkpoint_of_another_configuration_is_not_taken_for_ours() -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64)
    outcomes = save(
        store,
        random_state(1),
        images=64,
        world=2,
        science={**SCIENCE, "config_fingerprint": "other"},
    )
    assert [type(outcome) for outcome in outcomes] == [CheckpointConflict] * 2
    assert "choose another run name" in str(outcomes[0])
    _, loaded = load_newest(store) or (None, empty_state())
    assert same_bits(loaded, random_state(0))


def test_a_checkpoint_in_a_newer_format_is_not_overwritten() -> None:
    store = MemoryStore()
    key = layout.manifest_key(RUN, 64)
    newer = json.dumps({"format_version": 99}).encode()
    store.put(key, newer)
    outcomes = save(store, random_state(0), images=64)
    assert [type(outcome) for outcome in outcomes] == [CheckpointConflict]
    assert store.get(key) == newer


@pytest.mark.parametrize("what", ["content", "manifest"])
def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(what: str) -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64)
    flip = contents(store, 64)[0] if what == "content" else manifest_keys(store)[0]
    flip_middle_bit(store, flip)
    fragments = split(empty_state(), [])[0]
    reader = CheckpointReader(store, run=RUN)
    if what == "content":
        manifest = reader.newest_valid()
        assert manifest is not None
        with pytest.raises(DamagedCheckpoint):
            reader.restore(manifest, fragments)
    assert reader.newest_valid() is None
    again = split(random_state(1), [])[0]
    Savings(store, index=reader.index).save(
        images=64, fragments=again, train_state={"images": 64}, **SCIENCE
    )
    _, loaded = load_newest(store) or (None, empty_state())
    assert same_bits(loaded, random_state(1))


def test_retention_keeps_the_last_and_deletes_all_of_the_others() -> None:
    store = MemoryStore()
    for images in range(10, 60, 10):
        save(store, random_state(images), images=images, world=2, keep_last=2)
    assert {layout.images_of(RUN, key) for key in store.objects} == {40, 50}
    assert len(store.objects) == 2 * (1 + 2)


def test_a_damaged_checkpoint_between_kept_ones_stays_for_somebody_to_look_at() -> None:
    store = MemoryStore()
    for images in (10, 20):
        save(store, random_state(images), images=images, world=2)
    store.delete(contents(store, 20)[0])
    left = store.list(layout.checkpoint_key(RUN, 20))
    save(store, random_state(30), images=30, world=2, keep_last=2)
    assert store.list(layout.checkpoint_key(RUN, 20)) == left
    save(store, random_state(40), images=40, world=2, keep_last=2)
    assert {layout.images_of(RUN, key) for key in store.objects} == {30, 40}


def test_a_commit_whose_answer_was_lost_and_repeated_is_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Repeating(MemoryStore):
        def create(self, key: str, data: bytes) -> bool:
            super().create(key, data)
            return super().create(key, data)

    store = Repeating()
    uris = save(store, random_state(0), images=64)
    assert uris == [store.uri(layout.checkpoint_key(RUN, 64))]
    assert "another process" not in caplog.text


def test_a_failing_retention_does_not_fail_the_save(caplog: pytest.LogCaptureFixture) -> None:
    class Undeletable(MemoryStore):
        def delete(self, key: str) -> None:
            raise StoreError(f"Cannot delete {key}: refused.")

    store = Undeletable()
    for images in (10, 20, 30):
        (uri,) = save(store, random_state(images), images=images, keep_last=1)
        assert isinstance(uri, str)
    assert (load_newest(store) or [None])[0] == 30
    assert "old checkpoints" in caplog.text
