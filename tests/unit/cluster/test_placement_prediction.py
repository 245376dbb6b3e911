"""Memory, bytes on the wire and time, counted by hand."""

from dataclasses import replace

import pytest

from cluster.placement import Placement
from tests.unit.cluster.loads import NODE, TINY, tiny, xl
from trainer.planning.prediction import exchange, exchange_bytes, rank_memory, step_time

ONE, TWO = Placement((1,)), Placement((2,))
REPLICATED = Placement((1, 1, 1))


@pytest.mark.parametrize(
    ("stage", "element", "whole", "split"),
    [
        # bytes for each parameter: held whole by every rank; split over the ranks
        (0, 4, 4 + 4 + 8 + 4, 0),
        (0, 2, 2 + 2 + 12 + 4, 0),
        (1, 2, 2 + 2, 12 + 4),
        (2, 2, 2, 2 + 12 + 4),
        (3, 2, 0, 2 + 2 + 12 + 4),
        (2, 4, 4, 4 + 12 + 4),
    ],
)
def test_zero_splits_what_its_stage_says(stage, element, whole, split):
    work = xl(element_bytes=element, gradient_bytes=element, grad_accum_steps=2)
    count = 3 * 672_000_000 + 3_000_000
    got = rank_memory(work, REPLICATED, zero_stage=stage)
    state = got.total - got.activations - got.buffers
    assert state == pytest.approx(count * (whole + split / 8), abs=64)
    assert got.host == 0


