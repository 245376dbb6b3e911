from dataclasses import replace

import pytest

from cluster.hardware import HardwareConfig, HardwareError
from cluster.placement import Placement
from tests.unit.cluster.loads import NODE, TINY, tiny, xl
from trainer.planning.planner import USABLE, candidates, explain, fastest

PCIE = replace(NODE, node_link_gb_per_s=12.5, matmul_tflops=66, gpu_memory_gib=24)


def test_every_placement_and_stage_is_a_candidate_best_first():
    found = candidates(xl(), NODE)
    assert len(found) == 4**3 * 3
    assert fastest(found) is found[0]
    times = [one.time.total for one in found if one.fits]
    assert times == sorted(times)


def test_a_fast_node_with_memory_to_spare_shards_nothing():
    best = fastest(candidates(xl(), NODE, zero_stages=[2]))
    assert best is not None
    assert not best.placement.sharded


def test_of_equally_fast_ones_the_lower_stage_is_taken():
    best = fastest(candidates(tiny(world_size=1), NODE))
    assert best is not None
    assert (best.placement, best.zero_stage) == (Placement((1,)), 1)


def test_slow_links_shard_the_coarse_scales_whose_tokens_are_few():
    best = fastest(candidates(xl(), PCIE, zero_stages=[1]))
    assert best is not None
    coarsest, _, finest = best.placement.ranks
    assert coarsest > 1
    assert coarsest >= finest


def test_what_does_not_fit_is_last_and_never_chosen():
    found = candidates(xl(), replace(NODE, gpu_memory_gib=16))
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    assert all((one.memory.total <= USABLE * 16 * 2**30) == one.fits for one in found)
    assert fastest(candidates(xl(), replace(NODE, gpu_memory_gib=2))) is None


def test_host_memory_binds_offloaded_state():
    work, node = xl(offload=True), replace(NODE, host_memory_gib=36)
    # 16 bytes of each of 2,019 M weights, all on one node: 30.1 GiB.
    assert fastest(candidates(work, node)) is not None
    assert fastest(candidates(work, replace(node, host_memory_gib=32))) is None


def test_unknown_memory_is_refused_with_a_fix():
    with pytest.raises(HardwareError, match=r"gpu_memory_gib=null.*Set it.*cluster=h100_8"):
        candidates(xl(), HardwareConfig())


def test_no_sharding_is_said_when_none_is_needed():
    words = explain(xl(), NODE, zero_stages=[2], changes={})
    decision = "No sharding is needed: every rank holds all experts, with ZeRO-2. A rank holds "
    assert words[0].startswith(decision)
    assert words[0].endswith(", and may hold 72.0 GiB: 90% of its GPU.")
    assert words[1].startswith("The fastest that shards is")


def test_changes_are_planned_anew():
    small = replace(NODE, gpu_memory_gib=16)
    changes = {
        "more memory": (xl(), NODE),
        "no change": (xl(), small),
        "next to no memory": (xl(), replace(NODE, gpu_memory_gib=1)),
    }
    best = fastest(candidates(xl(), small, zero_stages=[2]))
    words = explain(xl(), small, zero_stages=[2], changes=changes)
    assert best is not None
    assert words[0].startswith("Shard scale")
    assert words[-3].startswith("With more memory: replicated, ZeRO-2")
    assert words[-2].startswith("With no change: the same choice")
    assert words[-1] == "With next to no memory: nothing fits."
    assert any("Replicated, ZeRO-2 would take" in line for line in words)


def test_it_is_said_what_is_missing_when_nothing_fits():
    low = replace(NODE, gpu_memory_gib=8)
    words = explain(xl(), low, changes={"80 GB": (xl(), NODE), "nothing": (xl(), low)})
    assert words[0].startswith("Nothing fits: the smallest, ")
    assert "may have 7.2 GiB" in words[0]
    assert words[1].startswith("With 80 GB: ")
    assert " fits (" in words[1]
    assert words[2] == "With nothing: still nothing fits."


def test_tied_scales_are_sharded_alike():
    work = tiny(TINY, TINY, tied=(0, 1))
    assert {one.placement.ranks for one in candidates(work, NODE)} == {
        (1, 1),
        (2, 2),
        (4, 4),
        (8, 8),
    }
