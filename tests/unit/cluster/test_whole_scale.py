"""A scale whole on one rank of a group: where it would pay, and that no named cluster is there."""

from dataclasses import replace

import pytest

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from tests.unit.cluster.loads import NODE, explained, xl
from trainer.config.composition import compose_job
from trainer.config.groups import members
from trainer.planning.exchange import exchange_bytes
from trainer.planning.placing import workload
from trainer.planning.planner import Choices, best, candidates
from trainer.planning.step_time import step_time
from trainer.planning.whole_scale import (
    OwnerWorkload,
    break_even_flops_per_byte,
    fastest_whole_scale,
    flops_per_byte,
)
from trainer.planning.workload import Workload

IMAGES = {2: 34, 3: 33}


@pytest.mark.parametrize(("ranks", "regathered", "kept"), [(2, 5.143, 7.2), (8, 7.579, 13.091)])
def test_the_bound_in_widths(ranks, regathered, kept):
    for regathers, widths in ((True, regathered), (False, kept)):
        bound = break_even_flops_per_byte(xl(regathers=regathers), ranks)
        assert bound / 1152 == pytest.approx(widths, rel=1e-3)


@pytest.mark.parametrize("regathers", [True, False])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_at_the_bound_computing_for_others_costs_what_sending_less_saves(ranks, regathers):
    # Large messages, whose starts are nothing, and nothing hidden.
    work = xl(images=3 * 10**6, regathers=regathers, shared_modulation=True)
    bound = break_even_flops_per_byte(work, ranks)
    node = replace(NODE, matmul_tflops=bound * NODE.node_link_gb_per_s / 1000)
    assert flops_per_byte(node) == pytest.approx(bound)
    coarsest, tokens = work.scales[0], work.scales[0].images * 16
    divided = sum(
        exchange_bytes(work, Placement((ranks, 1, 1)), images=[int(coarsest.images), 0, 0]).values()
    )
    keys = 27 * 4 * 2 * 1152 * (ranks - 1) * tokens
    saved = (divided - keys) / (1e9 * node.node_link_gb_per_s)
    computed = 27 * 6 * (ranks - 1) * tokens * (4 * 1152**2 + 2 * 1152 * 4608)
    assert computed / (1e12 * node.matmul_tflops) == pytest.approx(saved, rel=1e-3)


def test_the_owner_computes_for_all_and_holds_the_whole_scale():
    load = xl().scales[0]
    scales = (replace(load, images=8 * load.images), *xl().scales[1:])
    owner = OwnerWorkload(**{**vars(xl()), "scales": scales}, owned=0, group=8)
    placement = Placement((1, 1, 1))
    own = 672_000_000 - 63_000_000
    assert owner.shards(placement) == [(2_019_000_000 - own, 1), (own, 8)]
    alone = step_time(xl(), placement, zero_stage=1, hardware=NODE)
    time = step_time(owner, placement, zero_stage=1, hardware=NODE)
    more = 6 * 7 * load.images * load.multiply_adds / 400e12
    assert time.compute == pytest.approx(alone.compute + more)
    # Its weights are nobody else's on a node of eight.
    assert alone.reduction - time.reduction == pytest.approx(3 * 7 / 8 * 2 * own / 400e9)


def narrow() -> Workload:
    """Three images on a rank and width 64."""
    width, depth = 64, 28
    products = depth * 12 * width**2
    loads = tuple(
        replace(
            load,
            parameters=depth * 18 * width**2,
            unpartitioned=(18 + depth - 1) * width**2,
            multiply_adds=load.tokens * products * 51 // 50,
            expert_multiply_adds=load.tokens * products,
        )
        for load in xl(images=3).scales
    )
    return xl(
        images=3,
        scales=loads,
        width=width,
        hidden=4 * width,
        shared_parameters=1000 * width,
        bucket_elements=5_000_000,
        reduces_in_backward=True,
        overlaps_exchange=True,
    )


def test_it_would_pay_for_narrow_models_and_slow_links_and_is_said_but_not_chosen():
    slow, work = replace(NODE, node_link_gb_per_s=2), narrow()
    assert flops_per_byte(slow) > break_even_flops_per_byte(work, 8)
    choices = Choices(zero_stages=[1], keeps_tokens=True)
    whole = fastest_whole_scale(work, slow, zero_stages=[1])
    chosen = best(candidates(work, slow, choices))
    assert whole is not None
    assert chosen is not None
    assert whole.time.total < 0.95 * chosen.time.total
    words = explained(work, slow, choices, changes={})
    assert any(line.startswith(f"With {whole}, ZeRO-1, a step would take") for line in words)
    quick = explained(work, NODE, choices, changes={})
    assert not any("no engine can do that" in line for line in quick)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["s_2", "b_2", "l_2", "xl_2", "xxl_2"])
@pytest.mark.parametrize("cluster", members("cluster"))
def test_no_named_cluster_would_be_faster_with_it(cluster, model):
    workers = compose_job(["+exp=imagenet_xl", f"cluster={cluster}"]).cluster.workers
    for scales, flow in ((2, "two_scales"), (3, "three_scales")):
        job = compose_job(
            [
                "+exp=imagenet_xl",
                f"cluster={cluster}",
                f"model={model}",
                f"flow={flow}",
                f"train.global_batch={IMAGES[scales] * workers}",
            ]
        )
        work, hardware = workload(job), job.cluster.hardware
        whole = fastest_whole_scale(work, hardware)
        if workers == 1:
            assert whole is None
            continue
        chosen = best(candidates(work, with_room(hardware), Choices(keeps_tokens=True)))
        assert whole is not None
        assert chosen is not None
        assert whole.time.busy > chosen.time.busy


def with_room(hardware: HardwareConfig) -> HardwareConfig:
    return replace(hardware, gpu_memory_gib=1000)
