"""Laws of placements: what sharding can and cannot save, and what is chosen."""

from dataclasses import replace
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hardware import HardwareConfig
from cluster.placement import Placement, expert_group, replica_ranks
from trainer.planning.exchange import KINDS, exchange_bytes
from trainer.planning.memory import rank_memory
from trainer.planning.planner import Aim, Choices, best, candidates, choose
from trainer.planning.workload import ScaleLoad, Workload

QUICK = settings(max_examples=60, deadline=None)
STAGES = st.integers(0, 3)
DEPTH, WIDTH = 4, 64


@st.composite
def loads(draw: st.DrawFn) -> ScaleLoad:
    tokens, images = draw(st.integers(1, 256)), draw(st.integers(1, 32))
    matrices = draw(st.integers(1, 10**6)) * 64
    return ScaleLoad(
        # The first block is whole, and a layer of each other one.
        parameters=DEPTH * (matrices + WIDTH),
        unpartitioned=matrices + DEPTH * WIDTH,
        modulation=(DEPTH - 1) * draw(st.sampled_from([0, matrices // 2, matrices])),
        tokens=tokens,
        images=images,
        max_images=images,
        multiply_adds=DEPTH * tokens * (12 * WIDTH**2 + draw(st.integers(0, 10**5))),
        expert_multiply_adds=DEPTH * tokens * 12 * WIDTH**2,
        activations=tokens * DEPTH * 20 * WIDTH,
        recomputed_activations=tokens * DEPTH * 5 * WIDTH,
        block_activations=tokens * 20 * WIDTH,
        activation_checkpointing=draw(st.booleans()),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    return Workload(
        scales=tuple(draw(st.lists(loads(), min_size=1, max_size=3))),
        shared_parameters=draw(st.integers(0, 10**6)),
        width=WIDTH,
        hidden=4 * WIDTH,
        depth=DEPTH,
        coarse_ahead=draw(st.booleans()),
        overlaps_exchange=draw(st.booleans()),
        world_size=draw(st.sampled_from([8, 16, 64])),
        images=32,
        grad_accum_steps=draw(st.integers(1, 4)),
        element_bytes=(element := draw(st.sampled_from([2, 4]))),
        gradient_bytes=draw(st.sampled_from([element, 4])),
        offload=draw(st.booleans()),
        ema_on_host=draw(st.booleans()),
        regathers=draw(st.booleans()),
        bucket_elements=1000,
        kept_parameters=draw(st.sampled_from([0, 10**6, 10**9])),
        reduces_in_backward=draw(st.sampled_from([None, False, True])),
    )


@st.composite
def placed(draw: st.DrawFn) -> tuple[Workload, Placement]:
    work = draw(workloads())
    ranks = st.sampled_from([1, 2, 4, 8])
    return work, Placement(tuple(draw(ranks) for _ in work.scales))


@st.composite
def nodes(draw: st.DrawFn) -> HardwareConfig:
    return HardwareConfig(
        gpus_per_node=8,
        gpu_memory_gib=draw(st.floats(0.01, 4)),
        matmul_tflops=draw(st.floats(1, 1000)),
        node_link_gb_per_s=draw(st.floats(1, 1000)),
        network_gb_per_s=draw(st.floats(1, 100)),
    )


@QUICK
@given(placed(), STAGES)
def test_sharding_never_adds_weights_or_gradients(
    case: tuple[Workload, Placement], stage: int
) -> None:
    work, placement = case
    whole = rank_memory(work, Placement((1,) * len(work.scales)), zero_stage=stage)
    got = rank_memory(work, placement, zero_stage=stage)
    # Each flat buffer is rounded up once.
    slack = work.gradient_bytes * len(work.scales)
    assert got.weights <= whole.weights + slack
    assert got.gradients <= whole.gradients + slack
    if work.regathers:
        # Nor activations: a rank keeps its own tokens.
        assert got.activations <= whole.activations


@QUICK
@given(placed(), st.integers(1, 3))
def test_the_optimizer_state_of_all_ranks_is_that_of_the_model(
    case: tuple[Workload, Placement], stage: int
) -> None:
    work, placement = case
    got = rank_memory(work, placement, zero_stage=stage)
    count = work.shared_parameters + sum(load.parameters for load in work.scales)
    state = work.world_size * (got.host + got.optimizer + got.ema)
    slack = 16 * work.world_size * (1 + len(work.scales))
    assert 16 * count <= state <= 16 * count + slack


@QUICK
@given(placed())
def test_a_group_of_one_is_no_group(case: tuple[Workload, Placement]) -> None:
    work, placement = case
    count = work.shared_parameters + sum(load.parameters for load in work.scales)
    assert work.shards(Placement((1,) * len(work.scales))) == [(count, 1)]
    held = work.shards(placement)
    assert sum(weights * ranks for weights, ranks in held) >= count
    sent = exchange_bytes(work, placement, images=[1] * len(work.scales))
    assert (sum(sent.values()) == 0) == (not placement.sharded)
    assert set(sent) == set(KINDS)


@QUICK
@given(placed(), st.integers(1, 9))
def test_exchange_grows_with_the_images(case: tuple[Workload, Placement], times: int) -> None:
    work, placement = case
    one = exchange_bytes(work, placement, images=[1] * len(work.scales))
    many = exchange_bytes(work, placement, images=[times] * len(work.scales))
    assert many == {kind: times * sent for kind, sent in one.items()}


@settings(max_examples=25, deadline=None)
@given(workloads(), nodes(), st.floats(1, 100))
def test_the_choice_fits_and_more_memory_never_makes_it_slower(
    work: Workload, node: HardwareConfig, factor: float
) -> None:
    assert node.gpu_memory_gib is not None
    found = candidates(work, node)
    chosen = best(found)
    larger = replace(node, gpu_memory_gib=factor * node.gpu_memory_gib)
    better = best(candidates(work, larger))
    if chosen is None:
        assert not any(one.fits for one in found)
        return
    assert chosen.fits
    assert chosen.memory.total <= node.gpu_memory_gib * 2**30
    assert all(chosen.time.total <= one.time.total for one in found if one.fits)
    assert better is not None
    assert better.time.total <= chosen.time.total


AIMS: tuple[Aim, ...] = get_args(Aim)


@settings(max_examples=20, deadline=None)
@given(workloads(), nodes(), st.sampled_from(AIMS), st.booleans(), st.booleans(), st.booleans())
def test_choosing_without_timing_all_candidates_chooses_the_same(
    work: Workload,
    node: HardwareConfig,
    aim: Aim,
    keeps_tokens: bool,
    keeps_weights: bool,
    recomputes: bool,
) -> None:
    choices = Choices(
        aim=aim, keeps_tokens=keeps_tokens, keeps_weights=keeps_weights, recomputes=recomputes
    )
    found, chosen = candidates(work, node, choices), choose(work, node, choices)
    expected = best(found, aim)
    assert (chosen is None) == (expected is None)
    if chosen and expected:
        assert str(chosen) == str(expected)
        assert (chosen.memory, chosen.time) == (expected.memory, expected.time)
    assert all(one.least_time <= one.time.total for one in found)


@QUICK
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.data())
def test_expert_and_replica_groups_are_a_grid_of_all_ranks(
    ranks: int, groups: int, data: st.DataObject
) -> None:
    world_size = ranks * groups
    rank = data.draw(st.integers(0, world_size - 1))
    group, replicas = expert_group(rank, ranks), replica_ranks(rank, ranks, world_size)
    assert set(group) & set(replicas) == {rank}
    assert (len(group), len(replicas)) == (ranks, groups)
    every = [r for replica in replicas for r in expert_group(replica, ranks)]
    assert sorted(every) == list(range(world_size))
