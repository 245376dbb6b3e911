import pytest

from cluster.hardware import HardwareConfig, HardwareError
from cluster.placement import (
    Placement,
    PlacementError,
    check_placement,
    expert_group,
    possible_placements,
    possible_ranks,
    replica_ranks,
)

XL = {"width": 1152, "hidden": 4608, "world_size": 16, "ranks_per_node": 8}


def test_a_placement_names_the_scales_that_are_sharded():
    placement = Placement.of({0: 2, 2: 4}, scales=3)
    assert placement.ranks == (4, 1, 2)
    assert placement.sharded == {2: 4, 0: 2}
    assert placement.unit == 4
    assert str(placement) == "{2:4,0:2}"
    assert Placement.of({1: 1}, scales=2) == Placement((1, 1))
    assert str(Placement((1, 1))) == "replicated"
    assert Placement((1, 1)).unit == 1


def test_groups_of_different_sizes_share_a_node_when_their_unit_does():
    assert Placement((4, 6)).unit == 12


def test_neighbours_hold_a_scale_and_every_eth_rank_the_same_shard():
    assert list(expert_group(5, 4)) == [4, 5, 6, 7]
    assert list(replica_ranks(5, 4, 12)) == [1, 5, 9]
    assert list(expert_group(3, 1)) == [3]
    assert list(replica_ranks(3, 1, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sharded", "message"),
    [
        ({3: 4, 1: 2}, r"placement=\{3:4,1:2\} has \{3:4\}.*0 \(finest\) to 2.*it is \{1:2\}"),
        ({0: 0}, r"at least 1 rank; without that it is replicated"),
    ],
)
def test_scales_that_do_not_exist_are_refused(sharded, message):
    with pytest.raises(PlacementError, match=message):
        Placement.of(sharded, scales=3)


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        ((5, 1), {}, r"scale 1's E=5 does not divide the width of 1152.*nearest.*\{1:4\}$"),
        (
            (1, 8),
            {"hidden": 4},
            r"scale 0's E=8 does not divide the MLP's hidden width of 4.*\{0:4",
        ),
        (
            (8, 1),
            {"world_size": 12},
            r"does not divide the number of ranks, which is 12.*\{1:4",
        ),
        ((16, 1), {}, r"16 consecutive ranks would have to share a node, which has 8.*\{1:8\}$"),
        ((2, 3), {}, r"6 consecutive ranks would have to share a node, which has 8.*\{1:2,0:"),
        ((2, 4), {"tied": (0, 1)}, r"scales 0 and 1 share weights.*same E.*is \{1:2,0:2\}$"),
        ((2, 1), {"ranks_per_node": 1}, r"is replicated$"),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_does(ranks, changes, message):
    with pytest.raises(PlacementError, match=message):
        check_placement(Placement(ranks), **{**XL, **changes})


def test_heads_and_patches_need_not_be_divided():
    # 8 ranks for 6 heads of 64, and patches of 4 numbers: neither is asked for.
    check_placement(
        Placement((8, 1)), width=384, hidden=1536, world_size=8, ranks_per_node=8, tied=()
    )


def test_possible_placements_are_all_that_pass_the_check():
    possible = possible_ranks(**XL)
    assert possible == (1, 2, 4, 8)
    assert len(possible_placements(3, possible=possible)) == 64
    tied = possible_placements(3, possible=possible, tied=(2, 0))
    assert len(tied) == 16
    for placement in tied:
        check_placement(placement, tied=(2, 0), **XL)


def test_hardware_is_one_node_unless_it_is_told():
    assert HardwareConfig().ranks_per_node(12) == 12
    assert HardwareConfig(gpus_per_node=8).ranks_per_node(12) == 8
    assert HardwareConfig(gpus_per_node=8).ranks_per_node(4) == 4
    with pytest.raises(HardwareError, match=r"hardware.gpu_memory_gib is 0; it must be positive"):
        HardwareConfig(gpu_memory_gib=0)
