"""Streams in one: exact fractions, each sample once in its stream's epoch, pure resumption."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.domains import SettingError
from pipelines.errors import DataError
from pipelines.order import ConcatenatedDataset, MixedOrder, StreamConfig, Turns
from tests.support.synthetic import SyntheticImages

QUICK = settings(max_examples=25, deadline=None)
SIZES = st.lists(st.lists(st.integers(8, 40), min_size=1, max_size=3), min_size=1, max_size=4)
WEIGHTS = st.lists(st.floats(0.5, 4.0), min_size=4, max_size=4)
SEEDS = st.integers(0, 2**63)
BLOCK = 64


def make(sizes: list[list[int]], weights: list[float], seed: int = 0) -> MixedOrder:
    return MixedOrder(sizes, weights=weights[: len(sizes)], seed=seed, block_samples=BLOCK)


def streams(sizes: list[list[int]], turns: Turns) -> np.ndarray:
    ends = np.cumsum([sum(stream) for stream in sizes])
    return np.searchsorted(ends, turns.sample_ids, side="right")


@QUICK
@given(SIZES, WEIGHTS, SEEDS, st.integers(1, 12))
def test_after_each_block_the_fractions_are_exact(
    sizes: list[list[int]], weights: list[float], seed: int, blocks: int
) -> None:
    turns = make(sizes, weights, seed).turns(0, blocks * BLOCK)
    counts = np.bincount(streams(sizes, turns), minlength=len(sizes))
    fractions = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    assert (np.abs(counts - fractions * blocks * BLOCK) < 1 + 1e-9).all()


@QUICK
@given(SIZES, WEIGHTS, SEEDS)
def test_each_stream_goes_through_its_samples_once_per_epoch(
    sizes: list[list[int]], weights: list[float], seed: int
) -> None:
    turns = make(sizes, weights, seed).turns(0, 10 * BLOCK)
    seen = Counter(zip(turns.sample_ids.tolist(), turns.epochs.tolist(), strict=True))
    assert set(seen.values()) == {1}
    chosen = streams(sizes, turns)
    start = 0
    for number, stream in enumerate(sizes):
        epochs = turns.epochs[chosen == number]
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(epochs[-1]):  # all but the last are whole
            ids = turns.sample_ids[(chosen == number) & (turns.epochs == epoch)]
            assert sorted(ids.tolist()) == list(range(start, start + sum(stream)))
        start += sum(stream)


@QUICK
@given(SIZES, WEIGHTS, SEEDS, st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_any_part_is_the_same_wherever_reading_starts(
    sizes: list[list[int]], weights: list[float], seed: int, done: int, one: int, two: int
) -> None:
    whole = make(sizes, weights, seed).turns(0, done + one + two)
    order = make(sizes, weights, seed)
    later, earlier = order.turns(done + one, two), order.turns(done, one)
    for part, start in ((later, done + one), (earlier, done)):
        stop = start + len(part.sample_ids)
        assert part.sample_ids.tolist() == whole.sample_ids[start:stop].tolist()
        assert part.epochs.tolist() == whole.epochs[start:stop].tolist()


@QUICK
@given(SIZES, WEIGHTS, SEEDS, st.integers(0, 300))
def test_blocks_prepare_what_is_read(
    sizes: list[list[int]], weights: list[float], seed: int, start: int
) -> None:
    order, position = make(sizes, weights, seed), start
    for end, ids in islice(order.blocks(start), 3):
        assert set(order.turns(position, end - position).sample_ids) <= set(ids)
        position = end


@QUICK
@given(SIZES, WEIGHTS, st.integers(0, 7))
def test_a_stand_in_comes_from_the_same_stream(
    sizes: list[list[int]], weights: list[float], attempt: int
) -> None:
    order = make(sizes, weights)
    ids = np.arange(sum(map(sum, sizes)))
    others = np.array([order.replacement(int(sample), attempt=attempt) for sample in ids])
    nothing = np.zeros_like(ids)
    assert (streams(sizes, Turns(ids, nothing)) == streams(sizes, Turns(others, nothing))).all()


def test_equal_streams_are_not_read_in_step() -> None:
    turns = make([[40], [40]], [1.0, 1.0]).turns(0, 64)
    chosen = streams([[40], [40]], turns)
    first, second = (turns.sample_ids[chosen == number] % 40 for number in (0, 1))
    assert (first[:20] != second[:20]).any()


def test_too_small_a_fraction_is_refused() -> None:
    with pytest.raises(DataError, match=r"weight 0\.01, of 1\.01 in all.*shuffle_block_samples"):
        make([[5], [5]], [1.0, 0.01])
    with pytest.raises(SettingError, match="weight=-1 must be above 0"):
        StreamConfig(prefix="s3://b/x", weight=-1)


def test_ids_count_through_all_parts() -> None:
    parts = [
        SyntheticImages(images=images, image_size=4, seed=seed, shard_images=3)
        for seed, images in enumerate((5, 7, 2))
    ]
    whole = ConcatenatedDataset(parts)
    assert len(whole) == 14
    assert list(whole.shard_sizes) == [3, 2, 3, 3, 1, 2]
    expected = [part.read(own) for part in parts for own in range(len(part))]
    for sample_id, sample in enumerate(expected):
        assert whole.read(sample_id) == sample._replace(sample_id=sample_id)
    assert whole.shard_of(12) == parts[2].shard_of(0)
    whole.prepare(np.arange(14))
    for outside in (-1, 14):
        with pytest.raises(IndexError):
            whole.read(outside)
