"""Properties of the sample order, and the very sequence that runs already rely on."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, EmptyDatasetError
from pipelines.order import SampleOrder, permutation, replacement

GOLDEN_PERMUTATION = [1, 2, 4, 6, 5, 0, 7, 3]
GOLDEN_IDS = [5, 6, 0, 5, 9, 7, 8, 4, 6, 1, 3, 11]
GOLDEN_REPLACEMENTS = [11, 9, 0]

QUICK = settings(max_examples=60, deadline=None)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63)
BLOCKS = st.integers(1, 200)


def make(sizes: list[int], seed: int = 0, block: int = 50) -> SampleOrder:
    return SampleOrder(sizes, seed=seed, block_samples=block)


@QUICK
@given(SIZES, SEEDS, BLOCKS, st.integers(0, 5))
def test_each_epoch_is_a_permutation(sizes: list[int], seed: int, block: int, epoch: int) -> None:
    order = make(sizes, seed, block)
    ids = order.turns(epoch * order.samples, order.samples).sample_ids
    assert sorted(ids.tolist()) == list(range(order.samples))


@QUICK
@given(SIZES, SEEDS, BLOCKS, st.sampled_from([1, 2, 4]), st.integers(1, 30), st.integers(0, 500))
def test_ranks_share_the_global_batch(
    sizes: list[int], seed: int, block: int, world: int, slice_images: int, start: int
) -> None:
    batch = slice_images * world
    whole = make(sizes, seed, block).turns(start, batch).sample_ids
    slices = [
        make(sizes, seed, block).turns(start + rank * slice_images, slice_images).sample_ids
        for rank in range(world)
    ]
    assert np.concatenate(slices).tolist() == whole.tolist()
    if start % sum(sizes) + batch <= sum(sizes):  # within an epoch nothing comes twice
        assert len(set(whole.tolist())) == batch


@QUICK
@given(SIZES, SEEDS, BLOCKS, st.integers(0, 300), st.integers(1, 300))
def test_resuming_gives_the_tail(
    sizes: list[int], seed: int, block: int, done: int, left: int
) -> None:
    uninterrupted = make(sizes, seed, block).turns(0, done + left).sample_ids
    resumed = make(sizes, seed, block).turns(done, left).sample_ids
    assert resumed.tolist() == uninterrupted[done:].tolist()


@QUICK
@given(SIZES, SEEDS, BLOCKS)
def test_the_seed_decides(sizes: list[int], seed: int, block: int) -> None:
    assume(sum(sizes) >= 30 and block >= 10)
    order, count = make(sizes, seed, block), sum(sizes)
    first = order.turns(0, count).sample_ids.tolist()
    assert make(sizes, seed, block).turns(0, count).sample_ids.tolist() == first
    assert order.turns(count, count).sample_ids.tolist() != first  # the next epoch
    assert make(sizes, seed + 1, block).turns(0, count).sample_ids.tolist() != first


@QUICK
@given(SIZES, SEEDS, BLOCKS, st.integers(0, 3))
def test_a_block_touches_only_a_window_of_shards(
    sizes: list[int], seed: int, block: int, epoch: int
) -> None:
    order, count = make(sizes, seed, block), sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    seen_before: set[int] = set()
    carried: set[int] = set()
    for start in range(0, count, block):
        length = min(block, count - start)
        shards = set(shard_of[order.turns(epoch * count + start, length).sample_ids].tolist())
        # Whole shards that fit, and one at each end.
        inner = sum(sorted(sizes[shard] for shard in shards)[:-2])
        assert inner <= block
        assert len(shards) <= block // min(sizes) + 2
        # What comes back was cut by the block's border; only one shard can be.
        carried = shards & seen_before
        assert len(carried) <= 1
        seen_before |= shards


@QUICK
@given(SIZES, SEEDS, BLOCKS, st.integers(0, 300))
def test_blocks_are_the_order_cut_up(sizes: list[int], seed: int, block: int, start: int) -> None:
    order = make(sizes, seed, block)
    position = None
    for end, ids in islice(order.blocks(start), 5):
        first = end - len(ids)
        assert order.turns(first, len(ids)).sample_ids.tolist() == ids.tolist()
        assert first <= start < end if position is None else first == position
        position = end


@QUICK
@given(st.integers(2, 10_000), st.data())
def test_a_replacement_is_another_sample(samples: int, data: st.DataObject) -> None:
    sample_id = data.draw(st.integers(0, samples - 1))
    attempt = data.draw(st.integers(0, 8))
    chosen = replacement(sample_id, attempt=attempt, samples=samples)
    assert 0 <= chosen < samples
    assert chosen != sample_id
    assert chosen == replacement(sample_id, attempt=attempt, samples=samples)


def test_a_lone_sample_replaces_itself() -> None:
    assert replacement(0, attempt=3, samples=1) == 0


def test_shuffles_are_even() -> None:
    """Each sample comes first about equally often."""
    order = make([5, 3], block=8)
    firsts = np.array([order.turns(epoch * 8, 1).sample_ids[0] for epoch in range(4000)])
    counts = np.bincount(firsts, minlength=8)
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))


def test_the_order_never_changes() -> None:
    """Checkpoints hold a position in this very sequence."""
    assert permutation(8, 1, 2, 3).tolist() == GOLDEN_PERMUTATION
    assert make([4, 3, 5], seed=7, block=6).turns(9, 12).sample_ids.tolist() == GOLDEN_IDS
    assert [replacement(5, attempt=n, samples=100) for n in range(3)] == GOLDEN_REPLACEMENTS


def test_mistakes_are_named() -> None:
    with pytest.raises(EmptyDatasetError, match="no samples"):
        make([])
    with pytest.raises(DataError, match="got 0"):
        make([3], block=0)
    with pytest.raises(DataError, match="got -1"):
        make([3], seed=-1)
