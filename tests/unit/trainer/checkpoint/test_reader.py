"""Finding and restoring: past what is damaged, only what is needed, and of this model alone."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from tests.unit.trainer.checkpoint.stores import MemoryStore, count_operations
from tests.unit.trainer.checkpoint.worlds import (
    KINDS,
    RUN,
    SHAPES,
    contents,
    empty_state,
    even_cuts,
    flip_middle_bit,
    load_newest,
    manifest_keys,
    on_ranks,
    random_state,
    replace_object,
    same_bits,
    save,
    split,
)
from trainer.checkpoint.content import fill, load_weights
from trainer.checkpoint.errors import CheckpointMismatch
from trainer.checkpoint.reader import CheckpointReader
from trainer.state import Fragment
from trainer.storage.errors import StoreUnreachable
from trainer.storage.store import Store

QUICK = settings(max_examples=40, deadline=None)
TOTAL = sum(map(math.prod, SHAPES.values()))


def test_a_rank_reads_only_what_it_needs() -> None:
    store, state = MemoryStore(), random_state(2)
    save(store, state, images=64, world=4)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    for world, expected in ((4, 1), (2, 2), (1, 4)):
        mine = split(empty_state(), even_cuts(world))[0]
        reads = count_operations(store, lambda watched: fill(watched, manifest, mine))  # noqa: B023
        assert reads == ["get_range"] * expected


def test_whole_weights_are_read_for_sampling(store: Store) -> None:
    state = random_state(3)
    save(store, state, images=64, world=2)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    for which in ("ema", "master"):
        weights = load_weights(store, manifest, which)
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
        for name, tensor in weights.items():
            flat = tensor.reshape(-1).view(torch.int32)
            assert torch.equal(flat, state[which][name].view(torch.int32))


def test_there_is_nothing_to_resume_in_an_empty_store(store_at_hand: Store) -> None:
    assert CheckpointReader(store_at_hand, run=RUN).newest_valid() is None


def test_runs_do_not_see_each_other() -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64)
    for other in ("night", "night-10", "night-1x"):
        assert CheckpointReader(store, run=other).newest_valid() is None


def test_newest_valid_before_a_position() -> None:
    store = MemoryStore()
    for images in (10, 20):
        save(store, random_state(images), images=images)
    reader = CheckpointReader(store, run=RUN)
    found = [reader.newest_valid(before=before) for before in (21, 20, 10)]
    assert [manifest and manifest.images for manifest in found] == [20, 10, None]


DAMAGE: dict[str, Callable[[Store, str], None]] = {
    "flipped bit": flip_middle_bit,
    "truncated": lambda store, key: replace_object(store, key, store.get(key)[:-7]),
    "empty": lambda store, key: replace_object(store, key, b""),
    "missing": lambda store, key: store.delete(key),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("what", ["content", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(
    store_at_hand: Store,
    damage: Callable[[Store, str], None],
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = store_at_hand
    old, new = random_state(5), random_state(6)
    save(store, old, images=64, world=2)
    save(store, new, images=128, world=2)
    bad = contents(store, 128)[1] if what == "content" else manifest_keys(store)[-1]
    damage(store, bad)
    with caplog.at_level(logging.WARNING):
        images, loaded = load_newest(store, world=2) or (None, empty_state())
    assert images == 64
    assert same_bits(loaded, old)
    if (what, damage) != ("manifest", DAMAGE["missing"]):
        # Without a manifest it never was a checkpoint; otherwise somebody should know.
        assert "000000000128" in caplog.text


def test_a_truncated_object_shows_without_reading_it() -> None:
    store = MemoryStore()
    for images in (64, 128):
        save(store, random_state(images), images=images)
    DAMAGE["truncated"](store, contents(store, 128)[0])
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    assert manifest.images == 64


def test_an_object_of_another_checkpoint_is_noticed() -> None:
    store = MemoryStore()
    save(store, random_state(7), images=64, world=2)
    save(store, random_state(8), images=128, world=2)
    store.objects[contents(store, 128)[0]] = store.objects[contents(store, 64)[0]]
    images, _ = load_newest(store) or (None, None)
    assert images == 64


def test_all_damaged_is_nothing_to_resume() -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64)
    store.delete(contents(store, 64)[0])
    assert load_newest(store) is None


def test_an_unreachable_store_is_no_reason_to_start_anew() -> None:
    class Gone(MemoryStore):
        def get(self, key: str) -> bytes:
            raise StoreUnreachable("gone")

    store = Gone()
    save(store, random_state(0), images=64)
    outcomes = on_ranks(
        2,
        lambda _, ranks: CheckpointReader(store, run=RUN, ranks=ranks).newest_valid(),
    )
    assert [type(outcome) for outcome in outcomes] == [StoreUnreachable] * 2


def mutated(
    fragments: list[Fragment], change: Callable[[Fragment], Fragment | None]
) -> list[Fragment]:
    return [new for new in map(change, fragments) if new is not None]


MISFITS: dict[str, tuple[Callable[[Fragment], Fragment | None], str]] = {
    "parameter the model lacks": (
        lambda each: None if each.name == "gain" else each,
        "1 parameters that the model lacks, such as gain",
    ),
    "parameter the checkpoint lacks": (
        lambda each: dataclasses.replace(each, name=each.name.replace("gain", "bias")),
        "has a parameter bias that the checkpoint",
    ),
    "other shape": (
        lambda each: dataclasses.replace(each, shape=tuple(reversed(each.shape))),
        "embed.weight has shape",
    ),
    "kind the engine lacks": (
        lambda each: dataclasses.replace(
            each, tensors={kind: each.tensors[kind] for kind in KINDS if kind != "ema"}
        ),
        "also holds ema of",
    ),
    "kind the checkpoint lacks": (
        lambda each: dataclasses.replace(
            each, tensors={**each.tensors, "momentum": torch.zeros(each.numel)}
        ),
        "but no momentum",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_another_model_is_refused_by_all_ranks_before_anything_is_read(
    change: Callable[[Fragment], Fragment | None], message: str
) -> None:
    store = MemoryStore()
    save(store, random_state(0), images=64)
    state = random_state(9)
    parts = [mutated(each, change) for each in split(state, even_cuts(2))]
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest is not None
    outcomes = on_ranks(
        2,
        lambda rank, ranks: CheckpointReader(store, run=RUN, ranks=ranks).restore(
            manifest, parts[rank]
        ),
    )
    assert [type(outcome) for outcome in outcomes] == [CheckpointMismatch] * 2
    assert message in str(outcomes[0])
    assert same_bits(state, random_state(9))
