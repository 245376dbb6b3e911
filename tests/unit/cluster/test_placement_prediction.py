"""Memory, bytes on the wire and time, counted by hand."""

from dataclasses import replace

import pytest

from cluster.placement import Placement
from tests.unit.cluster.loads import NODE, TINY, tiny, xl
from trainer.planning.exchange import exchange_bytes, exchange_calls
from trainer.planning.memory import rank_memory
from trainer.planning.step_time import step_time

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


def test_zero_3_gathers_what_it_may_and_a_block_at_least():
    some = rank_memory(tiny(kept_parameters=600), ONE, zero_stage=3)
    block = rank_memory(tiny(kept_parameters=1), ONE, zero_stage=3)
    everything = rank_memory(tiny(), ONE, zero_stage=3)
    bucket = 2 * 100
    assert some.buffers == bucket + 2 * 600
    assert block.buffers == bucket + 2 * 1104 // 2
    assert everything.buffers == bucket + 2 * 1104


def test_zero_3_gathers_the_modulation_of_all_blocks_at_once():
    # Of 984 weights of each of two scales, halved, 300 are of modulation.
    load = replace(TINY, modulation=600)
    work = tiny(load, load, replace(TINY, tokens=20), kept_parameters=1, depth=100)
    buffers = rank_memory(work, Placement((2, 2, 1)), zero_stage=3).buffers
    apart = rank_memory(work, Placement((2, 4, 1)), zero_stage=3).buffers
    without = replace(work, scales=(TINY, TINY, work.scales[2]))
    held = 104 + 2 * (16 + 492) + 1000
    least = rank_memory(without, Placement((2, 2, 1)), zero_stage=3).buffers
    assert buffers - least == 2 * (300 + 300 - held // 100)
    other = rank_memory(without, Placement((2, 4, 1)), zero_stage=3).buffers
    assert apart - other == 2 * (300 - (held - 246) // 100)


def test_zero_3_keeps_what_its_limits_allow():
    held = 2_019_000_000
    gathers = {
        limit: xl(kept_parameters=limit).weight_gathers(REPLICATED)
        for limit in (0, 10**9, held, 2 * held)
    }
    assert gathers[0] == 2
    assert gathers[10**9] == pytest.approx(2 - 1e9 / held)
    assert 1.1 < gathers[held] < 1.2
    assert gathers[2 * held] == 1


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


def test_an_ema_on_the_host_leaves_room_for_two_chunks():
    here = rank_memory(xl(), REPLICATED, zero_stage=1)
    away = rank_memory(xl(ema_on_host=True), REPLICATED, zero_stage=1)
    assert (away.ema, away.host) == (0, here.ema)
    assert away.total == here.total - here.ema + 2 * 16 * 2**20
    # With offloaded state it is there already.
    both = rank_memory(xl(ema_on_host=True, offload=True), REPLICATED, zero_stage=1)
    assert both == rank_memory(xl(offload=True), REPLICATED, zero_stage=1)


def test_a_group_keeps_hidden_units_once_and_tokens_only_if_it_must():
    whole = rank_memory(tiny(), ONE, zero_stage=1)
    sharded = rank_memory(tiny(), TWO, zero_stage=1)
    kept = rank_memory(tiny(regathers=False), TWO, zero_stage=1)
    # One of two blocks is sharded: 3 images' 5 tokens of 32 hidden units; or twice 8 of the other.
    assert sharded.activations - whole.activations == -2 * 3 * 5 * 32
    assert kept.activations - sharded.activations == 2 * 3 * 5 * (2 * 8)
    # 15 tokens of 8: E + 3 are sent and as many received, or 3 where nothing is gathered again.
    assert sharded.buffers - whole.buffers == 2 * 15 * 8 * (5 + 5)
    assert kept.buffers - whole.buffers == 2 * 15 * 8 * (3 + 3)


def test_groups_of_one_size_share_their_buffers():
    wide = replace(TINY, tokens=50)
    fine = tiny(TINY, wide)
    largest = rank_memory(fine, Placement((1, 2)), zero_stage=0).buffers
    assert rank_memory(fine, Placement((2, 2)), zero_stage=0).buffers == largest
    other = rank_memory(fine, Placement((4, 1)), zero_stage=0).buffers
    assert rank_memory(fine, Placement((4, 2)), zero_stage=0).buffers == largest + other


def test_recomputation_holds_one_block_at_a_time():
    again = replace(TINY, activation_checkpointing=True)
    got = rank_memory(tiny(again), TWO, zero_stage=1)
    assert got.activations == 2 * 3 * (200 + 300 - 5 * 32)


def test_exchange_counted_by_hand():
    # d 8, n 5, 3 images, E 2, one of two blocks: T d is 120 numbers, 240 bytes.
    #   forward: 240 gathered, 3 / 2 of it dealt, 240 gathered, 240 summed;
    #   backward: twice 240 gathered, 240 summed, 3 / 2 and 1 of it dealt, 240 summed;
    # modulation: 48 gathered, 144 dealt; 144 dealt, 48 summed.
    sent = exchange_bytes(tiny(), TWO, images=[3])
    assert sent == {
        "all_gather": 240 + 240 + 480 + 48,
        "all_to_all": 360 + 600 + 144 + 144,
        "reduce_scatter": 240 + 240 + 240 + 48,
    }
    assert exchange_calls(tiny(), TWO) == {"all_gather": 4, "all_to_all": 4, "reduce_scatter": 4}
    kept = exchange_bytes(tiny(regathers=False), TWO, images=[3])
    assert kept == {**sent, "all_gather": 1008 - 240, "all_to_all": 1248 - 240}
    again = exchange_bytes(tiny(replace(TINY, activation_checkpointing=True)), TWO, images=[3])
    assert again == {
        "all_gather": sent["all_gather"] + 480,
        "all_to_all": sent["all_to_all"] + 360,
        "reduce_scatter": sent["reduce_scatter"] + 240,
    }


def test_shared_modulation_is_whole():
    shared = exchange_bytes(tiny(shared_modulation=True), TWO, images=[3])
    assert shared == {"all_gather": 960, "all_to_all": 960, "reduce_scatter": 720}


def test_an_update_of_xl_takes_as_many_collectives_for_one_scale_as_for_two():
    for placement in (Placement((8, 1, 1)), Placement((8, 8, 1))):
        assert sum(exchange_calls(xl(), placement).values()) == 8 * 27 + 4 == 220
    # Groups of other sizes, the finest scale, and what is recomputed go by themselves.
    assert sum(exchange_calls(xl(), Placement((8, 4, 1))).values()) == 440
    assert sum(exchange_calls(xl(), Placement((8, 8, 8))).values()) == 440
    assert sum(exchange_calls(xl(coarse_ahead=False), Placement((8, 8, 8))).values()) == 220
    coarsest, middle, finest = xl().scales
    mixed = replace(coarsest, activation_checkpointing=True), middle, finest
    both = exchange_calls(xl(scales=mixed), Placement((8, 8, 1)))
    assert sum(both.values()) == 12 * 27 + 8 * 27 + 4


def test_one_block_is_whole_and_exchanges_nothing():
    work = tiny(depth=1, reduces_in_backward=True)
    assert not any(exchange_calls(work, TWO).values())
    for stage in (0, 1, 2, 3):
        assert step_time(work, TWO, zero_stage=stage, hardware=NODE).exchange == 0


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
    # Of 28 blocks the first is gathered before anything, and the last 7 of the backward pass are
    # reduced behind it, with the shared weights. All others travel beside compute.
    block, shared = 2_016_000_000 / 28, 3_000_000
    waits = 7 / 8 * 2 * (8 * block + 2 * shared) / 400e9 + 2 * 20e-6
    # A thousand million of the weights are kept for the backward pass.
    again = (1 - 1000 / 2019) * ring + 2 * 30 * 20e-6
    assert third.reduction == pytest.approx(2 * (waits + again))


def test_the_backward_pass_hides_a_reduction_but_for_its_last_bucket():
    ring = 7 / 8 * 2 * 2_019_000_000 / 400e9
    slow = step_time(xl(), REPLICATED, zero_stage=2, hardware=NODE)
    assert slow.reduction == pytest.approx(3 * ring)
    beside = xl(reduces_in_backward=True, bucket_elements=50_000_000)
    quick = step_time(beside, REPLICATED, zero_stage=2, hardware=NODE)
    last = 7 / 8 * 2 * (2_016_000_000 / 28 + 3_000_000) / 400e9
    assert quick.reduction == pytest.approx(ring + 2 * last + 20e-6)


def test_gradients_of_sharded_modulation_come_last():
    beside = xl(reduces_in_backward=True, bucket_elements=10_000_000)
    placement = Placement((8, 8, 1))
    block, shared, modulation = 2_016_000_000 / 28, 3_000_000, 2 * 216_000_000 // 8
    shard = (672_000_000 - 63_000_000) // 8
    # Of 16 ranks two hold the same shard.
    wide = replace(beside, world_size=16)
    fast = replace(NODE, network_gb_per_s=400, matmul_tflops=1)
    time = step_time(wide, placement, zero_stage=2, hardware=fast)
    ring = 15 / 16 * 2 * (2_019_000_000 - 16 * shard) / 400e9 + 1 / 2 * 2 * 2 * shard / 400e9
    last = 15 / 16 * 2 * (block + shared) / 400e9 + 1 / 2 * 2 * modulation / 400e9
    # All else is hidden by a slow GPU.
    assert time.reduction == pytest.approx(ring + 2 * last + 20e-6)


def test_gradients_that_go_to_one_rank_each_are_sent_once():
    work = xl(reduces_to_owners=True)
    ring = 7 / 8 * 2 * 2_019_000_000 / 400e9
    time = step_time(work, REPLICATED, zero_stage=1, hardware=NODE)
    # While one rank receives, the others send.
    # A bucket whose gradients several ranks keep is sent in so many messages: seven more in all.
    assert time.reduction == pytest.approx(8 / 7 * ring + ring + 8 * 20e-6)
    # Nobody keeps only a part without ZeRO, and ZeRO-3 does no better.
    for stage in (0, 3):
        assert step_time(work, REPLICATED, zero_stage=stage, hardware=NODE) == step_time(
            xl(), REPLICATED, zero_stage=stage, hardware=NODE
        )


def test_a_ring_over_nodes_goes_through_the_ports_of_its_ranks():
    # 16 ranks on two nodes: all eight ports of a node are 400 GB/s, as fast as its links; the two
    # ranks of a node that hold the same shard of four have 100.
    work = xl(world_size=16)
    whole = step_time(work, REPLICATED, zero_stage=0, hardware=NODE).reduction
    assert whole == pytest.approx(2 * 15 / 16 * 2 * 2_019_000_000 / 400e9)
    sharded = step_time(work, Placement((4, 1, 1)), zero_stage=0, hardware=NODE).reduction
    shard = (672_000_000 - 63_000_000) // 4
    rest = 2_019_000_000 - 4 * shard
    assert sharded == pytest.approx(
        2 * 15 / 16 * 2 * rest / 400e9 + 2 * 3 / 4 * 2 * shard / 100e9, rel=1e-6
    )


def test_exchange_takes_its_bytes_and_the_start_of_each_collective():
    work, placement = xl(grad_accum_steps=3), Placement((8, 1, 1))
    time = step_time(work, placement, zero_stage=2, hardware=NODE).exchange
    leaving = sum(exchange_bytes(work, placement, images=[3 * 33, 3 * 22, 3 * 11]).values())
    assert time == pytest.approx(leaving / 400e9 + 3 * 220 * 20e-6)


def test_overlap_hides_the_exchange_of_coarse_scales_but_none_of_the_finest():
    few = Placement((2, 1, 1))
    alone = step_time(xl(), few, zero_stage=2, hardware=NODE)
    hidden = step_time(xl(overlaps_exchange=True), few, zero_stage=2, hardware=NODE)
    assert hidden.compute == alone.compute
    assert hidden.exchange < 0.02 * alone.exchange
    finest = Placement((1, 1, 2))
    for work in (xl(), xl(overlaps_exchange=True)):
        time = step_time(work, finest, zero_stage=2, hardware=NODE)
        leaving = sum(exchange_bytes(work, finest, images=[33, 22, 11]).values())
        assert time.exchange == pytest.approx(leaving / 400e9 + 220 * 20e-6)


def test_an_ema_on_the_host_comes_and_goes_while_passes_do():
    node = replace(NODE, host_link_gb_per_s=50)
    beside = step_time(xl(ema_on_host=True), REPLICATED, zero_stage=1, hardware=node)
    here = step_time(xl(), REPLICATED, zero_stage=1, hardware=node)
    assert beside == replace(here, update=beside.update)
    slow = replace(node, host_link_gb_per_s=1)
    late = step_time(xl(ema_on_host=True), REPLICATED, zero_stage=1, hardware=slow)
    assert late.offload == pytest.approx(4 * 2_019_000_000 / 8 / 1e9 - late.compute)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("to_owners", [False, True])
def test_an_ema_on_the_host_has_all_passes_for_its_way(stage, to_owners):
    """With every stage: no update waits for the whole device."""
    node = replace(NODE, host_link_gb_per_s=1)
    copied = 4 * 2_019_000_000 / 8 / 1e9
    work = xl(
        ema_on_host=True, grad_accum_steps=4, reduces_in_backward=True, reduces_to_owners=to_owners
    )
    late = step_time(work, REPLICATED, zero_stage=stage, hardware=node)
    here = step_time(replace(work, ema_on_host=False), REPLICATED, zero_stage=stage, hardware=node)
    # Only an average on the device is part of the update.
    beside = copied - (late.total - late.update - (here.total - here.update))
    # Passes take what the GPU does and what it waits for, but for what follows the update.
    assert here.compute <= beside <= here.total


def test_offload_moves_and_updates_the_state_at_the_speed_of_the_host():
    time = step_time(tiny(offload=True), ONE, zero_stage=1, hardware=NODE)
    assert time.offload == pytest.approx(1104 / 8 * (4 + 32) / 25e9)
    assert step_time(tiny(), ONE, zero_stage=1, hardware=NODE).offload == 0
