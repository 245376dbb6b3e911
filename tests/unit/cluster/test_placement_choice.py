from dataclasses import replace
from itertools import combinations

import pytest

from cluster.hardware import HardwareConfig, HardwareError
from cluster.placement import Placement
from pipelines.formats import format_bytes
from tests.unit.cluster.loads import NODE, TINY, explained, tiny, xl
from trainer.planning.memory import rank_memory
from trainer.planning.planner import USABLE, Choices, best, candidates

PCIE = replace(NODE, node_link_gb_per_s=12.5, matmul_tflops=66, gpu_memory_gib=24)


def test_every_placement_and_stage_is_a_candidate_best_first():
    found = candidates(xl(), NODE)
    assert len(found) == 4**3 * 3
    assert best(found) is found[0]
    times = [one.time.total for one in found if one.fits]
    assert times == sorted(times)


HIDING = xl(reduces_in_backward=True, bucket_elements=50_000_000)
"""Gradients are reduced beside the backward pass, and nothing hides an exchange."""


def test_a_fast_node_with_memory_to_spare_shards_nothing_that_it_cannot_hide():
    chosen = best(candidates(HIDING, NODE, Choices(zero_stages=[2])))
    assert chosen is not None
    assert not chosen.placement.sharded


def test_of_equally_fast_ones_the_lower_stage_is_taken():
    chosen = best(candidates(tiny(world_size=1), NODE))
    assert chosen is not None
    assert (chosen.placement, chosen.zero_stage) == (Placement((1,)), 1)


def test_slow_links_shard_the_coarse_scales_whose_tokens_are_few():
    chosen = best(candidates(xl(), PCIE, Choices(zero_stages=[1])))
    assert chosen is not None
    coarsest, _, finest = chosen.placement.ranks
    assert coarsest > 1
    assert coarsest >= finest


def test_what_does_not_fit_is_last_and_never_chosen():
    found = candidates(xl(), replace(NODE, gpu_memory_gib=16))
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    assert all((one.memory.total <= USABLE * 16 * 2**30) == one.fits for one in found)
    assert best(candidates(xl(), replace(NODE, gpu_memory_gib=2))) is None


def test_host_memory_binds_offloaded_state():
    work, node = xl(offload=True), replace(NODE, host_memory_gib=36)
    # 16 bytes of each of 2,019 M weights, all on one node: 30.1 GiB.
    assert best(candidates(work, node)) is not None
    assert best(candidates(work, replace(node, host_memory_gib=32))) is None


def test_unknown_memory_is_refused_with_a_fix():
    with pytest.raises(HardwareError, match=r"gpu_memory_gib=null.*Set it.*cluster=h100_8"):
        candidates(xl(), HardwareConfig())


def test_no_sharding_is_said_when_none_is_needed():
    words = explained(HIDING, NODE, Choices(zero_stages=[2]), changes={})
    decision = "No sharding is needed: every rank holds all experts, with ZeRO-2. A rank holds "
    assert words[0].startswith(decision)
    assert words[0].endswith(", and may hold 72.0 GiB: 90% of its GPU.")
    assert words[1].startswith("The fastest that shards is")


def test_changes_are_planned_anew():
    small = replace(NODE, gpu_memory_gib=15)
    changes = {
        "more memory": (HIDING, NODE, [2]),
        "no change": (HIDING, small, [2]),
        "next to no memory": (HIDING, replace(NODE, gpu_memory_gib=1), [2]),
    }
    chosen = best(candidates(HIDING, small, Choices(zero_stages=[2])))
    words = explained(HIDING, small, Choices(zero_stages=[2]), changes=changes)
    assert chosen is not None
    assert words[0].startswith("Shard scale")
    assert words[-3].startswith("With more memory: replicated, ZeRO-2")
    assert words[-2].startswith("With no change: the same choice")
    assert words[-1] == "With next to no memory: nothing fits."
    assert any("Replicated, ZeRO-2 would take" in line for line in words)


