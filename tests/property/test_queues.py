"""The formula for the time of a step against a simulation of the GPU's queues."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from trainer.config.composition import compose_job
from trainer.planning.placing import workload
from trainer.planning.queues import simulate
from trainer.planning.step_time import least_pass_seconds, pass_seconds, step_time
from trainer.planning.streams import Pass, Stream, Transfer, Travel
from trainer.planning.workload import Workload

TOLERANCE = 0.03
WORKERS = {"eight_24gb": 8, "h100_8": 8, "h100_8x8": 64}
FLOWS = {"two_scales": 34, "three_scales": 33, "four_scales": 32}
MODELS = ("s_2", "b_2", "l_2", "xl_2", "xxl_2")
JOBS = list(product(MODELS, FLOWS, WORKERS))


def job(model: str, flow: str, cluster: str) -> tuple[Workload, HardwareConfig]:
    made = compose_job(
        [
            "+exp=imagenet_xl",
            f"model={model}",
            f"flow={flow}",
            f"cluster={cluster}",
            f"train.global_batch={FLOWS[flow] * WORKERS[cluster]}",
        ]
    )
    return workload(made), made.cluster.hardware


@pytest.mark.slow
@pytest.mark.parametrize(("model", "flow", "cluster"), JOBS)
def test_formula_and_simulation_agree_on_every_placement(
    model: str, flow: str, cluster: str
) -> None:
    work, hardware = job(model, flow, cluster)
    for ranks in product((1, 2, 8), (1, 4, 8)):
        coarse = (*ranks, *[1] * len(work.scales))[: len(work.scales) - 1]
        for finest, stage, regathers in product((1, 2), (1, 3), (True, False)):
            step = replace(work, regathers=regathers)
            times = [
                step_time(
                    step,
                    Placement((*coarse, finest)),
                    zero_stage=stage,
                    hardware=hardware,
                    timing=timing,
                ).total
                for timing in (pass_seconds, simulate)
            ]
            assert times[0] == pytest.approx(times[1], rel=TOLERANCE)


@st.composite
def travels(draw: st.DrawFn) -> tuple[Travel, ...]:
    scale = draw(st.floats(0, 1))
    links = st.floats(0.2, 1)
    return tuple(Travel(scale * draw(links), draw(st.floats(0, 0.05))) for _ in range(4))


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """Blocks whose parts take up to a second, and reductions of up to two seconds a block."""
    depth = draw(st.integers(12, 40))
    times = st.floats(0.1, 1)

    def stream(*, sharded: bool) -> Stream:
        computed = (draw(times), draw(times), draw(times))
        again = computed if draw(st.booleans()) else (0.0, 0.0, 0.0)
        if not sharded:
            return Stream(compute=computed, again=again)
        return Stream(
            compute=computed, again=again, forward=draw(travels()), backward=draw(travels())
        )

    reduced = draw(st.floats(0, 2))
    return Pass(
        depth=depth,
        coarse=stream(sharded=True),
        finest=stream(sharded=False),
        reductions=tuple(
            Transfer(block or -1, reduced, 0.0) for block in reversed(range(depth)) if reduced
        ),
    )


@settings(max_examples=60, deadline=None)
@given(passes())
def test_formula_and_simulation_agree_on_any_pass(work: Pass) -> None:
    for formula, simulated in zip(pass_seconds(work), simulate(work), strict=True):
        assert formula == pytest.approx(simulated, rel=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(passes())
def test_the_bound_is_below_the_formula(work: Pass) -> None:
    for one in (work, work.without_exchange):
        for least, formula in zip(least_pass_seconds(one), pass_seconds(one), strict=True):
            assert 0.5 * formula <= least <= formula * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(passes())
def test_no_resource_works_more_than_there_is_time(work: Pass) -> None:
    forward, backward = simulate(work)
    gpu = work.depth * sum(sum(stream.compute) for stream in work.streams)
    again = work.depth * sum(sum(stream.again) for stream in work.streams)
    sent = [
        (work.depth - 1) * sum(travel.link for stream in work.streams for travel in legs(stream))
        for legs in (lambda stream: stream.forward, lambda stream: stream.backward)
    ]
    reduced = sum(each.link for each in work.reductions)
    assert forward >= max(gpu, sent[0]) * (1 - 1e-9)
    assert backward >= max(2 * gpu + again, sent[1] + reduced) * (1 - 1e-9)
    # Nor do queues ever all wait: at most everything happens one after the other.
    starts = (work.depth - 1) * sum(
        travel.start for stream in work.streams for travel in (*stream.forward, *stream.backward)
    )
    everything = 3 * gpu + again + sum(sent) + reduced + starts
    assert forward + backward <= everything * (1 + 1e-9)
