"""The snapshot is a safetensors file of exactly the slices it was made for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors

from tests.unit.trainer.checkpoint.worlds import KINDS, even_cuts, random_state, split
from trainer.checkpoint.content import span_of
from trainer.checkpoint.errors import CheckpointMismatch, NonFiniteState
from trainer.checkpoint.layout import tensor_key
from trainer.checkpoint.objects import block_hash
from trainer.checkpoint.snapshot import Snapshot
from trainer.host_memory import host_buffer
from trainer.state import Fragment


def snapshot_of(fragments: list[Fragment]) -> Snapshot:
    return Snapshot({each.name: span_of(each) for each in fragments}, kinds=KINDS)


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 5), rank=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_another_program_reads_what_was_taken(world: int, rank: int, seed: int) -> None:
    fragments = split(random_state(seed), even_cuts(world))[rank % world]
    snapshot = snapshot_of(fragments)
    snapshot.take(fragments)
    read = safetensors.load(bytes(snapshot.data))
    expected = {
        tensor_key(kind, each.name, each.start): values
        for each in fragments
        for kind, values in each.tensors.items()
    }
    assert read.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(read[name].view(torch.int32), values.view(torch.int32))


def test_a_snapshot_stays_while_training_goes_on_and_is_used_again() -> None:
    state = random_state(0)
    fragments = split(state, [])[0]
    snapshot = snapshot_of(fragments)
    snapshot.take(fragments)
    first, place = bytes(snapshot.data), snapshot.data
    for each in fragments:
        each.tensors["master"].zero_()
    assert bytes(snapshot.data) == first
    snapshot.take(fragments)
    assert bytes(place) == bytes(snapshot.data) != first


def test_all_of_a_kind_lie_together() -> None:
    fragments = split(random_state(0), [])[0]
    snapshot = snapshot_of(fragments)
    snapshot.take(fragments)
    joined = torch.cat([each.tensors[kind] for kind in sorted(KINDS) for each in fragments])
    assert bytes(snapshot.data).endswith(joined.numpy().tobytes())


def test_each_block_is_hashed() -> None:
    fragments = split(random_state(0), [])[0]
    snapshot = snapshot_of(fragments)
    snapshot.take(fragments)
    assert snapshot.examine() == (block_hash(snapshot.data),)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_finite_is_named(kind: str, value: float) -> None:
    fragments = split(random_state(0), [])[0]
    snapshot = snapshot_of(fragments)
    fragments[2].tensors[kind][-1] = value
    snapshot.take(fragments)
    with pytest.raises(NonFiniteState, match=f"The {kind} of {fragments[2].name} holds values"):
        snapshot.examine()


def test_other_slices_than_planned_are_refused() -> None:
    planned, other = (split(random_state(0), even_cuts(2))[rank] for rank in (0, 1))
    snapshot = snapshot_of(planned)
    with pytest.raises(CheckpointMismatch, match="other slices than when the run began"):
        snapshot.take(other)


def test_memory_is_given_at_once_and_no_more_than_asked_for() -> None:
    buffer = host_buffer(1000, page_locked=False)
    assert buffer.untyped_storage().nbytes() == 1000
    assert not buffer.any()
