"""What ranks hold and send is what the planner predicts, on real gloo ranks."""

import pytest

from benchmarks.experts import memory, wire
from benchmarks.experts.variant import Variant

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

COARSE = "{2:2,1:2}"


@pytest.mark.parametrize(
    "variant",
    [
        Variant(scales=3, zero_stage=0, placement=COARSE),
        Variant(scales=3, zero_stage=1, placement=COARSE, grad_accum_steps=2),
        Variant(scales=3, zero_stage=2, placement=COARSE, grad_accum_steps=2),
        Variant(scales=3, zero_stage=3, placement=COARSE),
        Variant(scales=3, zero_stage=3, placement=COARSE, grad_accum_steps=2),
    ],
    ids=lambda variant: variant.name,
)
def test_bytes_of_live_tensors_are_as_predicted(variant):
    job = memory.shrink_buckets(variant.job(model="digits", ranks=2, images=3))
    assert memory.measure(variant, job)["ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("stage", [2, 3])
def test_bytes_that_leave_a_rank_are_as_the_formula_says(stage):
    variant = Variant(scales=3, zero_stage=stage, placement=COARSE)
    rows = wire.measure(variant, variant.job(model="digits", ranks=2, images=3))
    sent = {row["collective"]: row["ratio"] for row in rows}
    kinds = {"all_gather", "all_to_all", "reduce_scatter"} | (
        {"all_reduce"} if stage == 2 else set()
    )
    assert kinds <= set(sent)
    for kind in kinds:
        assert sent[kind] == pytest.approx(1, abs=0.02), kind