def test_state_of_xl_with_three_scales_on_eight_ranks():
    count = 2_019_000_000
    got = rank_memory(xl(), REPLICATED, zero_stage=1)
    assert (got.weights, got.gradients) == (2 * count, 2 * count // 8)
    # Gradients of several passes are added up before they are reduced.
    assert rank_memory(xl(grad_accum_steps=2), REPLICATED, zero_stage=1).gradients == 2 * count
    summed = xl(grad_accum_steps=2, gradient_bytes=4)
    assert rank_memory(summed, REPLICATED, zero_stage=1).gradients == 4 * count
    assert rank_memory(summed, REPLICATED, zero_stage=2).gradients == 4 * count // 8
    assert (got.optimizer, got.ema) == (12 * count // 8, 4 * count // 8)
    # 33 images carry the coarsest scale, 22 the next, 11 the finest; 22 widths a token and block.
    assert got.activations == 2 * 28 * 22 * 1152 * (33 * 16 + 22 * 64 + 11 * 256)


def test_sharding_saves_weights_and_gradients_but_no_optimizer_state():
    whole = rank_memory(tiny(grad_accum_steps=2), ONE, zero_stage=1)
    halved = rank_memory(tiny(grad_accum_steps=2), TWO, zero_stage=1)
    # Of 1000 weights 16 stay whole; 984 are halved.
    assert whole.weights == whole.gradients == 2 * (104 + 1000)
    assert halved.weights == halved.gradients == 2 * (104 + 16 + 492)
    assert halved.optimizer == whole.optimizer == 12 * 1104 // 8
    assert halved.ema == whole.ema == 4 * 1104 // 8
    # Without ZeRO a rank has the state of all that it holds.
    assert rank_memory(tiny(), TWO, zero_stage=0).optimizer == 12 * 612


def test_the_last_projection_stays_whole_where_patches_cannot_be_divided():
    # Patches of 4 numbers over 8 ranks: its 36 weights stay, with the 16; 948 are divided.
    eighth = tiny(replace(TINY, parameters=1000))
    shards = eighth.shards(Placement((8,)))
    assert shards == [(104 + 16 + 36, 1), (948 // 8, 8)]


def test_zero_3_gathers_what_it_may_and_a_block_at_least():
    some = rank_memory(tiny(kept_parameters=600), ONE, zero_stage=3)
    block = rank_memory(tiny(kept_parameters=1), ONE, zero_stage=3)
    everything = rank_memory(tiny(), ONE, zero_stage=3)
    bucket = 2 * 100
    assert some.buffers == bucket + 2 * 600
    assert block.buffers == bucket + 2 * 1104 // 2
    assert everything.buffers == bucket + 2 * 1104


def test_reducing_in_the_backward_pass_takes_a_second_bucket():
    at_rest = rank_memory(tiny(), ONE, zero_stage=2).buffers
    assert at_rest == 2 * 100
    assert rank_memory(tiny(reduces_in_backward=True), ONE, zero_stage=2).buffers == 2 * at_rest
    assert rank_memory(tiny(), ONE, zero_stage=0).buffers == 0


def test_offloaded_state_is_counted_for_the_host():
    there = rank_memory(tiny(), ONE, zero_stage=2)
    away = rank_memory(tiny(offload=True), ONE, zero_stage=2)
    assert away.host == there.optimizer + there.ema
    assert away.total == there.total - away.host
    assert (away.optimizer, away.ema) == (0, 0)


def test_a_group_keeps_and_moves_its_tokens():
    whole = rank_memory(tiny(), ONE, zero_stage=1)
    sharded = rank_memory(tiny(), TWO, zero_stage=1)
    # Two blocks keep 3 E - 2 widths more for each of 3 images' 5 tokens.
    assert sharded.activations - whole.activations == 2 * 3 * 2 * (4 * 5 * 8)
    # The group's tokens and their gradients: 2 x 2 ranks x 3 images x 5 tokens x 8.
    assert sharded.buffers - whole.buffers == 2 * (2 * 2 * 3 * 5 * 8)


def test_recomputation_holds_one_block_at_a_time():
    again = replace(TINY, activation_checkpointing=True, activations=200)
    got = rank_memory(tiny(again), TWO, zero_stage=1)
    assert got.activations == 2 * 3 * (200 + 300 + 4 * 5 * 8)


def test_exchange_counted_by_hand():
    # d 8, n 5, m 4, ppc 4, two blocks, E 2; in numbers an image's forward pass gathers
    #   blocks 2 x 3 x 40, modulation 2 x 8, last layer 8 + 32, and patches 16;
    # returns a half of blocks 2 x 160, modulation 2 x 48, patches 32, last layer 16 + 16;
    # scatters blocks 2 x 40. The backward pass gathers 80, returns 240 and scatters 312 - 16.
    sent = exchange_bytes(tiny(), TWO, images=[3])
    assert sent == {
        "all_gather": 6 * (312 + 80),
        "all_to_all": 6 * (240 + 240),
        "reduce_scatter": 6 * (80 + 296),
    }
    again = exchange_bytes(tiny(replace(TINY, activation_checkpointing=True)), TWO, images=[3])
    assert again == {
        "all_gather": 6 * (312 + 80 + 240),
        "all_to_all": 6 * (240 + 240 + 40),
        "reduce_scatter": 6 * (80 + 296 + 80),
    }
    calls = {kind: one.calls for kind, one in exchange(tiny(), TINY, 2).items()}
    assert calls == {"all_gather": 11 + 2, "all_to_all": 9 + 9, "reduce_scatter": 2 + 10}


def test_exchange_without_a_sharded_last_projection_and_with_shared_modulation():
    # E 8: 7 other ranks; no gather of 32 and no return of 16 for the last projection.
    work = tiny(shared_modulation=True)
    sent = exchange_bytes(work, Placement((8,)), images=[1])
    forward = 240 + 8 + 8
    assert sent["all_gather"] == 2 * 7 * (forward + 16 + 80)
    assert sent["all_to_all"] == 2 * 7 * 2 * (320 + 48 + 32 + 16) // 8
    assert sent["reduce_scatter"] == 2 * 7 * (80 + forward)


def test_replicated_scales_exchange_nothing():
    assert set(exchange_bytes(xl(), REPLICATED, images=[33, 22, 11]).values()) == {0}
    assert step_time(xl(), REPLICATED, zero_stage=2, hardware=NODE).exchange == 0


def test_compute_is_six_flops_for_a_multiply_add_and_two_more_where_it_is_repeated():
    work = tiny(TINY, replace(TINY, images=1, activation_checkpointing=True), grad_accum_steps=4)
    time = step_time(work, Placement((1, 1)), zero_stage=0, hardware=NODE)
    assert time.compute == pytest.approx(4 * (6 * 4 * 10_000 + 2 * 8_000) / 400e12)


def test_reductions_are_rings():
    work, weights = xl(grad_accum_steps=2), 2 * 2_019_000_000
    ring = 7 / 8 * weights / 400e9
    times = {
        stage: step_time(work, REPLICATED, zero_stage=stage, hardware=NODE).reduction
        for stage in (0, 1, 2)
    }
    assert times[0] == pytest.approx(2 * ring)
    assert times[1] == pytest.approx(2 * ring + ring)
    assert times[2] == pytest.approx(2 * 2 * ring + ring)
    third = step_time(work, REPLICATED, zero_stage=3, hardware=NODE)
    hidden = third.compute / 2 * 2 / 3
    # A thousand million of the weights are kept for the backward pass.
    gathers = (2 - 1000 / 2019) * ring + 3 * 30 * 20e-6
    assert third.reduction == pytest.approx(2 * (gathers + max(0, ring - hidden)))


def test_the_backward_pass_hides_a_reduction():
    slow = step_time(xl(), REPLICATED, zero_stage=2, hardware=NODE)
    quick = step_time(xl(reduces_in_backward=True), REPLICATED, zero_stage=2, hardware=NODE)
    ring = 7 / 8 * 2 * 2_019_000_000 / 400e9
    assert slow.reduction - quick.reduction == pytest.approx(min(2 * ring, 2 / 3 * slow.compute))


def test_a_ring_over_nodes_goes_through_the_ports_of_its_ranks():
    # 16 ranks on two nodes: all eight ports of a node are 400 GB/s, as fast as its links; the two
    # ranks of a node that hold the same shard of four have 100.
    work = xl(world_size=16)
    whole = step_time(work, REPLICATED, zero_stage=0, hardware=NODE).reduction
    assert whole == pytest.approx(2 * 15 / 16 * 2 * 2_019_000_000 / 400e9)
    sharded = step_time(work, Placement((4, 1, 1)), zero_stage=0, hardware=NODE).reduction
    unpartitioned = 28 * 1152
    shard = (672_000_000 - unpartitioned) // 4
    rest = 2_019_000_000 - 4 * shard
    assert sharded == pytest.approx(
        2 * 15 / 16 * 2 * rest / 400e9 + 2 * 3 / 4 * 2 * shard / 100e9, rel=1e-6
    )


def test_exchange_takes_its_bytes_and_the_start_of_each_collective():
    work, placement = xl(grad_accum_steps=3), Placement((8, 1, 1))
    time = step_time(work, placement, zero_stage=2, hardware=NODE).exchange
    leaving = sum(exchange_bytes(work, placement, images=[3 * 33, 3 * 22, 3 * 11]).values())
    # 8 a block and 6 beside them, and the same in the backward pass but for the patches' one.
    calls = 3 * (2 * (28 * 8 + 6) - 1)
    assert time == pytest.approx(leaving / 400e9 + calls * 20e-6)


def test_overlap_hides_the_exchange_of_coarse_scales():
    placement = Placement((8, 1, 2))
    alone = step_time(xl(), placement, zero_stage=2, hardware=NODE)
    finest = step_time(xl(), Placement((1, 1, 2)), zero_stage=2, hardware=NODE).exchange
    hidden = step_time(xl(overlaps_exchange=True), placement, zero_stage=2, hardware=NODE)
    assert hidden.exchange == pytest.approx(
        finest + max(0, alone.exchange - finest - 6 * 11 * 256 * 457e6 / 400e12)
    )


def test_offload_moves_and_updates_the_state_at_the_speed_of_the_host():
    time = step_time(tiny(offload=True), ONE, zero_stage=1, hardware=NODE)
    assert time.offload == pytest.approx(1104 / 8 * (4 + 32) / 25e9)
    assert step_time(tiny(), ONE, zero_stage=1, hardware=NODE).offload == 0