def test_it_is_said_what_is_missing_when_nothing_fits():
    low = replace(NODE, gpu_memory_gib=8)
    stages = (1, 2, 3)
    changes = {"80 GB": (xl(), NODE, stages), "nothing": (xl(), low, stages)}
    words = explained(xl(), low, changes=changes)
    assert words[0].startswith("Nothing fits: the smallest, ")
    assert "may have 7.2 GiB" in words[0]
    assert words[1].startswith("With 80 GB: ")
    assert " fits (" in words[1]
    assert words[2] == "With nothing: still nothing fits."


TIGHT = replace(NODE, gpu_memory_gib=13)


def test_the_aim_decides_between_memory_and_time():
    found = {
        aim: best(candidates(xl(), TIGHT, Choices(aim=aim, recomputes=True)), aim)
        for aim in ("fit", "least", "fastest")
    }
    fit, least, fastest = found["fit"], found["least"], found["fastest"]
    assert fit is not None
    assert least is not None
    assert fastest is not None
    assert least.memory.total < fit.memory.total <= USABLE * 13 * 2**30 < fastest.memory.total
    assert least.time.total > fit.time.total > fastest.time.total
    assert least.recomputed == (2, 1, 0)
    assert not fastest.fits
    assert "scales 2, 1 and 0 recomputed" in str(least)


def test_no_more_is_recomputed_than_has_to_be():
    choices = Choices(zero_stages=[1], recomputes=True)
    found = candidates(xl(), TIGHT, choices)
    bare = candidates(xl(), TIGHT, Choices(zero_stages=[1]))
    fits = {one.placement for one in bare if one.fits}
    assert fits
    for one in found:
        if one.placement in fits:
            assert one.recomputed == ()
    few = [one for one in found if one.fits and one.recomputed]
    assert few
    for one in few:
        cheaper = [
            other
            for size in range(len(one.recomputed))
            for other in combinations(one.recomputed, size)
        ]
        for scales in cheaper:
            work = recompute(xl(), scales)
            less = rank_memory(work, one.placement, zero_stage=1)
            assert less.total > USABLE * 13 * 2**30


def recompute(work, scales):
    finest = len(work.scales) - 1
    loads = tuple(
        replace(load, activation_checkpointing=finest - i in scales)
        for i, load in enumerate(work.scales)
    )
    return replace(work, scales=loads)


def test_tokens_are_kept_where_that_is_faster_and_there_is_room():
    work = xl(overlaps_exchange=False)
    choices = Choices(zero_stages=[1], keeps_tokens=True)
    free = {one.placement: one for one in candidates(work, NODE, choices)}
    tight = {
        one.placement: one for one in candidates(work, replace(NODE, gpu_memory_gib=15), choices)
    }
    coarse = Placement((8, 8, 1))
    assert not free[coarse].regathers
    assert "tokens kept" in str(free[coarse])
    assert tight[coarse].regathers
    assert tight[coarse].time.total > free[coarse].time.total
    replicated = Placement((1, 1, 1))
    assert "tokens" not in str(free[replicated])
    # What is not left open is as the step says.
    assert all(one.regathers for one in candidates(work, NODE, Choices(zero_stages=[1])))


def test_separate_weights_are_compared_with_one_scale():
    single = xl(scales=(replace(xl().scales[-1], images=33, max_images=33),))
    words = explained(xl(), NODE, Choices(zero_stages=[1]), one_scale=single, changes={})
    (line,) = [line for line in words if line.startswith("Against one scale")]
    mine = best(candidates(xl(), NODE, Choices(zero_stages=[1])))
    other = best(candidates(single, NODE, Choices(zero_stages=[1])))
    assert mine is not None
    assert other is not None
    less = 1000 * (other.time.total - mine.time.total)
    assert f"{less:,.1f} ms less a step" in line
    held = mine.memory.total - other.memory.total
    assert f"{format_bytes(abs(held))} {'more' if held > 0 else 'less'} of a rank" in line
    low = replace(NODE, gpu_memory_gib=2)
    assert not any(
        "one scale" in line for line in explained(xl(), low, one_scale=single, changes={})
    )


def test_tied_scales_are_sharded_alike():
    work = tiny(TINY, TINY, tied=(0, 1))
    assert {one.placement.ranks for one in candidates(work, NODE)} == {
        (1, 1),
        (2, 2),
        (4, 4),
        (8, 8),
    }
